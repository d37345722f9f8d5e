"""Every variant of data and models goes the whole way."""

import json
import math

import pytest
import torch

from kdframe import pipeline
from kdframe.errors import InputError
from kdframe.experiment import Data, Source
from tests.conftest import make_llama
from tests.run_kit import experiment, lines, load, same, texts, weights, where, write_rows

PLAIN = {"loss", "perplexity", "bits_per_byte"}
AGREES = {"kl_to_teacher", "top1_agreement"}


@pytest.fixture
def tiny(tmp_path, prose, teacher_folder, student_folder):
    def make(student=student_folder, teacher=teacher_folder, **changes):
        return experiment(tmp_path, prose, teacher, student, **changes)

    return make


def finite(evaluation) -> bool:
    values = [
        entry[role]
        for metrics in evaluation["sets"].values()
        for entry in metrics.values()
        for role in ("teacher", "student_before", "student")
        if role in entry
    ]
    return bool(values) and all(math.isfinite(value) for value in values)


def run(made, tmp_path, **more):
    outcome = pipeline.run(made, where(tmp_path, **more))
    assert finite(outcome.evaluation)
    assert all(line.get("loss", 0.0) is not None for line in lines(outcome.folder))
    return outcome


def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text("utf-8"))


# ----------------------------------------------------------------------------- data variants
def chat(prose, count):
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i} {prose[i : i + 20]}"},
                {"role": "assistant", "content": prose[20 + i : 60 + i]},
            ]
        }
        for i in range(count)
    ]


def pairs(prose, count):
    return [
        {"prompt": f"{i} {prose[i : i + 20]}", "completion": prose[i : i + 40]}
        for i in range(count)
    ]


@pytest.mark.parametrize("shape", [chat, pairs])
@pytest.mark.parametrize("packing", [False, True])
def test_conversations_and_completions(tiny, tmp_path, prose, shape, packing):
    path = write_rows(tmp_path / "shaped.jsonl", shape(prose, 16))
    outcome = run(
        tiny(
            data__train=path, data__validation=0.2, data__test={}, data__packing=packing,
            data__max_length=96,
        ),
        tmp_path,
    )  # fmt: skip
    assert set(outcome.evaluation["sets"]["validation"]) == PLAIN | AGREES


def test_windows_of_long_rows_packed_or_not(tiny, tmp_path, prose):
    path = tmp_path / "book.txt"
    path.write_text(prose * 3, "utf-8")
    book = {"path": str(path), "sample_by": "document"}
    for packing in (False, True):
        made = tiny(
            name=f"book-{packing}", data__train=book, data__long_rows="split",
            data__max_length=24, data__packing=packing,
        )  # fmt: skip
        outcome = run(made, tmp_path)
        assert manifest(outcome.folder)["counts"]["train"]["split"] == 1


def test_sources_of_different_weight_one_without_a_teacher(tiny, tmp_path, prose):
    train = [
        {"path": write_rows(tmp_path / "a.jsonl", texts(prose, 8)), "weight": 2.0},
        {"path": write_rows(tmp_path / "b.jsonl", texts(prose, 8, start=50)), "weight": 0.5},
        {"path": write_rows(tmp_path / "c.jsonl", texts(prose, 8, start=80)), "teacher": False},
    ]
    outcome = run(tiny(data__train=train, data__test={}), tmp_path)
    assert manifest(outcome.folder)["done"]["cache"]["rows"] == 8 + 8 + 5
    steps = [line for line in lines(outcome.folder) if "loss" in line]
    assert len(steps) in range(13, 16)  # 2 epochs of about 16 + 4 + 8 rows, in fours


def test_without_any_teacher_row_the_student_learns_plainly(tiny, tmp_path, prose):
    def untaught(name):
        return {"path": str(tmp_path / f"{name}.jsonl"), "teacher": False}

    outcome = run(
        tiny(
            data__train=untaught("train"), data__validation=untaught("validation"),
            data__test={"more": untaught("more")},
        ),
        tmp_path,
    )  # fmt: skip
    assert set(outcome.evaluation["sets"]["more"]) == PLAIN
    assert manifest(outcome.folder)["done"]["cache"]["rows"] == 0


