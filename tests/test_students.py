"""Students: cut from a teacher, or given adapters."""

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
)

from kdframe import models
from kdframe.errors import InputError
from kdframe.experiment import Cut, Lora, Student
from kdframe.students import cut_layers, kept_layers
from tests.model_helpers import CPU, gemma, gpt2, logits, student_of, teacher_of


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return models.load_teacher(teacher_of(teacher_folder), CPU)


@pytest.fixture(scope="module")
def ids(tokenizer, prose) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(prose)[:48]])


@pytest.mark.parametrize(
    ("layers", "kept"),
    [(1, [0]), (2, [0, 5]), (3, [0, 1, 5]), (6, [0, 1, 2, 3, 4, 5]), ((4, 1), [4, 1])],
)
def test_layers_that_a_cut_keeps(layers, kept):
    assert kept_layers(Cut(layers=layers), total=6) == kept


@pytest.mark.parametrize(("layers", "named"), [(5, "5 layers"), ((0, 4), "no layer 4")])
def test_cut_beyond_the_teacher_is_refused(teacher, layers, named):
    with pytest.raises(InputError, match=rf"{named}.* the teacher has 4"):
        student_of(teacher, from_teacher=Cut(layers=layers))


def test_cut_of_all_layers_is_the_teacher(teacher, ids):
    student = student_of(teacher, from_teacher=Cut(layers=4))
    assert torch.equal(logits(student.eval(), ids), logits(teacher, ids))


def test_cut_keeps_the_named_layers(teacher, ids):
    student = student_of(teacher, from_teacher=Cut(layers=(0, 3)))
    assert student.config.num_hidden_layers == 2
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    for new, old in enumerate((0, 3)):
        ours, theirs = student.model.layers[new], teacher.model.layers[old]
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_cut_is_a_copy_in_its_own_type(teacher):
    student = student_of(teacher, from_teacher=Cut(layers=1), dtype="bfloat16")
    assert student.dtype == torch.bfloat16
    own = student_of(teacher, from_teacher=Cut(layers=1))
    own.model.embed_tokens.weight.data.zero_()
    assert teacher.model.embed_tokens.weight.abs().max() > 0


def test_cut_loads_the_teacher_where_none_is_given(teacher_folder, teacher):
    student = models.load_student(
        Student(from_teacher=Cut(layers=2)),
        teacher=teacher_of(teacher_folder),
        teacher_model=None,
        device=CPU,
        seed=0,
    )
    same = student_of(teacher, from_teacher=Cut(layers=2)).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in student.state_dict().items())


def test_cut_takes_what_the_configuration_says_of_each_layer():
    student = cut_layers(gemma(layers=7), Cut(layers=(5, 6)), torch.float32)
    assert student.config.layer_types == ["full_attention", "sliding_attention"]


def test_cut_of_an_architecture_that_names_its_layers_otherwise():
    whole = gpt2()
    student = cut_layers(whole, Cut(layers=(2,)), torch.float32)
    ours, theirs = student.transformer.h[0].state_dict(), whole.transformer.h[2].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_lora_alone_trains_and_begins_at_the_model(student_folder, ids):
    plain = student_of(model=str(student_folder)).eval()
    adapted = student_of(model=str(student_folder), lora=Lora(rank=4))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert torch.equal(logits(adapted.eval(), ids), logits(plain, ids))
    inside = models.causal_lm(adapted)
    assert type(inside) is LlamaForCausalLM
    assert any("lora_A" in name for name, _ in inside.named_parameters())
    assert models.causal_lm(plain) is plain
    assert models.parameter_count(adapted) > models.parameter_count(plain)


def test_equal_seeds_give_equal_adapters_and_leave_the_generator_alone(student_folder):
    state = torch.random.get_rng_state()
    one, two, other = (
        {n: p for n, p in model.named_parameters() if "lora_A" in n}
        for model in (
            student_of(model=str(student_folder), lora=Lora(), seed=seed) for seed in (1, 1, 2)
        )
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_unknown_target_module_is_named(student_folder):
    with pytest.raises(InputError, match=r"student\.lora\.target_modules: \('nope',\)"):
        student_of(model=str(student_folder), lora=Lora(target_modules=("nope",)))
