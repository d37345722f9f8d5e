"""The cache under flipped bits, cut files and lost shards."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import mmap_cache_kit as kit
import numpy as np
import pytest

from kdframe.api import BadRow, DamagedError, KdframeError
from kdframe_mmap_cache.shard import Shard

ROWS = 24
KEPT = b"what the codec was fitted to" * 5


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """Three shards of eight rows, and something kept."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    for start in range(0, ROWS, 8):
        kit.write(kit.open_cache(folder), range(start, start + 8))
    kit.open_cache(folder).keep("codec", KEPT)
    return folder


@pytest.fixture
def copy(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "copy"))


def complaint(work: Callable[[], object]) -> str:
    """What the error says that `work` raises; nothing if it raises none."""
    try:
        work()
    except KdframeError as error:
        return str(error)
    return ""


def what_happens(folder: Path, hurt: str) -> set[str]:
    """Use a cache whose file `hurt` is damaged in every way. What noticed.

    Wrong bytes, or a message that does not say where the damage is, fail the test.
    """
    if said := complaint(lambda: kit.open_cache(folder)):
        assert hurt in said
        return {"open"}
    cache = kit.open_cache(folder)
    noticed = set()
    missing = cache.missing([kit.row(i) for i in range(ROWS)])
    for i in range(ROWS):
        if said := complaint(lambda i=i: cache.read([kit.row(i)])):
            assert kit.row(i).key.hex() in said
            assert hurt in said or not hurt.startswith("shard-")
            noticed.add("read")
        else:
            assert kit.holds(cache, i), f"row {i} is silently wrong"
            assert i not in missing
    if said := complaint(lambda: cache.kept("codec")):
        assert hurt in said
        noticed.add("kept")
    else:
        assert cache.kept("codec") == KEPT
    bad = cache.verify()[1]
    assert {one.shard for one in bad} <= {hurt}
    assert bool(bad) == bool(noticed) or hurt == "shards.jsonl"  # a cut line may be unfinished
    return noticed | ({"verify"} if bad else set())


def rows_of(folder: Path, name: str) -> list[int]:
    """The numbers of the rows of a sound shard."""
    shard = Shard(folder, name, kit.RECORD_BYTES)
    return [i for i in range(ROWS) if kit.row(i).key in {shard.key(r) for r in shard.live_rows()}]


