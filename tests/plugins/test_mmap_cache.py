"""The cache folder as a backend: what is stored, found, refused, and forgotten."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mmap_cache_kit as kit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe.api import BadRow, DamagedError, InputError, RowPositions, durable
from kdframe_mmap_cache import MmapCache
from kdframe_mmap_cache.cache import MmapCacheFolder
from kdframe_mmap_cache.journal import Journal


@pytest.fixture
def cache(tmp_path: Path) -> MmapCacheFolder:
    return kit.open_cache(tmp_path / "cache")


def announce(cache: MmapCacheFolder, name: str) -> None:
    """Write a line of the journal as a writer would, for any name."""
    with durable.lock(cache.folder / ".lock"):
        Journal(cache.folder).append({"shard": name, "rows": 1, "bytes": 1, "index": "0" * 16})


def positions(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def test_rows_come_back_in_the_order_asked(cache):
    kit.write(cache, range(20))
    kit.write(cache, range(20, 50))
    order = np.random.default_rng(0).permutation(50).tolist()
    expected = np.concatenate([kit.record(i) for i in order])
    np.testing.assert_array_equal(cache.read([kit.row(i) for i in order]), expected)


def test_a_new_process_finds_them_too(cache):
    kit.write(cache, range(9))
    assert all(kit.holds(kit.open_cache(cache.folder), i) for i in range(9))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_subset_of_positions_selects_its_records(tmp_path_factory, data):
    cache = kit.open_cache(tmp_path_factory.mktemp("c"))
    kit.write(cache, range(5))
    wanted, expected = [], []
    for i in data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=8)):
        chosen = sorted(data.draw(st.sets(st.integers(0, len(kit.record(i)) - 1))))
        wanted.append(RowPositions(kit.row(i).key, kit.row(i).positions[chosen]))
        expected.append(kit.record(i)[chosen])
    assert cache.missing(wanted) == []
    np.testing.assert_array_equal(cache.read(wanted), np.concatenate(expected))


def test_rows_are_missing_until_their_positions_are_covered(cache):
    key = b"k" * 16
    first, wider = RowPositions(key, positions(1, 5)), RowPositions(key, positions(1, 3, 5))
    other = RowPositions(b"o" * 16, positions(1))
    assert cache.missing([first, other]) == [0, 1]
    cache.write([first], [np.full((2, 12), 1, np.uint8)])
    assert cache.missing([first, wider, other]) == [1, 2]
    with pytest.raises(DamagedError, match=key.hex()):
        cache.read([wider])
    cache.write([wider], [np.full((3, 12), 2, np.uint8)])
    assert cache.missing([first, wider]) == []
    assert (cache.read([wider]) == 2).all()
    assert len(cache.read([first])) == 2


def test_keys_that_agree_in_their_first_half_are_not_mixed_up(cache):
    rows = [RowPositions(b"12345678" + end, positions(0)) for end in (b"aaaaaaaa", b"bbbbbbbb")]
    cache.write(rows[:1], [np.full((1, 12), 1, np.uint8)])
    assert cache.missing(rows) == [1]
    cache.write(rows, [np.full((1, 12), v, np.uint8) for v in (1, 2)])
    assert cache.read(rows)[:, 0].tolist() == [1, 2]


def test_a_row_written_again_costs_nothing(cache):
    kit.write(cache, range(5))
    before = cache.info()
    kit.write(cache, range(5))
    assert cache.info() == before
    kit.write(cache, [*range(3, 7), 5, 6])
    assert cache.info()["rows"] == 7


def test_what_does_not_fit_the_contract_is_refused(cache):
    with pytest.raises(ValueError, match="records"):
        cache.write([kit.row(1)], [kit.record(1)[:, :-1]])
    with pytest.raises(ValueError, match="records"):
        cache.write([RowPositions(b"short", positions(0))], [np.zeros((1, 12), np.uint8)])
    assert cache.info()["rows"] == 0


def test_info_counts(cache):
    assert cache.info()["bytes_per_position"] == 0
    kit.write(cache, range(10))
    info = cache.info()
    held = sum(len(kit.record(i)) for i in range(10))
    files = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert (info["rows"], info["positions"], info["shards"]) == (10, held, 1)
    assert info["bytes"] == files
    assert info["bytes_per_position"] == files / held
    assert info["identity"] == kit.IDENTITY
    assert info["codec"] == {"kind": "topk", "k": 2}


def test_the_config_opens_its_own_folder_or_that_of_the_spec(tmp_path):
    spec = dataclasses.replace(kit.spec(), folder=tmp_path / "default")
    assert MmapCache(codec={"kind": "topk"}).open(spec).folder == tmp_path / "default"
    own = MmapCache(codec={"kind": "topk"}, folder=tmp_path / "own").open(spec)
    assert own.folder == tmp_path / "own"


def test_a_dropped_row_is_missing_for_every_process_and_can_be_written_again(cache):
    kit.write(cache, range(4))
    other = kit.open_cache(cache.folder)
    shard = next(cache.folder.glob("shard-*")).name
    cache.drop([BadRow(kit.row(2).key.hex(), shard, "test")])
    rows = [kit.row(i) for i in range(4)]
    for store in (cache, other, kit.open_cache(cache.folder)):
        assert store.missing(rows) == [2]
        assert store.info()["rows"] == 3
    kit.write(cache, range(4))
    assert all(kit.holds(other, i) for i in range(4))


def test_only_a_key_can_be_dropped(cache):
    with pytest.raises(ValueError, match="hexadecimal"):
        cache.drop([BadRow("zz", "shard-0123456789ab.bin", "")])
    with pytest.raises(ValueError, match="hexadecimal"):
        cache.drop([BadRow("abcd", "shard-0123456789ab.bin", "")])


def test_two_processes_write_at_once_and_nothing_is_lost(tmp_path):
    folder = tmp_path / "cache"
    command = [sys.executable, kit.__file__, str(folder)]
    writers = [
        subprocess.Popen([*command, str(first), str(first + 60), "3"], stdout=subprocess.DEVNULL)
        for first in (0, 100)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    cache = kit.open_cache(folder)
    assert cache.info()["shards"] == 40
    assert all(kit.holds(cache, i) for i in [*range(60), *range(100, 160)])
    assert cache.verify() == (120, [])


def test_a_shard_is_announced_under_the_lock(cache):
    with durable.lock(cache.folder / ".lock"):
        writer = threading.Thread(target=kit.write, args=(kit.open_cache(cache.folder), [1]))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        assert cache.missing([kit.row(1)]) == [0]
    writer.join(10)
    assert kit.holds(cache, 1)


def test_a_reader_sees_each_row_as_soon_as_its_writer_says_so(tmp_path):
    folder = tmp_path / "cache"
    reader = kit.open_cache(folder)
    command = [sys.executable, kit.__file__, str(folder), "0", "40", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "open\n"
        for line in writer.stdout:
            start = int(line)
            assert kit.holds(reader, start)
            assert kit.holds(reader, start + 1)
            known = 40 - len(reader.missing([kit.row(i) for i in range(40)]))
            assert known >= start + 2
    assert writer.returncode == 0


def test_more_shards_than_files_may_be_open_are_read(tmp_path):
    cache = kit.open_cache(tmp_path)
    for i in range(120):
        kit.write(cache, [i])
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "import sys; from pathlib import Path; import mmap_cache_kit as kit\n"
        "cache = kit.open_cache(Path(sys.argv[1]))\n"
        "assert cache.missing([kit.row(i) for i in range(120)]) == []\n"
        "assert all(kit.holds(cache, i) for i in range(120))\n"
        "cache.read([kit.row(i) for i in range(120)])\n"
    )
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=place)


@pytest.mark.parametrize("name", ["../shard-0123456789ab.bin", "/etc/passwd", "shard-1.bin"])
def test_a_journal_that_leads_out_of_the_folder_is_told_by_verify_and_not_followed(cache, name):
    kit.write(cache, [1])
    shutil.copy(next(cache.folder.glob("shard-*")), cache.folder.parent / "shard-0123456789ab.bin")
    announce(cache, name)
    assert cache.missing([kit.row(1), kit.row(2)]) == [1]
    (bad,) = cache.verify()[1]
    assert (bad.row, bad.shard) == ("", name)
    assert "no name of a shard in the folder" in bad.reason
    cache.drop([bad])
    assert kit.open_cache(cache.folder).verify() == (1, [])


def test_a_shard_that_is_a_link_is_told_by_verify_and_not_followed(cache):
    kit.write(cache, [1])
    (shard,) = cache.folder.glob("shard-*")
    shard.symlink_to(shard.rename(cache.folder.parent / "elsewhere.bin"))
    store = kit.open_cache(cache.folder)
    assert store.missing([kit.row(1)]) == [0]
    (bad,) = store.verify()[1]
    assert "is a link, which may lead out of the folder" in bad.reason
    with pytest.raises(DamagedError, match=f"{kit.row(1).key.hex()}.*\n.*{shard.name} is a link"):
        store.read([kit.row(1)])


def test_a_newer_shard_is_told_by_verify_and_its_rows_are_missing(cache):
    kit.write(cache, [1])
    (shard,) = cache.folder.glob("shard-*")
    data = bytearray(shard.read_bytes())
    data[8] = 2
    shard.write_bytes(data)
    store = kit.open_cache(cache.folder)
    assert store.missing([kit.row(1)]) == [0]
    (bad,) = store.verify()[1]
    assert "install a newer kdframe" in bad.reason


# ------------------------------------------------------------------------------- refusals
def test_another_identity_is_refused_by_the_name_of_its_parts(cache):
    with pytest.raises(InputError) as caught:
        kit.open_cache(cache.folder, teacher_weights="c" * 64, extra="new")
    assert [fault.split(" (")[0] for fault in caught.value.faults] == [
        f"cache folder {cache.folder} holds another extra",
        f"cache folder {cache.folder} holds another teacher_weights",
    ]
    assert "(aaaaaaaaaaaa… there, cccccccccccc… wanted)" in str(caught.value)
    assert "(nothing there, new wanted)" in str(caught.value)
    assert "name another folder or remove it" in str(caught.value)


def test_parts_that_differ_late_are_shown_whole(cache):
    late = "a" * 63 + "b"
    with pytest.raises(InputError, match=f"{'a' * 64} there, {late} wanted"):
        kit.open_cache(cache.folder, teacher_weights=late)


def test_another_record_size_is_refused(cache):
    with pytest.raises(InputError, match="another record_bytes"):
        MmapCacheFolder(cache.folder, dataclasses.replace(kit.spec(), record_bytes=16))


def test_a_newer_format_is_refused(cache):
    path = cache.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(InputError, match="format version 2"):
        kit.open_cache(cache.folder)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        kit.open_cache(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(InputError, match="is a file"):
        kit.open_cache(tmp_path / "thesis.tex")


def test_a_cache_that_lost_its_manifest_is_not_begun_anew(cache):
    kit.write(cache, [1])
    (cache.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="lost its manifest"):
        kit.open_cache(cache.folder)


def test_a_folder_whose_maker_was_killed_is_finished(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.0123abcd.tmp").write_text("{")
    (tmp_path / "shards.jsonl").touch()
    kit.write(kit.open_cache(tmp_path), [1])
    assert kit.holds(kit.open_cache(tmp_path), 1)


def test_a_lost_journal_is_damage(cache):
    kit.write(cache, [1])
    (cache.folder / "shards.jsonl").unlink()
    with pytest.raises(DamagedError, match=r"shards\.jsonl"):
        kit.open_cache(cache.folder)
    with pytest.raises(DamagedError, match=r"shards\.jsonl"):
        cache.missing([kit.row(2)])