def test_a_validation_split_that_ends_empty(tiny, tmp_path, prose):
    one = write_rows(tmp_path / "one.jsonl", texts(prose, 1))
    made = tiny(
        data__train=one, data__validation=0.1, data__test={}, export=["hf"],
        training__epochs=3, training__early_stopping_patience=1, training__eval_steps=1,
    )  # fmt: skip
    outcome = pipeline.run(made, where(tmp_path))
    assert outcome.evaluation["sets"] == {}
    assert [line["step"] for line in lines(outcome.folder)] == [1, 2, 3]
    report = json.loads((outcome.folder / "exports/hf/export.json").read_text("utf-8"))
    assert report["status"] == "verified"  # on training rows


def test_a_test_set_cannot_take_the_name_of_the_validation_rows(tiny, tmp_path):
    made = tiny(data__test={"validation": str(tmp_path / "more.jsonl")})
    with pytest.raises(InputError, match="'validation' is taken"):
        pipeline.run(made, where(tmp_path))


def test_sections_can_be_given_as_objects(tiny, tmp_path):
    made = tiny()
    data = Data(
        train=(Source(path=str(tmp_path / "train.jsonl")),),
        validation=Source(path=str(tmp_path / "validation.jsonl")),
        max_length=48,
    )
    outcome = made.model_copy(update={"data": data}).run(
        runs=tmp_path / "runs", caches=tmp_path / "cache"
    )
    assert set(outcome.evaluation["sets"]) == {"validation"}


# ---------------------------------------------------------------------------- model variants
@pytest.mark.parametrize("lora", [None, {"rank": 2, "dropout": 0.1}])
def test_a_student_cut_from_its_teacher(tiny, tmp_path, lora):
    student = {"from_teacher": {"layers": [0, 3]}, "lora": lora}
    outcome = run(tiny(student=student), tmp_path)
    start, end = load(outcome.folder / "student-start"), load(outcome.folder / "student")
    assert end.config.num_hidden_layers == 2
    assert not same(weights(start), weights(end))


def test_adapters_are_merged_into_a_plain_student_and_kept_beside(tiny, tmp_path, student_folder):
    from peft import PeftModel

    lora = {"rank": 2, "target_modules": ["q_proj", "up_proj"]}
    student = {"model": str(student_folder), "lora": lora}
    outcome = run(tiny(student=student, training__learning_rate=0.02), tmp_path)
    plain = load(outcome.folder / "student")
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not [name for name in weights(plain) if "lora" in name]
    adapted = PeftModel.from_pretrained(load(student_folder), outcome.folder / "student-adapter")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = plain(ids).logits, adapted(ids).logits
        base = load(student_folder)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 0.01


@pytest.mark.parametrize("codec", [{"kind": "topk", "k": 64}, {"kind": "dense"}])
@pytest.mark.parametrize(("teacher_pads", "student_pads"), [(13, 0), (0, 9), (7, 30)])
def test_vocabularies_padded_differently(
    tiny, tmp_path, tokenizer, codec, teacher_pads, student_pads
):
    def padded(name, pads, **shape):
        size = len(tokenizer) + pads
        return make_llama(tmp_path / name, tokenizer, vocab_size=size, **shape)

    teacher = padded("teacher", teacher_pads, layers=2, hidden=32, seed=1)
    student = padded("student", student_pads, layers=1, hidden=16, seed=2)
    outcome = run(tiny(student=student, teacher=teacher, cache__codec=codec), tmp_path)
    entry = outcome.evaluation["sets"]["more"]["kl_to_teacher"]
    assert 0 < entry["student"] < entry["student_before"]


def test_a_teacher_with_an_adapter(tiny, tmp_path, prose, teacher_folder, student_folder):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load(teacher_folder), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    plain = run(tiny(), tmp_path)
    made = tiny(name="adapted", teacher__adapter=str(tmp_path / "adapter"))
    outcome = run(made, tmp_path)
    assert manifest(outcome.folder)["done"]["cache"]["rows"] == 33  # another teacher, another cache
    losses = [o.evaluation["sets"]["more"]["loss"]["teacher"] for o in (plain, outcome)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_a_student_that_cannot_be_packed_is_refused(tiny, tmp_path, tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    made = tiny(student=tmp_path / "mamba", data__packing=True)
    with pytest.raises(InputError, match=r"set data\.packing to false"):
        pipeline.run(made, where(tmp_path))
