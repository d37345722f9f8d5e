"""Some rows read by the teacher again: a cache that says something else is found out."""

import numpy as np
import pytest
import torch

from kdframe import verifying
from kdframe.api import TeacherShape
from kdframe.output_layer import Halves
from kdframe.progress import Quiet
from kdframe.teacher_cache import open_cache
from kdframe_codecs import Dense, Sampled, TopK
from kdframe_mmap_cache import MmapCache
from tests.codec_kit import Comb, States
from tests.run_kit import filled, load, token_rows

V = 400


CODECS = [TopK(k=16), TopK(k=400), Dense(), Dense(precision="float32"), States(), Comb()]
CODECS += [Sampled(), Sampled(entries=24, temperature=2)]


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load(teacher_folder)


@pytest.fixture(scope="module")
def rows():
    return token_rows(12, longest=40)


def recompute(store, sets, teacher, rows=100, **more):
    more = {"batch_tokens": 64, "progress": Quiet()} | more
    return verifying.recompute(store, sets, lambda: teacher, rows=rows, **more)


def nobody():
    raise AssertionError("the teacher was loaded")


def tampered(folder, teacher, rows, codec, change):
    """A cache written through its public face, with what `change` makes of the true records."""
    true = filled(folder / "true", teacher, [rows], codec)
    shape = TeacherShape(Halves(teacher).vocab_size, teacher.config.hidden_size)
    false = open_cache(MmapCache(codec=codec), {"teacher": "any"}, shape, folder / "false")
    for name in true.cache.kept_names():
        false.cache.keep(name, true.cache.kept(name))
    requests = [rows.request(i) for i in range(len(rows))]
    records = {r.key: np.array(true.cache.read([r])) for r in requests}
    change(records)
    false.cache.write(requests, [records[r.key] for r in requests])
    return false


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.kind}-{c.model_dump()}")
@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_what_capture_wrote_is_what_the_teacher_says(tmp_path, teacher, rows, codec, batch_tokens):
    """Whatever company the rows had when they were captured."""
    store = filled(tmp_path, teacher, [rows], codec)
    found = recompute(store, [rows], teacher, batch_tokens=batch_tokens)
    assert found.rows == 12
    assert found.bad == []
    assert found.largest.within(found.limit)
    assert found.noise.log_prob < 1e-3 or codec.kind == "comb"


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.kind}-{c.model_dump()}")
def test_two_rows_with_each_others_records_are_found(tmp_path, teacher, codec):
    """Every checksum is right: the teacher alone can tell."""
    rows = token_rows(8, longest=30)
    one, other = rows.request(2), rows.request(5)
    size = min(len(one.positions), len(other.positions))

    def swap(records):
        first = records[one.key][:size].copy()
        records[one.key][:size] = records[other.key][:size]
        records[other.key][:size] = first

    store = tampered(tmp_path, teacher, rows, codec, swap)
    assert store.cache.verify() == (8, [])
    found = recompute(store, [rows], teacher)
    assert {bad.row for bad in found.bad} == {one.key.hex(), other.key.hex()}
    for bad in found.bad:
        assert (store.cache.folder / bad.shard).is_file()
        assert "the teacher says something else" in bad.reason


@pytest.mark.parametrize("codec", [TopK(k=16), Dense(), States()], ids=lambda c: c.kind)
def test_one_position_that_is_shifted_by_one_is_found(tmp_path, teacher, codec):
    rows = token_rows(5)
    victim = rows.request(3)

    def shift(records):
        records[victim.key][0] = records[victim.key][1]

    store = tampered(tmp_path, teacher, rows, codec, shift)
    found = recompute(store, [rows], teacher)
    assert [bad.row for bad in found.bad] == [victim.key.hex()]


def test_another_teacher_is_found(tmp_path, teacher, rows):
    other = load(teacher.name_or_path)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight += 0.02
    store = filled(tmp_path, teacher, [rows])
    assert len(recompute(store, [rows], other).bad) == 12


def test_a_dropped_row_is_missing_and_computed_again(tmp_path, teacher):
    rows = token_rows(6)
    victim = rows.request(1)

    def spoil(records):
        records[victim.key][:] = records[victim.key][:1]

    store = tampered(tmp_path, teacher, rows, TopK(k=16), spoil)
    store.cache.drop(recompute(store, [rows], teacher).bad)
    assert [request.key for request in store.missing([rows])] == [victim.key]


def test_the_rows_are_drawn_and_are_others_each_time(tmp_path, teacher, rows):
    store = filled(tmp_path, teacher, [rows])
    read = []

    class Counts(Quiet):
        def stage(self, name, total, unit):
            read.append(total)
            return super().stage(name, total, unit)

    found = recompute(store, [rows], teacher, rows=3, progress=Counts())
    assert (found.rows, read) == (3, [3])
    draws = [verifying._draw(store, [rows], 3, (), seed) for seed in range(5)]
    assert len({tuple(sorted(r.key for r in draw)) for draw in draws}) > 1


def test_rows_that_are_not_there_are_not_compared_nor_those_known_to_be_bad(
    tmp_path, teacher, rows
):
    store = filled(tmp_path, teacher, [rows.select(range(7))])
    assert recompute(store, [rows], teacher).rows == 7
    assert recompute(store, [rows], teacher, skip={rows.key(0).hex()}).rows == 6


def test_the_teacher_is_loaded_only_to_read(tmp_path, teacher, rows):
    store = filled(tmp_path, teacher, [rows])
    settings = {"batch_tokens": 64, "progress": Quiet()}
    assert verifying.recompute(store, [rows], nobody, rows=0, **settings).rows == 0
    strangers = token_rows(3, seed=9)
    assert verifying.recompute(store, [strangers], nobody, rows=5, **settings).rows == 0


def test_a_row_that_is_read_alone_twice_has_company_of_its_own(tmp_path, teacher):
    """Else the noise floor of one row would be nothing."""
    rows = token_rows(1, longest=40)
    store = filled(tmp_path, teacher, [rows], Dense(precision="float32"))
    found = recompute(store, [rows], teacher)
    assert (found.rows, found.bad) == (1, [])
