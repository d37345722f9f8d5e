"""Order and packing: pure functions of the rows' keys, the seed and the epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdframe.batching import TokenRows, batches, collate, epoch_rows, packed, planned

PAD = 99


def make(ids: list[list[int]], weights: list[float] | None = None) -> TokenRows:
    """Rows in which the positions of odd tokens count."""
    return TokenRows.join(
        ids,
        [[token % 2 == 1 for token in row[:-1]] + [False] for row in ids],
        taught=[len(row) % 3 != 0 for row in ids],
        weights=weights or [1.0] * len(ids),
        text_bytes=[10 * len(row) for row in ids],
    )


token_lists = st.lists(st.integers(0, 50), min_size=2, max_size=12)
row_lists = st.lists(token_lists, min_size=1, max_size=40)
distinct_rows = st.lists(token_lists, min_size=1, max_size=40, unique_by=tuple)
seeds = st.integers(0, 3)


# ----------------------------------------------------------------------------------------- rows
def test_a_row_knows_its_ids_positions_and_key():
    rows = make([[1, 2, 3], [5, 4, 7, 7]])
    assert len(rows) == 2
    assert rows.lengths.tolist() == [3, 4]
    assert rows.row(1).tolist() == [5, 4, 7, 7]
    assert rows.positions(1).tolist() == [0, 2]
    assert rows.positions(1).dtype == np.int32
    assert rows.counted_tokens == 3
    assert len(rows.key(1)) == 16
    assert rows.request(1).key == rows.key(1)
    assert rows.request(1).positions.tolist() == [0, 2]


def test_a_key_is_of_the_ids_alone():
    first, second = make([[1, 2, 3]]), make([[9, 9], [1, 2, 3]], weights=[1, 0.5])
    assert first.key(0) == second.key(1) != second.key(0)


def test_no_rows_are_rows_too():
    empty = make([])
    assert len(empty) == empty.counted_tokens == 0
    assert len(empty.select([])) == 0
    assert epoch_rows(empty, seed=0, epoch=0).tolist() == []
    assert planned(empty.lengths, [], tokens=8) == []


@given(row_lists, st.data())
def test_selected_rows_are_the_same_rows(ids, data):
    rows = make(ids)
    index = data.draw(st.lists(st.integers(0, len(ids) - 1)))
    chosen = rows.select(index)
    assert [chosen.key(n) for n in range(len(chosen))] == [rows.key(i) for i in index]
    for n, i in enumerate(index):
        assert chosen.positions(n).tolist() == rows.positions(i).tolist()
        assert chosen.text_bytes[n] == rows.text_bytes[i]
        assert chosen.taught[n] == rows.taught[i]


# ---------------------------------------------------------------------------------------- order
@given(row_lists, seeds, seeds)
def test_an_epoch_has_every_row_once(ids, seed, epoch):
    order = epoch_rows(make(ids), seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(len(ids)))


@given(distinct_rows, st.randoms(), seeds)
def test_the_order_of_reading_changes_nothing(ids, random, epoch):
    shuffled = random.sample(ids, len(ids))
    made = []
    for version in (ids, shuffled):
        rows = make(version)
        settings = {"batch_size": 3, "seed": 0, "epoch": epoch}
        order = epoch_rows(rows, seed=0, epoch=epoch)
        plain = batches(rows, order, **settings)
        tight = packed(rows, order, max_length=20, **settings)
        made.append(
            [
                [[[version[i] for i in sequence] for sequence in batch] for batch in plan]
                for plan in (plain, tight)
            ]
        )
    assert made[0] == made[1]


def test_seed_and_epoch_change_the_order():
    rows = make([[i, i + 1] for i in range(30)])
    orders = [epoch_rows(rows, seed=s, epoch=e).tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] == epoch_rows(rows, seed=0, epoch=0).tolist()


@given(st.integers(0, 1000), st.integers(1, 5))
def test_a_whole_weight_is_met_in_every_epoch(epoch, weight):
    rows = make([[i, i + 1] for i in range(20)], weights=[weight] * 20)
    counts = Counter(epoch_rows(rows, seed=0, epoch=epoch).tolist())
    assert set(counts.values()) == {weight}


def test_a_fraction_takes_another_share_each_epoch_and_every_row_in_time():
    rows = make([[i, i + 1] for i in range(400)], weights=[0.25] * 400)
    epochs = [epoch_rows(rows, seed=0, epoch=epoch).tolist() for epoch in range(4)]
    assert sorted(row for epoch in epochs for row in epoch) == list(range(400))
    assert all(70 < len(epoch) < 130 for epoch in epochs)


def test_a_weight_between_repeats_some_rows():
    rows = make([[i, i + 1] for i in range(400)], weights=[1.5] * 400)
    counts = Counter(epoch_rows(rows, seed=0, epoch=0).tolist())
    assert set(counts.values()) == {1, 2}
    assert 150 < sum(count == 2 for count in counts.values()) < 250


# -------------------------------------------------------------------------------------- batches
@given(row_lists, st.integers(1, 5), seeds)
def test_batches_have_every_entry_once_and_only_the_last_is_smaller(ids, batch_size, epoch):
    rows = make(ids)
    order = epoch_rows(rows, seed=0, epoch=epoch)
    plan = batches(rows, order, batch_size=batch_size, seed=0, epoch=epoch)
    assert sorted(i for batch in plan for (i,) in batch) == list(range(len(ids)))
    assert all(len(batch) == batch_size for batch in plan[:-1])
    assert len(plan[-1]) <= batch_size


def test_batches_hold_rows_of_like_length_in_shuffled_order():
    random = np.random.default_rng(0)
    rows = make([[1] * int(size) for size in random.integers(2, 100, 400)])
    order = epoch_rows(rows, seed=0, epoch=0)
    plan = batches(rows, order, batch_size=8, seed=0, epoch=0)
    padded = sum(max(rows.lengths[i] for (i,) in batch) * len(batch) for batch in plan)
    assert padded < 1.05 * rows.lengths.sum()
    longest = [max(rows.lengths[i] for (i,) in batch) for batch in plan]
    assert longest != sorted(longest, reverse=True)
    assert plan != batches(rows, order, batch_size=8, seed=0, epoch=1)


@given(row_lists, st.integers(1, 4), st.integers(2, 30))
def test_packed_sequences_hold_every_row_once_within_the_length(ids, batch_size, max_length):
    rows = make(ids)
    order = epoch_rows(rows, seed=0, epoch=0)
    plan = packed(rows, order, max_length=max_length, batch_size=batch_size, seed=0, epoch=0)
    sequences = [sequence for batch in plan for sequence in batch]
    assert sorted(i for sequence in sequences for i in sequence) == list(range(len(ids)))
    for sequence in sequences:
        assert sum(rows.lengths[i] for i in sequence) <= max_length or len(sequence) == 1
    assert all(len(batch) == batch_size for batch in plan[:-1])


def test_packing_fills_sequences():
    random = np.random.default_rng(0)
    rows = make([[1] * int(size) for size in random.integers(2, 60, 400)])
    order = epoch_rows(rows, seed=0, epoch=0)
    plan = packed(rows, order, max_length=128, batch_size=4, seed=0, epoch=0)
    sequences = sum(len(batch) for batch in plan)
    assert rows.lengths.sum() > 0.95 * 128 * sequences


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 64))
def test_planned_passes_stay_within_their_tokens(lengths, tokens):
    index = list(range(len(lengths)))[::2]
    groups = planned(np.array(lengths), index, tokens=tokens)
    assert sorted(i for group in groups for i in group) == index
    for group in groups:
        assert lengths[group[0]] * len(group) <= tokens or len(group) == 1
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)


def test_planned_passes_are_filled():
    assert planned([3, 5, 2, 2], [0, 1, 2, 3], tokens=6) == [[1], [0, 2], [3]]


# -------------------------------------------------------------------------------------- collate
def test_a_packed_batch_in_full():
    rows = make([[1, 3, 5], [7, 8], [2, 9, 4, 6]])
    made = collate(rows, ((0, 1), (2,)), pad_id=PAD)
    assert made.input_ids.tolist() == [[1, 3, 5, 7, 8], [2, 9, 4, 6, PAD]]
    assert made.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert made.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert made.segment_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]]
    assert made.counted.tolist() == [0, 1, 3, 6]
    assert made.labels.tolist() == [3, 5, 8, 4]
    assert made.row_of.tolist() == [0, 0, 1, 2]
    assert made.rows == (0, 1, 2)
    assert made.taught.tolist() == [False, False, True, True]
    kinds = {name: getattr(made, name).dtype for name in ("input_ids", "labels", "counted")}
    assert set(kinds.values()) == {np.dtype(np.int64)}
    assert made.segment_ids.dtype == np.int32


def learnt(rows: TokenRows, plan) -> Counter:
    """What is learnt, by row key, position and label."""
    seen: Counter = Counter()
    for batch in plan:
        made = collate(rows, batch, pad_id=PAD)
        positions = made.position_ids.reshape(-1)[made.counted]
        # What the cache is asked for must line up with what is counted.
        asked = [rows.request(i) for i in made.rows]
        assert np.concatenate([a.positions for a in asked]).tolist() == positions.tolist()
        keys = [asked[n].key for n in made.row_of]
        after = made.input_ids.reshape(-1)[made.counted + 1]
        assert after.tolist() == made.labels.tolist()
        seen.update(zip(keys, positions.tolist(), made.labels.tolist(), strict=True))
    return seen


@given(row_lists, st.integers(1, 5), st.integers(2, 40))
def test_padding_and_packing_learn_exactly_the_same(ids, batch_size, max_length):
    rows = make(ids)
    order = epoch_rows(rows, seed=0, epoch=0)
    settings = {"batch_size": batch_size, "seed": 0, "epoch": 0}
    expected = Counter(
        (rows.key(i), int(t), ids[i][t + 1]) for i in range(len(ids)) for t in rows.positions(i)
    )
    assert learnt(rows, [((i,),) for i in order.tolist()]) == expected
    assert learnt(rows, batches(rows, order, **settings)) == expected
    assert learnt(rows, packed(rows, order, max_length=max_length, **settings)) == expected


@pytest.mark.parametrize("pad_id", [0, 99])
def test_the_padding_token_is_never_seen(pad_id):
    rows = make([[1, 3, 5, 7], [1, 2]])
    made = collate(rows, ((0,), (1,)), pad_id=pad_id)
    assert (made.input_ids[made.attention_mask == 0] == pad_id).all()
    assert (made.attention_mask.reshape(-1)[made.counted] == 1).all()
    assert ((made.segment_ids >= 0) == (made.attention_mask == 1)).all()
