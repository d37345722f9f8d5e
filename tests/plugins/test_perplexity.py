"""The evaluator `perplexity`, against transformers' own loss and by hand."""

import json
import math

import numpy as np
import pytest
import torch

from kdframe import data, evaluation
from kdframe.experiment import Data
from kdframe.progress import Quiet
from kdframe_evaluators import Perplexity
from tests.run_kit import load, token_rows

SETTING = evaluation.Setting((Perplexity(),), pad_id=0, batch_tokens=64)


def figures(model, rows):
    found = evaluation.evaluate(
        "student", model, {"a": rows}, SETTING, cache=None, progress=Quiet()
    )
    return found["a"]


def own_loss(model, rows) -> tuple[float, int]:
    """Transformers' sum of losses over the counted labels, and their number."""
    total, counted = 0.0, 0
    for i in range(len(rows)):
        ids = torch.tensor(rows.row(i).astype(np.int64))[None]
        labels = torch.full_like(ids, -100)
        at = torch.tensor(rows.positions(i).astype(np.int64)) + 1
        labels[0, at] = ids[0, at]
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * len(at)
        counted += len(at)
    return total, counted


def test_agrees_with_transformers(student_folder):
    model, rows = load(student_folder), token_rows(9, longest=30)
    found = figures(model, rows)
    total, counted = own_loss(model, rows)
    assert found["loss"].value == pytest.approx(total / counted, rel=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(total / counted), rel=1e-5)
    assert {figure.better for figure in found.values()} == {"lower"}


@pytest.mark.parametrize("text", ["plain words", "naïve café", "日本語 🙂 mixed with ascii", "é"])
def test_bits_per_byte_are_those_of_the_texts_bytes(tmp_path, student_folder, tokenizer, text):
    """All bytes but those of the first token, which nothing predicts."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(3)), "utf-8")
    rows = data.load(Data(train=(str(path),), validation=str(path)), tokenizer, 400).train
    model = load(student_folder)
    total, _ = own_loss(model, rows)
    counted = sum(len(f"{i} {text}".encode()) - 1 for i in range(3))  # "0" is the first token
    wanted = total / math.log(2) / counted
    assert figures(model, rows)["bits_per_byte"].value == pytest.approx(wanted, rel=1e-5)


def test_without_text_there_are_no_bits_per_byte(student_folder):
    rows = token_rows(3)
    bare = type(rows)(**{**vars(rows), "text_bytes": rows.text_bytes * 0})
    assert set(figures(load(student_folder), bare)) == {"loss", "perplexity"}


def test_a_hopeless_model_stays_finite(student_folder):
    model = load(student_folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e5)
    assert math.isfinite(figures(model, token_rows(3))["perplexity"].value)
