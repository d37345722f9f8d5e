"""However rows are arranged, each meets what the teacher said of it alone, or it is an error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe import batching
from kdframe.api import DamagedError
from kdframe_codecs import Dense
from tests.run_kit import filled, load, token_rows

V, ROWS = 400, 14


@pytest.fixture(scope="module")
def rows():
    return token_rows(ROWS, longest=30)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load(teacher_folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory, teacher, rows):
    folder = tmp_path_factory.mktemp("cache")
    return filled(folder, teacher, [rows], Dense(precision="float32"))


@pytest.fixture(scope="module")
def truth(teacher, rows):
    """By key: the whole row's log-probabilities `[tokens, V]`, the row alone."""
    found = {}
    with torch.no_grad():
        for i in range(len(rows)):
            ids = torch.from_numpy(rows.row(i).astype(np.int64))[None]
            found[rows.key(i)] = torch.log_softmax(teacher(ids).logits[0], dim=-1)
    return found


arrangements = st.fixed_dictionaries(
    {
        "chosen": st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=2 * ROWS),
        "batch_size": st.integers(1, 5),
        "packing": st.sampled_from([None, 30, 64]),
        "seed": st.integers(0, 99),
        "epoch": st.integers(0, 3),
        "world": st.integers(1, 3),
        "fewer": st.integers(0, 2**16),
    }
)


def arranged(split, how):
    """The rows, of whose positions a part counts, as workers' batches."""
    fewer = np.random.default_rng(how["fewer"]).random(len(split.counted)) < 0.3
    counted = split.counted & ~fewer
    counted[split.offsets[:-1]] = split.counted[split.offsets[:-1]]
    split = type(split)(**{**vars(split), "counted": counted})
    order = batching.epoch_rows(split, seed=how["seed"], epoch=how["epoch"])
    size = {"batch_size": how["batch_size"], "seed": how["seed"], "epoch": how["epoch"]}
    if how["packing"] is None:
        batches = batching.batches(split, order, **size)
    else:
        batches = batching.packed(split, order, max_length=how["packing"], **size)
    for batch in batches:
        for rank in range(how["world"]):
            if batch[rank :: how["world"]]:
                yield split, batch[rank :: how["world"]]


@settings(max_examples=60, deadline=None)
@given(arrangements)
def test_every_position_meets_its_own_prediction(store, rows, truth, how):
    seen = 0
    for split, batch in arranged(rows.select(how["chosen"]), how):
        one = batching.collate(split, batch, pad_id=0)
        targets = store.targets([split.request(i) for i in one.rows], V)
        flat = torch.from_numpy(one.input_ids).flatten()
        assert len(targets) == len(one.counted) == len(one.labels)
        for n, place in enumerate(one.counted.tolist()):
            number = int(one.position_ids.flatten()[place])
            right = truth[split.key(one.rows[one.row_of[n]])][number]
            torch.testing.assert_close(targets.log_probs[n], right, rtol=1e-4, atol=1e-4)
            assert int(flat[place + 1]) == one.labels[n]
        seen += len(one.counted)
    assert seen >= len(how["chosen"])


@settings(max_examples=30, deadline=None)
@given(arrangements, st.integers(0, 2**31))
def test_a_row_that_is_another_is_an_error(store, rows, how, where):
    """One token changed anywhere in the split: no batch with it can be read."""
    split = rows.select(how["chosen"])
    ids = split.ids.copy()
    ids[where % len(ids)] = (ids[where % len(ids)] + 1) % V
    changed = type(split)(**{**vars(split), "ids": ids})
    strangers = {changed.key(i) for i in range(len(changed))} - {
        rows.key(i) for i in range(len(rows))
    }
    assert strangers
    for parts, batch in arranged(changed, how):
        requests = [parts.request(i) for sequence in batch for i in sequence]
        if strangers & {request.key for request in requests}:
            with pytest.raises(DamagedError, match="not there"):
                store.targets(requests, V)
        else:
            store.targets(requests, V)


def test_a_position_that_was_not_stored_is_an_error(store, rows):
    request = rows.request(0)
    absent = np.setdiff1d(np.arange(len(rows.row(0))), request.positions).astype(np.int32)
    with pytest.raises(DamagedError, match="with all positions asked"):
        store.targets([type(request)(request.key, absent[-1:])], V)
