"""What is special to the cache of Arrow files: marks, and shards that anybody can read."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from kdframe.api import BadRow, InputError, cache_tools
from kdframe.testing import cache_rows as kit
from kdframe_arrow_cache import ArrowCache, marks


def opened(url: Path | str, scratch: Path | None = None, **options: str):
    config = ArrowCache(url=str(url), storage_options=options)
    return config.open(kit.spec(scratch or Path("unused")))


@pytest.fixture
def cache(tmp_path):
    return opened(tmp_path / "cache")


@pytest.fixture
def elsewhere(tmp_path):
    """An address that is no folder, and the objects under it."""
    yield f"memory:/{tmp_path}/far"
    fsspec.filesystem("memory").store.clear()


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


# --------------------------------------------------------------------------------- shards
def test_a_shard_is_an_arrow_file_that_anybody_can_read(cache):
    kit.write(cache, range(5))
    with pa.memory_map(str(only(cache.folder, "shards/*.arrow"))) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.num_rows == 5
    for i, entry in enumerate(table.to_pylist()):
        assert entry["key"] == kit.key(i)
        assert entry["positions"] == kit.row(i).positions.tolist()
        assert b"".join(entry["records"]) == kit.record(i).tobytes()


def test_a_single_row_is_a_view_of_the_file(cache):
    kit.write(cache, range(3))
    first, again = cache.read([kit.row(1)]), cache.read([kit.row(1)])
    assert not first.flags.writeable
    assert np.shares_memory(first, again)


def test_a_reader_of_a_folder_loads_neither_arrow_nor_torch(cache):
    kit.write(cache, [1])
    code = (
        "import sys; from pathlib import Path; from kdframe.testing import cache_rows as kit;"
        "from kdframe_arrow_cache import ArrowCache;"
        f"cache = ArrowCache(url={str(cache.folder)!r}).open(kit.spec(Path('unused')));"
        "assert kit.holds(cache, 1);"
        "assert not {'torch', 'pyarrow', 'fsspec'} & set(sys.modules), 'loaded too much'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_lost_shard_costs_its_rows_only(cache, tmp_path):
    kit.write(cache, range(4))
    lost = only(cache.folder, "shards/*.arrow")
    kit.write(cache, range(4, 8))
    lost.unlink()
    cache = opened(tmp_path / "cache")
    assert cache.missing(kit.rows(range(8))) == [0, 1, 2, 3]
    assert cache.verify() == (
        4,
        [BadRow("", lost.name, "cannot be read (No such file or directory)")],
    )
    cache.drop(cache.verify()[1])
    kit.write(cache, range(8))
    assert cache.verify() == (8, [])


def test_a_shard_is_not_followed_out_of_the_folder(cache, tmp_path):
    kit.write(cache, range(2))
    path = only(cache.folder, "shards/*.arrow")
    outside = path.rename(tmp_path / "outside")
    path.symlink_to(outside)
    assert opened(tmp_path / "cache").missing(kit.rows([0, 1])) == [0, 1]


# ---------------------------------------------------------------------------------- marks
def test_a_shard_without_its_mark_does_not_exist(cache, tmp_path):
    kit.write(cache, range(2))
    only(cache.folder, "marks/*").unlink()
    cache = opened(tmp_path / "cache")
    assert cache.missing(kit.rows([0, 1])) == [0, 1]
    assert cache.verify() == (0, [])


def test_a_damaged_mark_is_told_and_forgotten(cache, tmp_path):
    kit.write(cache, range(2))
    mark = only(cache.folder, "marks/*")
    mark.write_bytes(mark.read_bytes().replace(b'"rows": 2', b'"rows": 3'))
    cache = opened(tmp_path / "cache")
    assert cache.verify() == (0, [BadRow("", mark.name, "the mark is damaged")])
    cache.drop(cache.verify()[1])
    assert opened(tmp_path / "cache").verify() == (0, [])
    kit.write(cache, range(2))
    assert kit.holds(opened(tmp_path / "cache"), 1)


@pytest.mark.parametrize(
    "name", ["../shard-0123456789ab.arrow", "/tmp/shard-0123456789ab.arrow", "..", "other.arrow"]
)
def test_a_mark_that_leads_out_of_the_folder_is_damage(cache, tmp_path, name):
    kit.write(cache, range(2))
    mark = only(cache.folder, "marks/*")
    value = cache_tools.opened(mark.read_bytes())
    mark.write_bytes(marks.written({**value, "shard": name}))
    cache = opened(tmp_path / "cache")
    assert cache.missing(kit.rows([0, 1])) == [0, 1]
    assert [bad.shard for bad in cache.verify()[1]] == [mark.name]


def test_a_mark_that_announces_the_shard_of_another_is_damage(cache, tmp_path):
    kit.write(cache, range(2))
    mark = only(cache.folder, "marks/*")
    mark.rename(mark.with_name("shard-0123456789ab.json"))
    ((bad),) = opened(tmp_path / "cache").verify()[1]
    assert bad.shard == "shard-0123456789ab.json"
    assert "announces" in bad.reason


@pytest.mark.parametrize("content", [{}, {"drop": 3}, {"drop": [["a"]]}, {"shard": 1}])
def test_a_mark_that_says_something_else_is_damage(cache, tmp_path, content):
    (cache.folder / "marks").mkdir()
    (cache.folder / "marks" / "drop-0123456789ab.json").write_bytes(marks.written(content))
    assert len(opened(tmp_path / "cache").verify()[1]) == 1


def test_a_shard_of_a_newer_format_is_refused(cache, tmp_path):
    kit.write(cache, range(2))
    mark = only(cache.folder, "marks/*")
    value = {**cache_tools.opened(mark.read_bytes()), "version": 2, "more": "of it"}
    mark.write_text(json.dumps(cache_tools.sealed(value)))
    with pytest.raises(InputError, match=r"marks/shard-.*format version 2.*reads up to 1"):
        opened(tmp_path / "cache")


# ------------------------------------------------------------------- beginning, and a full disk
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file"):
        opened(tmp_path / "thesis.tex")


def test_a_cache_that_lost_its_manifest_is_not_begun_anew(tmp_path, cache, elsewhere):
    kit.write(cache, [1])
    (cache.folder / "manifest.json").unlink()
    kit.write(opened(elsewhere), [1])
    fsspec.filesystem("memory").rm(f"{tmp_path}/far/manifest.json")
    for address in (cache.folder, elsewhere):
        with pytest.raises(InputError, match="lost its manifest"):
            opened(address)


def test_a_folder_whose_maker_was_killed_is_finished(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.0123abcd.tmp").write_text("{")
    kit.write(opened(tmp_path), [1])
    assert kit.holds(opened(tmp_path), 1)


def fill_the_disk(cache) -> int:
    """Write until there is no more space; the number of rows written."""
    written = 0
    with contextlib.suppress(InputError):
        while written < 10**5:
            kit.write(cache, range(written, written + 200))
            written += 200
    return written


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small disk")
def test_a_full_disk_keeps_what_was_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        written = fill_the_disk(opened(disk / "cache"))
        cache = opened(disk / "cache")
        assert 200 <= written < 10**5
        assert cache.verify() == (written, [])
        spare = disk / "spare"
        spare.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        with pytest.raises(InputError, match=r"disk.*needed"):
            kit.write(cache, [written])
        spare.unlink()
        kit.write(cache, [written])
        assert opened(disk / "cache").verify() == (written + 1, [])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