def repair(folder: Path) -> list[int]:
    """What `cache verify --repair` does; the rows that had to be computed again."""
    cache = kit.open_cache(folder)
    cache.drop(cache.verify()[1])
    again = cache.missing([kit.row(i) for i in range(ROWS)])
    kit.write(cache, again)
    assert all(kit.holds(cache, i) for i in range(ROWS))
    assert cache.verify()[1] == []
    return again


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flip_record(folder: Path, number: int) -> Path:
    """Flip a bit in the middle of a row's records."""
    needle = kit.record(number).tobytes()
    for path in folder.glob("shard-*.bin"):
        at = path.read_bytes().find(needle)
        if at >= 0:
            flip(path, 8 * (at + len(needle) // 2))
            return path
    raise AssertionError("not found")


def index_bytes(rows: int) -> int:
    """Bytes of a shard that say which rows there are: header, keys, starts, checksums."""
    return 64 + rows * (16 + 8 + 8) + 8


def damaged_copies(filled: Path, tmp_path: Path, cases: int, seed: int):
    """`cases` copies of the folder, each with the path in it that is to be damaged, in turn."""
    rng = random.Random(seed)
    files = [path for path in sorted(filled.iterdir()) if path.stat().st_size]
    assert len(files) == 6
    for case in range(cases):
        folder = Path(shutil.copytree(filled, tmp_path / str(case)))
        yield folder, folder / files[case % len(files)].name, rng
        shutil.rmtree(folder)


def repaired(folder: Path, path: Path, filled: Path) -> list[int]:
    """Repair a folder whose file `path` is damaged; the rows that were computed again."""
    if path.name.startswith("kept-"):
        cache = kit.open_cache(folder)
        with pytest.raises(DamagedError, match=path.name):
            cache.drop(cache.verify()[1])
        shutil.copy(filled / path.name, path)
    return repair(folder)


def test_one_flipped_bit_anywhere_is_noticed_or_harmless_and_mended_by_its_rows_alone(
    filled, tmp_path, all_faults
):
    cases = 1000 if all_faults else 300
    noticed = 0
    for folder, path, rng in damaged_copies(filled, tmp_path, cases, seed=7):
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        how = what_happens(folder, path.name)
        noticed += bool(how)
        if "open" in how:
            assert path.name == "manifest.json"
            continue
        again = repaired(folder, path, filled) if how else []
        if path.name.startswith("shard-") and bit // 8 >= index_bytes(8):
            assert len(again) <= 1
        elif path.name.startswith("shard-"):
            assert again == rows_of(filled, path.name)
        else:
            assert len(again) == (0 if path.name.startswith("kept-") else 8)
    assert noticed > 0.9 * cases  # the rest fell on padding or on white space
    print(f"{cases} flips: {noticed} noticed, {cases - noticed} harmless")


def test_a_file_cut_at_any_place_is_noticed_or_harmless_and_mended_by_its_rows_alone(
    filled, tmp_path, all_faults
):
    cases = 200 if all_faults else 50
    noticed = 0
    for folder, path, rng in damaged_copies(filled, tmp_path, cases, seed=8):
        before = path.read_bytes()
        os.truncate(path, rng.randrange(len(before)))
        how = what_happens(folder, path.name)
        noticed += bool(how)
        if not how:
            left = path.read_bytes()
            # Without its last line's end.
            assert (path.name, len(left)) == ("manifest.json", len(before) - 1)
            continue
        if "open" in how:
            assert path.name == "manifest.json"
            continue
        again = repaired(folder, path, filled)
        if path.name.startswith("shard-"):
            assert again == rows_of(filled, path.name)
    print(f"{cases} cut files: {noticed} noticed, {cases - noticed} harmless")


def test_damage_names_the_shard_the_row_and_the_remedy(copy):
    path = flip_record(copy, 5)
    key = kit.row(5).key.hex()
    cache = kit.open_cache(copy)
    with pytest.raises(DamagedError) as caught:
        cache.read([kit.row(4), kit.row(5)])
    for word in (path.name, key, "kdframe cache verify --repair"):
        assert word in str(caught.value)
    assert cache.verify() == (ROWS, [BadRow(key, path.name, "the checksum disagrees")])
    assert repair(copy) == [5]


def test_a_good_copy_of_a_damaged_row_serves(copy):
    cache = kit.open_cache(copy)
    wide = np.arange(100, dtype=np.int32)
    row = type(kit.row(5))(kit.row(5).key, wide)
    records = np.zeros((100, kit.RECORD_BYTES), np.uint8)
    records[kit.row(5).positions] = kit.record(5)
    cache.write([row], [records])
    flip_record(copy, 5)
    assert kit.holds(kit.open_cache(copy), 5)


def test_verify_reads_the_disk_also_after_a_good_read(copy):
    cache = kit.open_cache(copy)
    assert kit.holds(cache, 5)
    flip_record(copy, 5)
    assert [bad.row for bad in cache.verify()[1]] == [kit.row(5).key.hex()]


def test_a_lost_shard_costs_its_rows_only(copy):
    path = min(copy.glob("shard-*.bin"))
    path.unlink()
    cache = kit.open_cache(copy)
    assert len(cache.missing([kit.row(i) for i in range(ROWS)])) == 8
    count, (bad,) = cache.verify()
    assert (bad.row, bad.shard, count) == ("", path.name, 16)
    assert len(repair(copy)) == 8


def test_a_shard_is_not_followed_out_of_the_folder(copy, tmp_path):
    path = min(copy.glob("shard-*.bin"))
    outside = path.rename(tmp_path / "outside.bin")
    path.symlink_to(outside)
    assert len(kit.open_cache(copy).missing([kit.row(i) for i in range(ROWS)])) == 8


def test_a_shard_that_was_not_announced_does_not_exist(copy):
    journal = copy / "shards.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    cache = kit.open_cache(copy)
    assert cache.missing([kit.row(i) for i in range(ROWS)]) == list(range(16, ROWS))
    assert cache.verify() == (16, [])


def test_a_damaged_line_is_told_and_mended(copy):
    journal = copy / "shards.jsonl"
    flip(journal, 8 * 30)
    cache = kit.open_cache(copy)
    assert cache.missing([kit.row(i) for i in range(ROWS)]) == list(range(8))
    assert cache.verify() == (16, [BadRow("", "shards.jsonl", "line 1 is damaged")])
    assert repair(copy) == list(range(8))
