"""A cache of hidden states, from the teacher to the student."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from kdframe.api import HiddenTargets, TeacherShape
from kdframe.errors import DamagedError, InputError
from kdframe.targets import met
from kdframe.teacher_cache import open_cache
from kdframe_codecs import Hidden, Hybrid, Klt
from kdframe_logit_kd import LogitKD
from kdframe_mmap_cache import MmapCache
from tests.run_kit import filled, learn, lesson, lines, token_rows
from tests.test_caching import own_words
from tests.test_output_layer import Bent, build

V = 300
ALL = [Hidden(), Hidden(precision="int8"), Klt(bits=8), Hybrid(k=4, bits=8)]
# The tiny teachers' opinions are random: no direction of their states matters little.
CLOSE = {"hidden float16": 1e-4, "hidden int8": 0.02, "klt": 0.02, "hybrid": 0.02}


def capped():
    return build(
        Gemma2ForCausalLM, Gemma2Config, vocab_size=V, head_dim=8, final_logit_softcapping=5.0
    )


def louder_with_bias():
    model = build(PhiForCausalLM, PhiConfig, vocab_size=V)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


TEACHERS = {
    "llama": lambda: build(LlamaForCausalLM, LlamaConfig, vocab_size=V),
    "a soft-cap": capped,
    "a scale": lambda: build(CohereForCausalLM, CohereConfig, vocab_size=V, logit_scale=0.25),
    "a bias": louder_with_bias,
}


@pytest.fixture(scope="module")
def rows():
    return token_rows(40, longest=40)


def name(codec) -> str:
    return f"{codec.kind} {getattr(codec, 'precision', '')}".strip()


def opened(folder, codec, teacher):
    shape = TeacherShape(V, teacher.config.hidden_size)
    return open_cache(MmapCache(codec=codec), {"teacher": "any"}, shape, folder)


def every(rows):
    return [rows.request(i) for i in range(len(rows))]


def distance(right: torch.Tensor, found: torch.Tensor, temperature: float) -> float:
    log_p = torch.log_softmax(right.double() / temperature, -1)
    log_q = torch.log_softmax(found.double() / temperature, -1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("codec", ALL, ids=name)
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_cache_opened_again_says_what_the_teacher_says(tmp_path, rows, kind, codec):
    teacher = TEACHERS[kind]().eval()
    filled(tmp_path, teacher, [rows], codec)
    targets = opened(tmp_path, codec, teacher).targets(every(rows), V)
    assert isinstance(targets, HiddenTargets)
    right = torch.cat([own_words(teacher, rows, i) for i in range(len(rows))])
    found = met(targets).log_probs
    for temperature in (1.0, 2.0, 7.0):
        assert distance(right, found, temperature) < CLOSE[name(codec)]


@pytest.mark.parametrize("codec", [Hidden(), Klt(bits=8), Hybrid(bits=8)], ids=name)
def test_a_teacher_in_half_precision_keeps_its_output_layer_so(tmp_path, rows, codec):
    teacher = TEACHERS["llama"]().eval().bfloat16()
    store = filled(tmp_path, teacher, [rows], codec)
    targets = store.targets(every(rows)[:9], V)
    assert targets.head.weight.dtype == torch.bfloat16
    right = torch.cat([own_words(teacher, rows, i) for i in range(9)])
    assert distance(right, met(targets).log_probs, 1.0) < 0.02  # its own logits are rounded


@pytest.mark.parametrize("width", [250, 300, 350])
@pytest.mark.parametrize("codec", [Hidden(), Hybrid(k=4)], ids=name)
def test_a_student_with_other_padding_reads_the_same(tmp_path, rows, codec, width):
    teacher = TEACHERS["llama"]().eval()
    store = filled(tmp_path, teacher, [rows], codec)
    same = met(store.targets(every(rows), V)).log_probs
    found = met(store.targets(every(rows), width)).log_probs
    assert found.shape[1] == width
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)))
    both = min(width, V)
    expected = same[:, :both].log_softmax(-1) if width < V else same
    torch.testing.assert_close(found[:, :both], expected)
    assert (found[:, both:] == -torch.inf).all()


@pytest.mark.parametrize("codec", ALL, ids=name)
def test_a_student_learns_from_it(tmp_path, rows, codec):
    teacher = TEACHERS["llama"]().eval()
    store = filled(tmp_path / "cache", teacher, [rows], codec)
    student = build(LlamaForCausalLM, LlamaConfig, vocab_size=V, num_hidden_layers=1)
    loss = LogitKD(alpha=0, temperature=2).build()
    learn(lesson(tmp_path / "run", student, store, rows, loss=loss, epochs=4, learning_rate=1e-2))
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("codec", [Hidden(), Klt(), Hybrid()], ids=name)
def test_a_teacher_whose_halves_do_not_add_up_is_refused(tmp_path, rows, codec):
    with pytest.raises(InputError, match="do not add up"):
        filled(tmp_path, build(Bent, LlamaConfig, vocab_size=V).eval(), [rows], codec)


@pytest.mark.parametrize("codec", ALL, ids=name)
def test_what_it_was_fitted_to_is_missed_and_checked(tmp_path, rows, codec):
    teacher = TEACHERS["llama"]().eval()
    folder = filled(tmp_path, teacher, [rows], codec).cache.folder
    (kept,) = folder.glob("kept-codec*")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-40] + bytes(40))
    with pytest.raises(DamagedError):
        opened(tmp_path, codec, teacher).targets(every(rows), V)
    kept.unlink()
    with pytest.raises(DamagedError, match="is missing; restore it"):
        opened(tmp_path, codec, teacher).targets(every(rows), V)
