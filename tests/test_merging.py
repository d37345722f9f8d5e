"""Caches that several machines filled become one."""

import numpy as np
import pytest

from kdframe import caching, merging
from kdframe.api import DamagedError, TeacherShape
from kdframe.errors import InputError
from kdframe.progress import Quiet
from kdframe.teacher_cache import cache_spec, open_cache
from kdframe_arrow_cache import ArrowCache
from kdframe_codecs import TopK
from kdframe_mmap_cache import MmapCache
from tests.codec_kit import States
from tests.run_kit import filled, load, token_rows

V, H = 400, 32
IDENTITY = {"teacher": "any"}


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load(teacher_folder)


@pytest.fixture(scope="module")
def rows():
    return token_rows(12)


def target_at(folder, codec=None):
    settings = MmapCache(codec=codec or TopK(k=16))
    return open_cache(settings, IDENTITY, TeacherShape(V, H), folder)


def merge(store, folders, codec=None, **identity):
    settings = MmapCache(codec=codec or TopK(k=16))
    spec = cache_spec(settings, IDENTITY | identity, TeacherShape(V, H), store.cache.folder.parent)
    return merging.merge(store.cache, settings, spec, folders, Quiet())


def part(folder, teacher, rows, which, codec=None):
    """The folder of a cache that holds some of the rows."""
    return filled(folder, teacher, [rows.select(which)], codec).cache.folder


def damage(folder):
    """Flip the last bit of its latest shard; the shard's name."""
    shard = max(folder.glob("shard-*.bin"), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return shard.name


def test_the_rows_of_all_are_there_as_they_were(tmp_path, teacher, rows):
    store = target_at(tmp_path / "target")
    parts = [
        filled(tmp_path / "a", teacher, [rows.select(range(5))]),
        filled(tmp_path / "b", teacher, [rows.select(range(3, 12))]),
    ]
    one, other = merge(store, [part.cache.folder for part in parts])
    assert (one.copied, one.already, one.damaged) == (5, 0, [])
    assert one.folder == parts[0].cache.place
    assert (other.copied, other.already, other.damaged) == (7, 2, [])
    assert store.missing([rows]) == []
    for i in range(12):
        request, source = rows.request(i), parts[i >= 5]
        np.testing.assert_array_equal(store.cache.read([request]), source.cache.read([request]))


def test_a_second_merge_copies_nothing(tmp_path, teacher, rows):
    store = target_at(tmp_path / "target")
    folder = part(tmp_path / "a", teacher, rows, range(5))
    merge(store, [folder])
    before = store.cache.info()
    (again,) = merge(store, [folder])
    assert (again.copied, again.already) == (0, 5)
    assert store.cache.info() == before


def test_a_row_with_more_positions_is_copied(tmp_path, teacher, rows):
    store = filled(tmp_path / "target", teacher, [rows])
    wider = type(rows)(**{**vars(rows), "counted": rows.counted | True})
    wider.counted[wider.offsets[1:] - 1] = False
    (done,) = merge(store, [part(tmp_path / "a", teacher, wider, range(12))])
    grown = [len(rows.positions(i)) < rows.lengths[i] - 1 for i in range(12)]
    assert done.copied == sum(grown) > 0
    assert store.missing([wider]) == []


def test_memory_holds_a_piece_at_a_time(tmp_path, teacher, rows, monkeypatch):
    monkeypatch.setattr(merging, "PIECE_BYTES", 1)
    store = target_at(tmp_path / "target")
    (done,) = merge(store, [part(tmp_path / "a", teacher, rows, range(12))])
    assert done.copied == 12
    assert store.cache.info()["shards"] == 12


def test_a_damaged_row_stays_where_it_is_and_the_others_come(tmp_path, teacher, rows):
    store = target_at(tmp_path / "target")
    folder = part(tmp_path / "a", teacher, rows, range(12))
    shard = damage(folder)
    (done,) = merge(store, [folder])
    (bad,) = done.damaged
    assert (bad.shard, done.copied) == (shard, 11)
    assert [request.key.hex() for request in store.missing([rows])] == [bad.row]


def test_a_row_that_only_reading_finds_damaged_is_left_too(tmp_path, teacher, rows):
    """Of a piece with such a row each row is tried."""

    class Torn(type(target_at(tmp_path / "x").cache)):
        def verify(self):
            return 12, []

        def read(self, asked):
            if any(row.key == rows.key(4) for row in asked):
                raise DamagedError("torn")
            return super().read(asked)

    source = filled(tmp_path / "a", teacher, [rows]).cache
    source.__class__ = Torn
    store = target_at(tmp_path / "target")
    done = merging._copy(store.cache, source, store.codec.record_bytes, Quiet())
    assert done.copied == 11
    assert [(bad.row, bad.reason) for bad in done.damaged] == [(rows.key(4).hex(), "torn")]


def test_caches_of_arrow_files_too(tmp_path, teacher, rows):
    """They tell of damaged rows as of others until they are read."""
    settings, shape = ArrowCache(codec=TopK(k=16)), TeacherShape(V, H)
    stores = [open_cache(settings, IDENTITY, shape, tmp_path / name) for name in ("a", "target")]
    caching.fill(stores[0], [rows], lambda: teacher, batch_tokens=64, progress=Quiet())
    row, source = rows.request(6), stores[0].cache
    (shard,) = source.places(row.key)
    path = source.folder / "shards" / shard
    data = bytearray(path.read_bytes())
    data[data.index(source.read([row])[0].tobytes())] ^= 1
    path.write_bytes(data)
    spec = cache_spec(settings, IDENTITY, shape, tmp_path)
    (done,) = merging.merge(stores[1].cache, settings, spec, [source.folder], Quiet())
    assert (done.copied, [bad.row for bad in done.damaged]) == (11, [row.key.hex()])


# ------------------------------------------------------------------------------------- refusals
def test_another_identity_is_refused_by_name_before_anything_is_copied(tmp_path, teacher, rows):
    good = part(tmp_path / "a", teacher, rows, range(5))
    bad = open_cache(MmapCache(codec=TopK(k=16)), {"teacher": "other"}, TeacherShape(V), tmp_path)
    store = target_at(tmp_path / "target")
    with pytest.raises(InputError, match=r"holds another teacher \(other there, any wanted\)"):
        merge(store, [good, bad.cache.folder])
    assert store.cache.info()["rows"] == 0


def test_what_a_codec_was_fitted_to_must_be_the_same(tmp_path, teacher, rows):
    codec = States()
    one = part(tmp_path / "a", teacher, rows, range(5), codec)
    other = part(tmp_path / "b", teacher, rows, range(5, 12), codec)
    store = target_at(tmp_path / "target", codec)
    assert sum(done.copied for done in merge(store, [one, other], codec)) == 12
    assert store.codec.ready  # the fit came along
    assert len(store.targets([rows.request(0)], V)) == len(rows.positions(0))
    strange = open_cache(MmapCache(codec=codec), IDENTITY, TeacherShape(V, H), tmp_path / "c")
    strange.cache.keep("codec", b"another fit")
    with pytest.raises(InputError, match=r"what is kept as 'codec' is not what .* keeps"):
        merge(store, [strange.cache.folder], codec)


def test_a_folder_that_is_no_cache_is_refused_and_stays_as_it_is(tmp_path):
    store = target_at(tmp_path / "target")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(InputError, match="no cache is there; mend the path"):
            merge(store, [folder])
    assert not (tmp_path / "none").exists()
    assert not list((tmp_path / "empty").iterdir())
    with pytest.raises(InputError, match="is the experiment's own cache"):
        merge(store, [store.cache.folder])
