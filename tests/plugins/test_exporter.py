"""The exporter `hf`: a folder that plain transformers loads, seen to behave like the student."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kdframe import models
from kdframe.api import ExportContext
from kdframe_hf_export import HfExport
from kdframe_hf_export.exporter import _agrees
from tests.model_helpers import CPU
from tests.run_kit import load

PROBE = [list(range(3, 90)), list(range(200, 260))]


def context(probe=PROBE, load=None):
    load = load or (lambda path: models.load_folder(path, CPU))
    return ExportContext(card="# A card\n", facts={"name": "x"}, probe=probe, load=load)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_the_student(tmp_path, teacher_folder, tokenizer, dtype):
    report = HfExport(dtype=dtype).build()(teacher_folder, tmp_path, context())
    assert report.status == "verified"
    assert report.tokens_equal
    assert report.metrics["top1"] >= 0.9
    assert report.metrics["kl"] < {"float32": 1e-9, "float16": 1e-3, "bfloat16": 0.1}[dtype]
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == list(report.files)
    written = load(tmp_path)
    assert written.dtype == getattr(torch, dtype)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again("naïve 🙂")["input_ids"] == tokenizer("naïve 🙂")["input_ids"]
    assert (tmp_path / "README.md").read_text("utf-8") == "# A card\n"
    ids = torch.tensor([PROBE[0]])
    made = written.generate(ids, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > ids.shape[1]


def test_without_a_probe_it_is_not_called_verified(tmp_path, teacher_folder):
    report = HfExport().build()(teacher_folder, tmp_path, context(probe=[]))
    assert report.status == "unverified"
    assert report.metrics == {}


def test_a_folder_that_behaves_otherwise_has_failed(tmp_path, teacher_folder):
    """What is read back is damaged on the way."""

    def damaging(path):
        if path == tmp_path:
            weights = load_file(path / "model.safetensors")
            weights["model.norm.weight"] *= torch.linspace(-1, 1, 32)
            save_file(weights, path / "model.safetensors", {"format": "pt"})
        return models.load_folder(path, CPU)

    report = HfExport().build()(teacher_folder, tmp_path, context(load=damaging))
    assert report.status == "failed"
    assert "'top1': 0." in report.reason


def test_weights_that_do_not_fit_float16_fail(tmp_path, teacher_folder):
    big = load(teacher_folder)
    with torch.no_grad():
        big.model.norm.weight.fill_(1e6)
    big.save_pretrained(tmp_path / "big")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "big")
    (tmp_path / "out").mkdir()
    report = HfExport(dtype="float16").build()(tmp_path / "big", tmp_path / "out", context())
    assert report.status == "failed"


@pytest.mark.parametrize(
    ("dtype", "tokens", "wrong", "good"),
    [
        ("float32", 500, 0, True),
        ("float32", 500, 1, False),
        ("float16", 12, 1, True),  # a tie that rounding turned
        ("float16", 500, 10, True),
        ("float16", 500, 20, False),
        ("bfloat16", 12, 2, True),
        ("bfloat16", 12, 6, False),
    ],
)
def test_how_much_rounding_may_turn(dtype, tokens, wrong, good):
    metrics = {"top1": 1 - wrong / tokens, "kl": 0.001, "tokens": float(tokens)}
    assert _agrees(metrics, dtype) == good


def test_what_is_no_number_never_agrees():
    assert not _agrees({"top1": 1.0, "kl": float("nan"), "tokens": 10.0}, "float16")
