"""The contract: rows are found by key, and only with the positions that they hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdframe.api import BadRow, Cache, DamagedError, RowPositions
from kdframe.testing.cache_kit import CacheKit
from kdframe.testing.cache_rows import (
    IDENTITY,
    LENGTH,
    RECORD_BYTES,
    at,
    holds,
    key,
    record,
    row,
    rows,
    write,
)

_POSITIONS = st.sets(st.integers(0, LENGTH - 1), max_size=8).map(sorted)
# A test method that subclasses share is one function with several objects.
_PROPERTY = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)


class Storing(CacheKit):
    """What is written, found, read and forgotten."""

    def test_rows_come_back_in_the_order_asked_and_as_often(self, cache: Cache) -> None:
        write(cache, range(20))
        write(cache, range(20, 50))
        order = np.random.default_rng(0).integers(0, 50, 80).tolist()
        expected = np.concatenate([record(i) for i in order])
        np.testing.assert_array_equal(cache.read(rows(order)), expected)

    def test_each_row_alone_comes_back_too(self, cache: Cache) -> None:
        write(cache, range(12))
        assert all(holds(cache, i) for i in range(12))

    def test_what_is_read_has_the_shape_of_records(self, cache: Cache) -> None:
        write(cache, range(3))
        for numbers in ([], [1], [2, 0]):
            found = cache.read(rows(numbers))
            positions = sum(len(row(i).positions) for i in numbers)
            assert found.dtype == np.uint8
            assert found.shape == (positions, RECORD_BYTES)

    def test_changing_what_was_read_changes_nothing_that_is_stored(self, cache: Cache) -> None:
        write(cache, range(2))
        for numbers in ([0], [0, 1]):
            found = cache.read(rows(numbers))
            if found.flags.writeable:
                found[:] = 0
        assert holds(cache, 0)
        assert holds(cache, 1)

    def test_it_is_there_when_the_cache_is_opened_again(self, tmp_path: Path) -> None:
        write(self.open(tmp_path / "cache"), range(9))
        again = self.open(tmp_path / "cache")
        assert again.missing(rows(range(10))) == [9]
        assert all(holds(again, i) for i in range(9))

    def test_writing_again_stores_nothing_more(self, cache: Cache) -> None:
        write(cache, range(5))
        before = cache.info()
        write(cache, range(5))
        assert cache.info() == before
        write(cache, [*range(3, 7), 5, 6])
        assert cache.info()["rows"] == 7

    def test_writing_nothing_is_well(self, cache: Cache) -> None:
        cache.write([], [])
        assert cache.info()["rows"] == 0
        assert cache.missing([]) == []
        assert cache.verify() == (0, [])

    # -------------------------------------------------------------------------- positions
    @_PROPERTY
    @given(written=st.lists(_POSITIONS, max_size=4), asked=_POSITIONS)
    def test_a_row_is_missing_unless_its_positions_are_covered(
        self, tmp_path_factory: pytest.TempPathFactory, written: list[list[int]], asked: list[int]
    ) -> None:
        cache = self.open(tmp_path_factory.mktemp("cover") / "cache")
        for positions in written:
            cache.write([at(0, positions)], [record(0, positions)])
        absent = cache.missing([at(0, asked)]) == [0]
        if any(set(asked) <= set(positions) for positions in written):
            assert not absent
        if not written or not set(asked) <= set().union(*written):
            assert absent
        if absent:
            with pytest.raises(DamagedError, match=key(0).hex()):
                cache.read([at(0, asked)])
        else:
            np.testing.assert_array_equal(cache.read([at(0, asked)]), record(0, asked))

    @_PROPERTY
    @given(st.lists(st.tuples(st.integers(0, 4), _POSITIONS), min_size=1, max_size=8))
    def test_any_subset_of_positions_selects_its_records(
        self, tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[int, list[int]]]
    ) -> None:
        cache = self.open(tmp_path_factory.mktemp("subset") / "cache")
        every = list(range(LENGTH))
        cache.write([at(i, every) for i in range(5)], [record(i, every) for i in range(5)])
        wanted = [at(i, positions) for i, positions in asked]
        assert cache.missing(wanted) == []
        expected = np.concatenate([record(i, positions) for i, positions in asked])
        np.testing.assert_array_equal(cache.read(wanted), expected)

    def test_a_row_that_grows_serves_what_it_served_before(self, cache: Cache) -> None:
        few, more = [1, 5], [1, 3, 5]
        cache.write([at(0, few)], [record(0, few)])
        assert cache.missing([at(0, few), at(0, more), at(1, few)]) == [1, 2]
        cache.write([at(0, more)], [record(0, more)])
        assert cache.missing([at(0, few), at(0, more)]) == []
        np.testing.assert_array_equal(cache.read([at(0, few)]), record(0, few))
        np.testing.assert_array_equal(cache.read([at(0, more)]), record(0, more))

    def test_a_row_without_positions_is_a_row(self, cache: Cache) -> None:
        empty = at(0, [])
        assert cache.missing([empty]) == [0]
        cache.write([empty, row(1)], [record(0, []), record(1)])
        assert cache.missing([empty, at(0, [1])]) == [1]
        assert cache.read([empty]).shape == (0, RECORD_BYTES)
        assert cache.verify() == (2, [])

    def test_keys_that_share_a_half_are_not_mixed_up(self, cache: Cache) -> None:
        keys = [
            b"12345678aaaaaaaa",
            b"12345678bbbbbbbb",
            b"87654321aaaaaaaa",
            b"12345678" + bytes(8),
        ]
        same = [RowPositions(k, np.zeros(1, np.int32)) for k in keys]
        values = [np.full((1, RECORD_BYTES), v, np.uint8) for v in range(4)]
        cache.write(same[:1], values[:1])
        assert cache.missing(same) == [1, 2, 3]
        cache.write(same, values)
        assert cache.read(same)[:, 0].tolist() == [0, 1, 2, 3]

    def test_an_absent_row_or_position_is_named(self, cache: Cache) -> None:
        write(cache, [0])
        with pytest.raises(DamagedError, match=key(1).hex()):
            cache.read(rows([0, 1]))
        with pytest.raises(DamagedError, match=key(0).hex()):
            cache.read([at(0, range(LENGTH))])

    # --------------------------------------------------------------- forgetting and counting
    def test_a_dropped_row_is_missing_until_it_is_written_again(self, tmp_path: Path) -> None:
        cache = self.open(tmp_path / "cache")
        write(cache, range(4))
        other = self.open(tmp_path / "cache")
        cache.drop(
            [BadRow(key(2).hex(), shard, "test") for shard in self.shards(tmp_path / "cache")]
        )
        for store in (cache, other, self.open(tmp_path / "cache")):
            assert store.missing(rows(range(4))) == [2]
            assert store.info()["rows"] == 3
            assert sorted(r.key for r in store.stored()) == sorted(key(i) for i in (0, 1, 3))
        write(cache, range(4))
        assert all(holds(other, i) for i in range(4))

    def test_a_row_is_at_its_places_until_it_is_dropped_from_them(self, cache: Cache) -> None:
        write(cache, range(4))
        write(cache, range(4, 6))
        places = cache.places(key(2))
        assert places
        assert cache.places(key(7)) == []
        cache.drop([BadRow(key(2).hex(), place, "test") for place in places])
        assert cache.places(key(2)) == []
        assert cache.missing(rows(range(6))) == [2]

    def test_every_row_is_told_once_with_all_that_it_holds(self, cache: Cache) -> None:
        assert list(cache.stored()) == []
        write(cache, range(6))
        cache.write([at(2, range(LENGTH))], [record(2, range(LENGTH))])
        found = {r.key: r.positions.tolist() for r in cache.stored()}
        wanted = {key(i): row(i).positions.tolist() for i in range(6)}
        assert found == {**wanted, key(2): list(range(LENGTH))}
        assert len(cache.stored()) == 6

    def test_the_counts_are_plain_data(self, cache: Cache) -> None:
        write(cache, range(10))
        info = json.loads(json.dumps(cache.info()))
        positions = sum(len(record(i)) for i in range(10))
        assert (info["rows"], info["positions"]) == (10, positions)
        assert info["bytes"] >= positions * RECORD_BYTES
        assert info["shards"] >= 1
        assert info["identity"] == IDENTITY

    def test_it_says_where_it_is(self, cache: Cache) -> None:
        assert isinstance(cache.folder, Path)
        assert isinstance(cache.place, str)
        assert cache.place
