"""Where a cache of Arrow files may live, and what this machine keeps of one that is elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
from pathlib import Path

import fsspec
import pytest
from pydantic import ValidationError

from kdframe.api import BadRow, DamagedError, InputError
from kdframe.testing import cache_rows as kit
from kdframe.testing.cache_damage import flip_a_bit
from kdframe_arrow_cache import ArrowCache


def opened(url: Path | str, scratch: Path | None = None, **options: str):
    config = ArrowCache(url=str(url), storage_options=options)
    return config.open(kit.spec(scratch or Path("unused")))


@pytest.fixture
def elsewhere(tmp_path):
    """An address that is no folder, and the objects under it."""
    yield f"memory:/{tmp_path}/far"
    fsspec.filesystem("memory").store.clear()


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


# ------------------------------------------------------------------------------ addresses
def test_without_an_address_it_lives_in_the_folder_of_the_spec(tmp_path):
    spec = dataclasses.replace(kit.spec(tmp_path), folder=tmp_path / "default")
    cache = ArrowCache().open(spec)
    kit.write(cache, [1])
    assert cache.folder == tmp_path / "default"
    assert cache.place == str(tmp_path / "default")
    assert kit.holds(opened(tmp_path / "default"), 1)


def test_a_path_is_relative_to_the_file_that_names_it(tmp_path):
    read = ArrowCache.model_validate({"url": "near"}, context={"base": tmp_path})
    assert read.url == str(tmp_path / "near")


@pytest.mark.parametrize("address", ["s3://bucket/a/b", "memory://x", "file:///a"])
def test_an_address_stays_as_it_is(tmp_path, address):
    assert ArrowCache.model_validate({"url": address}, context={"base": tmp_path}).url == address


def test_a_file_address_is_a_folder(tmp_path):
    cache = opened(f"file://{tmp_path}/cache")
    kit.write(cache, [1])
    assert cache.folder == tmp_path / "cache"
    assert kit.holds(opened(tmp_path / "cache"), 1)


def test_an_unknown_scheme_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cache\.url 'nowhere://x'.*nowhere"):
        opened("nowhere://x")


@pytest.mark.skipif(bool(importlib.util.find_spec("s3fs")), reason="s3fs is installed")
def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cache\.url 's3://bucket/x': .*s3fs"):
        opened("s3://bucket/x")


def test_options_are_words():
    with pytest.raises(ValidationError):
        ArrowCache(storage_options={"a": ["b"]})


def test_a_server_that_does_not_answer_is_no_damage(tmp_path):
    with pytest.raises(InputError, match=r"ftp://127\.0\.0\.1:9/x.*"):
        opened("ftp://127.0.0.1:9/x", tmp_path / "local")


# ------------------------------------------------------------------------------ elsewhere
def test_what_lives_elsewhere_is_copied_once_and_mapped(tmp_path, elsewhere):
    kit.write(opened(elsewhere), range(3))
    reader = opened(elsewhere, tmp_path / "local")
    assert reader.place == elsewhere
    assert reader.folder.parent == tmp_path
    assert reader.missing(kit.rows(range(4))) == [3]
    assert not reader.folder.exists()  # the index is enough to say what is missing
    assert kit.holds(reader, 1)
    copy = only(reader.folder, "copies/shards/*.arrow")
    before = copy.stat().st_mtime_ns
    assert kit.holds(opened(elsewhere, tmp_path / "local"), 2)
    assert copy.stat().st_mtime_ns == before


def test_copies_of_two_addresses_are_not_mixed_up(tmp_path, elsewhere):
    folders = {opened(f"{elsewhere}/{i}", tmp_path / "local").folder for i in range(3)}
    assert len(folders) == 3
    assert tmp_path / "local" not in folders  # where a cache in a folder may be begun one day


def test_a_damaged_copy_is_noticed_and_verify_copies_anew(tmp_path, elsewhere):
    kit.write(opened(elsewhere), range(3))
    cache = opened(elsewhere, tmp_path / "local")
    assert kit.holds(cache, 1)
    copy = only(cache.folder, "copies/shards/*.arrow")
    whole = copy.read_bytes()
    at = whole.find(kit.record(1).tobytes())
    copy.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    cache = opened(elsewhere, tmp_path / "local")
    with pytest.raises(DamagedError, match=kit.key(1).hex()):
        cache.read([kit.row(1)])
    assert cache.verify() == (3, [])
    assert kit.holds(cache, 1)


def test_a_short_copy_is_fetched_again(tmp_path, elsewhere):
    kit.write(opened(elsewhere), range(3))
    cache = opened(elsewhere, tmp_path / "local")
    assert kit.holds(cache, 1)
    os.truncate(only(cache.folder, "copies/shards/*.arrow"), 100)
    assert kit.holds(opened(elsewhere, tmp_path / "local"), 1)


def test_one_flipped_bit_elsewhere_is_noticed_or_harmless(tmp_path, elsewhere):
    kit.write(opened(elsewhere), range(6))
    files, rng = fsspec.filesystem("memory"), random.Random(5)
    names = files.find(f"{tmp_path}/far")
    assert len(names) == 3
    noticed = 0
    for case in range(60):
        name = names[case % 3]
        whole = files.cat_file(name)
        hurt = tmp_path / "hurt"
        hurt.write_bytes(whole)
        flip_a_bit(hurt, rng)
        files.pipe_file(name, hurt.read_bytes())
        try:
            noticed += bool(what_is_wrong(opened(elsewhere, tmp_path / f"local{case}")))
        except (DamagedError, InputError):
            noticed += 1
        files.pipe_file(name, whole)
    assert noticed >= 40


def what_is_wrong(cache) -> list[BadRow]:
    """What `verify` says; rows that it does not tell of must read as they were written."""
    bad = cache.verify()[1]
    told = {entry.row for entry in bad} | {
        kit.key(i).hex() for i in cache.missing(kit.rows(range(6)))
    }
    assert all(kit.holds(cache, i) for i in range(6) if kit.key(i).hex() not in told)
    return bad
