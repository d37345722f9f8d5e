"""The cache under killed writers, what they leave, and a full disk."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mmap_cache_kit as kit
import pytest

from kdframe.api import InputError, durable

ROWS = 24


def test_killed_at_any_moment_a_writer_loses_nothing_that_it_acknowledged(tmp_path, all_faults):
    rng = random.Random(3)
    folder = tmp_path / "cache"
    acknowledged: set[int] = set()
    found: set[int] = set()
    kills = 40 if all_faults else 12
    for start in range(0, 1000 * kills, 1000):
        command = [sys.executable, kit.__file__, str(folder), str(start), str(start + 1000), "2"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "open\n"
            time.sleep(rng.uniform(0, 0.2))
            writer.send_signal(signal.SIGKILL)
            told = [int(line) for line in writer.stdout.read().splitlines()]
        assert writer.returncode == -signal.SIGKILL
        acknowledged |= {i + j for i in told for j in (0, 1)}
        cache = kit.open_cache(folder)
        new = range(start, start + 1000)
        found |= set(new) - {start + i for i in cache.missing([kit.row(i) for i in new])}
        assert acknowledged <= found
        assert len(found - acknowledged) <= 2 * (start // 1000 + 1)  # announced, not yet told
        assert all(kit.holds(cache, i) for i in found)
    assert len(acknowledged) > kills
    assert kit.open_cache(folder).verify() == (len(found), [])
    print(f"{kills} kills of writers: {len(acknowledged)} rows acknowledged, none lost")


def test_a_torn_last_line_is_no_damage_and_the_next_commit_removes_it(tmp_path):
    copy = tmp_path / "cache"
    kit.write(kit.open_cache(copy), range(ROWS))
    journal = copy / "shards.jsonl"
    with open(journal, "ab") as file:
        file.write(b'{"shard": "sha')
    cache = kit.open_cache(copy)
    assert cache.verify() == (ROWS, [])
    kit.write(cache, [100])
    assert kit.open_cache(copy).verify() == (ROWS + 1, [])


def age(path: Path) -> None:
    """As if nobody had touched it for two hours."""
    then = time.time() - 7200
    os.utime(path, (then, then))


def leave(folder: Path) -> list[Path]:
    """What killed writers leave: files aside, and a shard that was not announced."""
    paths = [
        folder / ".shard-0123456789ab.bin.89abcdef.tmp",
        folder / ".kept-codec.bin.89abcdef.tmp",
        folder / ".shards.jsonl.89abcdef.tmp",
        folder / "shard-0123456789ab.bin",
    ]
    for path in paths:
        path.write_bytes(b"half")
    return paths


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path):
    folder = tmp_path / "cache"
    kit.write(kit.open_cache(folder), range(ROWS))
    cache = kit.open_cache(folder)
    left = leave(folder)
    kit.open_cache(folder)
    assert all(path.exists() for path in left)  # their writers may live
    for path in [*left, *folder.glob("shard-*.bin")]:
        age(path)
    assert cache.verify() == (ROWS, [])
    assert not any(path.exists() for path in left)
    assert all(kit.holds(kit.open_cache(folder), i) for i in range(ROWS))


def test_files_of_others_are_left_however_old(tmp_path):
    kit.open_cache(tmp_path)
    others = [tmp_path / name for name in ("plan.json", ".plan.json.89abcdef.tmp", "shard-1.bin")]
    for path in others:
        path.touch()
        age(path)
    kit.open_cache(tmp_path)
    assert all(path.exists() for path in others)


def test_nothing_is_removed_while_the_journal_is_damaged(tmp_path):
    kit.write(kit.open_cache(tmp_path), range(ROWS))
    journal = tmp_path / "shards.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b"rows", b"rowz"))
    (shard,) = tmp_path.glob("shard-*.bin")
    age(shard)
    cache = kit.open_cache(tmp_path)
    assert cache.verify()[0] == 0
    assert shard.exists()
    cache.drop(cache.verify()[1])
    assert cache.verify() == (0, [])
    assert not shard.exists()


def test_a_writer_whose_file_was_taken_for_a_leftover_writes_it_again(tmp_path):
    kit.open_cache(tmp_path)
    with durable.lock(tmp_path / ".lock"):
        writer = threading.Thread(target=kit.write, args=(kit.open_cache(tmp_path), [1]))
        writer.start()
        while not (written := list(tmp_path.glob("shard-*.bin"))):
            time.sleep(0.01)
        written[0].unlink()
    writer.join(60)
    assert kit.holds(kit.open_cache(tmp_path), 1)
    assert kit.open_cache(tmp_path).verify() == (1, [])


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
