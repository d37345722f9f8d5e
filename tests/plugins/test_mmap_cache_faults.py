"""The cache under kills, flipped bits, cut files and a full disk."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mmap_cache_kit as kit
import numpy as np
import pytest

from kdframe.api import BadRow, DamagedError, InputError, KdframeError

ROWS = 24


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """Three shards of eight rows."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    for start in range(0, ROWS, 8):
        kit.write(kit.open_cache(folder), range(start, start + 8))
    return folder


@pytest.fixture
def copy(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "copy"))


def what_happens(folder: Path) -> set[str]:
    """Use a damaged cache in every way. What noticed; a wrong row fails the test."""
    noticed = set()
    try:
        cache = kit.open_cache(folder)
    except KdframeError:
        return {"open"}
    missing = cache.missing([kit.row(i) for i in range(ROWS)])
    if missing:
        noticed.add("missing")
    for i in set(range(ROWS)) - set(missing):
        try:
            assert kit.holds(cache, i), f"row {i} is silently wrong"
        except DamagedError:
            noticed.add("read")
    if cache.verify()[1]:
        noticed.add("verify")
    assert "read" not in noticed or "verify" in noticed
    return noticed


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


def test_one_flipped_bit_anywhere_is_noticed_or_harmless(filled, tmp_path):
    rng = random.Random(7)
    files = [path for path in sorted(filled.iterdir()) if path.stat().st_size]
    assert len(files) == 5
    noticed = 0
    for case in range(300):
        path = files[case % len(files)]
        folder = Path(shutil.copytree(filled, tmp_path / str(case)))
        flip(folder / path.name, rng.randrange(8 * path.stat().st_size))
        how = what_happens(folder)
        noticed += bool(how)
        if "open" not in how:
            repair(folder)
        shutil.rmtree(folder)
    assert noticed > 270  # the rest fell on padding or on white space


def test_a_file_cut_at_any_place_is_noticed_or_harmless(filled, tmp_path):
    rng = random.Random(8)
    files = [path for path in sorted(filled.iterdir()) if path.stat().st_size]
    for case in range(50):
        path = files[case % len(files)]
        folder = Path(shutil.copytree(filled, tmp_path / str(case)))
        size = rng.randrange(path.stat().st_size)
        os.truncate(folder / path.name, size)
        how = what_happens(folder)
        assert how or size == path.stat().st_size - 1  # a manifest without its last line's end
        if "open" not in how:
            repair(folder)


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


def test_killed_at_any_moment_a_writer_loses_nothing_that_it_acknowledged(tmp_path):
    rng = random.Random(3)
    folder = tmp_path / "cache"
    acknowledged: set[int] = set()
    for start in range(0, 12_000, 1000):
        command = [sys.executable, kit.__file__, str(folder), str(start), str(start + 1000), "2"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "open\n"
            time.sleep(rng.uniform(0, 0.15))
            writer.send_signal(signal.SIGKILL)
            told = [int(line) for line in writer.stdout.read().splitlines()]
        acknowledged |= {i + j for i in told for j in (0, 1)}
        cache = kit.open_cache(folder)
        every = range(start + 1000)
        found = set(every) - set(cache.missing([kit.row(i) for i in every]))
        assert acknowledged <= found
        assert len(found - acknowledged) <= 2 * (start // 1000 + 1)  # announced, not yet told
        assert all(kit.holds(cache, i) for i in found)
    assert len(acknowledged) > 50
    assert kit.open_cache(folder).verify() == (len(found), [])


def test_a_torn_last_line_is_no_damage_and_the_next_commit_removes_it(copy):
    journal = copy / "shards.jsonl"
    with open(journal, "ab") as file:
        file.write(b'{"shard": "sha')
    cache = kit.open_cache(copy)
    assert cache.verify() == (ROWS, [])
    kit.write(cache, [100])
    assert kit.open_cache(copy).verify() == (ROWS + 1, [])


def fill_the_disk(cache) -> int:
    """Write until there is no more space; the number of rows written."""
    written = 0
    with contextlib.suppress(InputError):
        while written < 10**6:
            kit.write(cache, range(written, written + 400))
            written += 400
    return written


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small disk")
def test_a_full_disk_keeps_what_was_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        cache = kit.open_cache(disk / "cache")
        written = fill_the_disk(cache)
        cache = kit.open_cache(disk / "cache")
        assert 1200 <= written < 10**6
        assert cache.verify() == (written, [])
        spare = disk / "spare"
        spare.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        with pytest.raises(InputError, match=r"disk.*needed"):
            kit.write(cache, range(written, written + 1))
        spare.unlink()
        kit.write(cache, range(written, written + 1))
        assert kit.open_cache(disk / "cache").verify() == (written + 1, [])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
