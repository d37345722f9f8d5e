"""The teacher's predictions as training reads them: by row, in order, over the student's ids."""

import numpy as np
import pytest
import torch

from kdframe.api import TeacherShape
from kdframe.errors import DamagedError, InputError
from kdframe.teacher_cache import cache_identity, open_cache
from kdframe_codecs import Dense, TopK
from kdframe_mmap_cache import MmapCache
from tests.run_kit import filled, load, token_rows

V = 400


@pytest.fixture(scope="module")
def rows():
    return token_rows(8)


@pytest.fixture(scope="module")
def store(tmp_path_factory, teacher_folder, rows):
    return filled(tmp_path_factory.mktemp("cache"), load(teacher_folder), [rows])


def test_a_row_meets_its_own_predictions_in_any_company(store, rows):
    alone = [store.targets([rows.request(i)], V) for i in range(8)]
    chance = np.random.default_rng(0)
    for _ in range(5):
        order = chance.permutation(8)[:5].tolist()
        found = store.targets([rows.request(i) for i in order], V)
        assert torch.equal(found.ids, torch.cat([alone[i].ids for i in order]))
        assert torch.equal(found.log_probs, torch.cat([alone[i].log_probs for i in order]))
        assert torch.equal(found.grid_log_z, torch.cat([alone[i].grid_log_z for i in order]))


def test_no_rows_no_targets(store):
    assert store.targets([], V) is None


def test_a_row_that_is_not_there_is_an_error(store):
    stranger = token_rows(1, seed=77).request(0)
    with pytest.raises(DamagedError, match=stranger.key.hex()):
        store.targets([stranger], V)


def test_missing_rows_are_named_once_with_all_the_positions_asked(store, rows):
    assert store.missing([rows]) == []
    fresh = token_rows(2, seed=5)
    half = type(fresh)(**{**vars(fresh), "counted": fresh.counted & False})
    half.counted[fresh.offsets[:-1] + 1] = True
    found = store.missing([fresh, half, rows])
    assert [request.key for request in found] == [fresh.key(0), fresh.key(1)]
    for i, request in enumerate(found):
        wanted = sorted({*fresh.positions(i).tolist(), 1})
        assert request.positions.tolist() == wanted
        assert request.positions.dtype == np.int32


@pytest.mark.parametrize("codec", [TopK(k=16), Dense()])
@pytest.mark.parametrize("width", [350, 400, 450])
def test_the_students_width_is_met(tmp_path, teacher_folder, rows, codec, width):
    """Two models of one tokenizer may pad their vocabularies differently."""
    store = filled(tmp_path, load(teacher_folder), [rows], codec)
    targets = store.targets([rows.request(0), rows.request(1)], width)
    if targets.form == "dense":
        log_probs = targets.at(1.0)
        assert log_probs.shape[-1] == width
        total = log_probs.exp().sum(-1)
    else:
        log_probs, tail = targets.at(1.0)
        assert int(targets.ids.max()) < width
        total = log_probs.exp().sum(-1) + tail.exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=1e-4)


def test_another_teacher_has_another_folder(tmp_path):
    def folder(**changes):
        parts = {"weights": "w", "tokenizer": "t", "template": "c"} | changes
        identity = cache_identity(**parts, settings={"dtype": "auto", "quantize": None})
        return open_cache(MmapCache(), identity, TeacherShape(V), tmp_path).cache.folder

    assert folder() == folder()
    others = {folder(**{name: "x"}) for name in ("weights", "tokenizer", "template")}
    assert len({folder(), *others}) == 4
    codecs = [
        open_cache(MmapCache(codec=TopK(k=k)), {}, TeacherShape(V), tmp_path) for k in (8, 16)
    ]
    assert codecs[0].cache.folder != codecs[1].cache.folder


def test_a_named_folder_of_another_teacher_is_refused(tmp_path):
    named = MmapCache(folder=tmp_path / "mine")
    settings = {"tokenizer": "t", "template": "c", "settings": {"dtype": "auto"}}
    open_cache(named, cache_identity(weights="one", **settings), TeacherShape(V), tmp_path)
    with pytest.raises(InputError, match=r"holds another teacher weights \(one there, two wanted"):
        open_cache(named, cache_identity(weights="two", **settings), TeacherShape(V), tmp_path)
