"""A shard's file: what goes in comes out, and a file that lies is refused before it is believed."""

from __future__ import annotations

import struct
from pathlib import Path

import mmap_cache_kit as kit
import numpy as np
import pytest

from kdframe.api import RowPositions
from kdframe_mmap_cache.shard import Shard, ShardError, pack

NAME = "shard-0123456789ab.bin"


def packed(numbers=range(4)) -> bytearray:
    return pack([kit.row(i) for i in numbers], [kit.record(i) for i in numbers], kit.RECORD_BYTES)


def opened(folder: Path, data: bytes, name: str = NAME) -> Shard:
    (folder / name).write_bytes(data)
    return Shard(folder, name, kit.RECORD_BYTES)


def test_rows_come_out_as_they_went_in(tmp_path):
    shard = opened(tmp_path, packed())
    assert shard.rows == 4
    for i in range(4):
        assert shard.key(i) == kit.row(i).key
        np.testing.assert_array_equal(shard.positions(i), kit.row(i).positions)
        np.testing.assert_array_equal(shard.records(i), kit.record(i))
        assert shard.check(i)


def test_records_are_a_view_that_cannot_be_written(tmp_path):
    records = opened(tmp_path, packed()).records(0)
    assert not records.flags.owndata
    assert not records.flags.writeable


def test_a_row_may_hold_no_position(tmp_path):
    row = RowPositions(b"k" * 16, np.empty(0, np.int32))
    shard = opened(tmp_path, pack([row], [np.empty((0, 12), np.uint8)], 12))
    assert shard.records(0).shape == (0, 12)
    assert shard.check(0)


def test_records_begin_at_a_multiple_of_64(tmp_path):
    data = packed(range(7))
    assert data.find(kit.record(0).tobytes()) % 64 == 0


@pytest.mark.parametrize(
    "name",
    ["../shard-0123456789ab.bin", "/shard-0123456789ab.bin", "shard-0123456789AB.bin",
     "shard-0123456789ab.bin\n", "shard-0123456789ab.bin\0", "shard-0123456789abc.bin", ""],
)  # fmt: skip
def test_only_a_shards_own_name_is_opened(tmp_path, name):
    (tmp_path / NAME).write_bytes(packed())
    with pytest.raises(ShardError, match="no name"):
        Shard(tmp_path / "sub", name, kit.RECORD_BYTES)


@pytest.mark.parametrize("rows", [0, 3, 5, 2**40, 2**64 - 1])
@pytest.mark.parametrize("field", [16, 24])
def test_counts_that_lie_are_refused_by_the_size_of_the_file(tmp_path, rows, field):
    data = packed()
    struct.pack_into("<Q", data, field, rows)
    with pytest.raises(ShardError):
        opened(tmp_path, data)


@pytest.mark.parametrize("size", [0, 10, 63, 64, 200])
def test_a_short_file_is_refused(tmp_path, size):
    with pytest.raises(ShardError):
        opened(tmp_path, packed()[:size])


def test_a_file_that_shrank_since_is_an_error_not_a_crash(tmp_path):
    shard = opened(tmp_path, packed())
    (tmp_path / NAME).write_bytes(packed()[:200])
    with pytest.raises(ShardError, match="no longer"):
        shard.records(0)


def test_another_record_size_is_refused(tmp_path):
    (tmp_path / NAME).write_bytes(packed())
    with pytest.raises(ShardError, match="header"):
        Shard(tmp_path, NAME, 16)


def test_a_folder_in_the_place_of_a_shard_is_refused(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(ShardError):
        Shard(tmp_path, NAME, 12)


def test_a_newer_shard_asks_for_a_newer_kdframe(tmp_path):
    data = packed()
    struct.pack_into("<I", data, 8, 2)
    with pytest.raises(
        ShardError, match=r"newer kdframe .*version is 2, .*install a newer kdframe"
    ):
        opened(tmp_path, data)


@pytest.mark.parametrize("bit", range(0, 8 * (64 + 32 * 4 + 8), 7))
def test_a_flipped_bit_in_header_or_index_is_seen_when_it_is_opened(tmp_path, bit):
    data = packed()
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ShardError):
        opened(tmp_path, data)
