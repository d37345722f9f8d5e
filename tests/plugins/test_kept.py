"""What is kept beside the records, and what a cache says that it holds."""

from __future__ import annotations

import mmap_cache_kit as kit
import numpy as np
import pytest

from kdframe.api import BadRow, DamagedError, RowPositions


@pytest.fixture
def cache(tmp_path):
    return kit.open_cache(tmp_path / "cache")


# ---------------------------------------------------------------------------------- kept
def test_what_is_kept_comes_back_in_another_process(cache):
    cache.keep("codec", b"weights")
    cache.keep("a-1_B", b"")
    other = kit.open_cache(cache.folder)
    assert other.kept("codec") == b"weights"
    assert other.kept("a-1_B") == b""
    assert other.kept_names() == ["a-1_B", "codec"]


def test_nothing_is_kept_under_a_name_that_was_not_used(cache):
    assert cache.kept("codec") is None
    assert cache.kept_names() == []


def test_the_first_to_come_stays(cache):
    cache.keep("codec", b"first")
    kit.open_cache(cache.folder).keep("codec", b"second")
    assert cache.kept("codec") == b"first"


@pytest.mark.parametrize("name", ["", "../codec", "a/b", "a.b", "a b", "é", "x" * 101, "a\n"])
def test_a_name_that_could_leave_the_folder_is_refused(cache, name):
    with pytest.raises(ValueError, match="no name"):
        cache.keep(name, b"data")


def test_records_and_what_is_kept_do_not_mix(cache):
    kit.write(cache, [1])
    cache.keep("codec", b"data")
    assert cache.verify() == (1, [])
    assert kit.holds(kit.open_cache(cache.folder), 1)


@pytest.mark.parametrize("left", [0, 7, 8, 14])
def test_a_kept_file_that_was_cut_is_damage(cache, left):
    cache.keep("codec", b"weights")
    path = cache.folder / "kept-codec.bin"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DamagedError, match=r"kept-codec\.bin is damaged"):
        cache.kept("codec")


def test_damage_is_told_by_verify_and_cannot_be_dropped(cache):
    kit.write(cache, [1, 2])
    cache.keep("codec", b"weights")
    path = cache.folder / "kept-codec.bin"
    path.write_bytes(path.read_bytes() + b"!")
    bad = BadRow("", path.name, "the checksum disagrees")
    assert cache.verify() == (2, [bad])
    shard = next(cache.folder.glob("shard-*")).name
    with pytest.raises(DamagedError, match=r"kept-codec\.bin .*restore it from a copy"):
        cache.drop([bad, BadRow(kit.row(1).key.hex(), shard, "")])
    assert path.exists()
    assert cache.verify() == (1, [bad])  # the row was dropped all the same


# --------------------------------------------------------------------------------- stored
def held(cache) -> dict[bytes, list[int]]:
    return {row.key: row.positions.tolist() for row in cache.stored()}


def test_every_row_is_stored_once_with_its_positions(cache):
    assert cache.stored() == []
    kit.write(cache, range(5))
    kit.write(kit.open_cache(cache.folder), range(3, 9))
    assert held(cache) == {kit.row(i).key: kit.row(i).positions.tolist() for i in range(9)}


def test_a_row_stored_twice_holds_the_positions_of_both(cache):
    key = b"k" * 16
    for numbers in ([1, 5], [2, 5, 9]):
        positions = np.array(numbers, np.int32)
        cache.write([RowPositions(key, positions)], [np.zeros((len(numbers), 12), np.uint8)])
    assert held(cache) == {key: [1, 2, 5, 9]}
    assert cache.stored()[0].positions.dtype == np.int32


def test_dropped_and_damaged_rows_are_not_stored(cache):
    kit.write(cache, range(4))
    (shard,) = cache.folder.glob("shard-*")
    cache.drop([BadRow(kit.row(0).key.hex(), shard.name, "")])
    data = shard.read_bytes()
    at = data.find(kit.record(2).tobytes())
    shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert held(kit.open_cache(cache.folder)).keys() == {kit.row(1).key, kit.row(3).key}
