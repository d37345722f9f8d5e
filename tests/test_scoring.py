"""A model measured row by row: the same figures however the rows are batched."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdframe.output_layer import Halves
from kdframe.scoring import score
from tests.run_kit import filled, load, token_rows


@pytest.fixture(scope="module")
def rows():
    return token_rows(10, longest=30)


@pytest.fixture(scope="module")
def model(student_folder):
    return load(student_folder)


def hard(logits, labels, targets):
    assert targets is None
    return {"hard": F.cross_entropy(logits, labels, reduction="none"), "one": labels * 0 + 1}


@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_each_row_has_the_sum_that_it_has_alone(model, rows, batch_tokens, chunk):
    halves = Halves(model)
    halves.chunk = lambda: chunk
    sums = score(halves, rows, hard, pad_id=0, batch_tokens=batch_tokens)
    assert sums["one"].tolist() == [len(rows.positions(i)) for i in range(10)]
    for i in range(10):
        ids = torch.tensor(rows.row(i).astype(np.int64))[None]
        at = torch.tensor(rows.positions(i).astype(np.int64))
        logits = model(ids).logits[0, at]
        wanted = F.cross_entropy(logits, ids[0, at + 1], reduction="sum").item()
        assert sums["hard"][i] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(student_folder, rows, training):
    model = load(student_folder, attention_dropout=0.5).train(training)
    state = torch.get_rng_state()
    one, other = (
        score(Halves(model), rows, hard, pad_id=0, batch_tokens=64)["hard"] for _ in range(2)
    )
    assert np.array_equal(one, other)
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mode_comes_back_from_a_measure_that_raises(student_folder, rows):
    model = load(student_folder).train()

    def broken(logits, labels, targets):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        score(Halves(model), rows, broken, pad_id=0, batch_tokens=64)
    assert model.training


def test_every_position_meets_its_own_targets(tmp_path, model, teacher_folder, rows):
    """The teacher as its own student: it agrees with itself everywhere."""
    teacher = load(teacher_folder)
    cache = filled(tmp_path, teacher, [rows])

    def best(logits, labels, targets):
        return {"same": (logits.argmax(-1) == targets.ids[:, 0]).float()}

    for chunk in (3, 1000):
        halves = Halves(teacher)
        halves.chunk = lambda chunk=chunk: chunk
        sums = score(halves, rows, best, pad_id=0, batch_tokens=64, cache=cache)
        assert sums["same"].tolist() == [len(rows.positions(i)) for i in range(10)]


def test_of_no_rows_there_are_no_sums(model, rows):
    assert score(Halves(model), rows.select([]), hard, pad_id=0, batch_tokens=64) == {}
