"""Numbers in bytes: whole bytes, the widest numbers with the most levels, one look-up a byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe_codecs.byte_groups import KINDS, BytePacker, Group, allocate, levels, order

COUNTS = sorted({count for kind in KINDS for count in kind})


def groups():
    one = st.builds(Group, st.sampled_from(KINDS), st.integers(1, 5))
    return st.lists(one, min_size=1, max_size=6)


def unpacked(packer: BytePacker, packed: np.ndarray) -> np.ndarray:
    numbers = np.full((len(packed), packer.places), np.nan, np.float32)
    packer.unpack(packed, numbers)
    return numbers


@settings(max_examples=80, deadline=None)
@given(groups(), st.integers(0, 5), st.sampled_from([0.1, 1.0, 100.0]), st.integers(0, 2**20))
def test_each_number_becomes_its_nearest_level(parts, n, size, seed):
    packer = BytePacker.fitted(parts)
    numbers = np.random.default_rng(seed).normal(size=(n, packer.places)).astype(np.float32) * size
    packed = packer.pack(numbers)
    assert packed.shape == (n, packer.size)
    found = unpacked(packer, packed)
    counts = np.concatenate([np.tile(np.array(g.kind), g.size) for g in parts])
    for place, count in enumerate(counts):
        table = levels(int(count))[0]
        nearest = np.abs(numbers[:, place, None] - table).min(-1, initial=np.inf)
        np.testing.assert_allclose(np.abs(numbers[:, place] - found[:, place]), nearest, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(groups(), st.integers(0, 2**20))
def test_a_packer_that_was_kept_reads_the_same(parts, seed):
    packer = BytePacker.fitted(parts)
    again = BytePacker.from_tensors(packer.tensors())
    packed = np.random.default_rng(seed).integers(0, 256, (3, packer.size)).astype(np.uint8)
    np.testing.assert_array_equal(unpacked(packer, packed), unpacked(again, packed))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.integers(1, 100), st.floats(0, 12))
def test_every_byte_is_given_out_and_the_widest_get_the_most(count, size, fall):
    variances = np.exp(-np.linspace(0, fall, count))
    parts = allocate(variances, size)
    assert sum(g.size for g in parts) == size
    ranks = order(parts, count)
    places = np.concatenate([np.tile(np.array(g.kind), g.size) for g in parts])
    used = ranks >= 0
    assert sorted(ranks[used]) == list(range(min(count, len(places))))
    by_rank = places[used][np.argsort(ranks[used])]
    assert (np.diff(by_rank) <= 0).all()


def test_a_steep_fall_is_served_unevenly_and_a_flat_one_evenly():
    flat = allocate(np.ones(64), 32)
    assert flat == [Group((16, 16), 32)]
    steep = allocate(np.exp(-np.linspace(0, 8, 64)), 32)
    assert {len(g.kind) for g in steep} > {2} or any(g.kind == (64, 4) for g in steep)


@pytest.mark.parametrize("count", COUNTS)
def test_levels_ascend_and_are_where_the_error_is_least(count):
    """Each is the mean of what it stands for, so together they leave variance unexplained."""
    table, error = levels(count)
    assert (np.diff(table) > 0).all()
    np.testing.assert_allclose(table, -table[::-1], atol=1e-3)
    assert 0 < error < 0.5
    assert error < 6 / count**1.8
