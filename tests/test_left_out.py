"""A teacher that gives no numbers somewhere: refused, or left out by a setting."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdframe import cache_commands, caching, pipeline
from kdframe.api import TeacherShape
from kdframe.cache_parts import RowPositions
from kdframe.errors import InputError
from kdframe.left_out import LeftOut
from kdframe.progress import Quiet
from kdframe.teacher_cache import open_cache
from kdframe_codecs import Dense, TopK
from kdframe_mmap_cache import MmapCache
from tests.conftest import make_llama
from tests.run_kit import Said, experiment, filled, token_rows, where, write_rows

V = 400
BAD = "~"  # the token that the teacher cannot bear


@pytest.fixture(scope="module")
def ill_teacher(tmp_path_factory, tokenizer):
    """NaN from the first such token of a row on: its embedding is damaged."""
    folder = tmp_path_factory.mktemp("models") / "ill"
    make_llama(folder, tokenizer, layers=2, hidden=32, seed=5, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (bad,) = tokenizer(BAD)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.nan
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def ill(tmp_path, prose, ill_teacher, student_folder):
    """Of 12 training rows and 5 held-out ones, two and one hold the token."""

    def make(codec="topk", not_numbers="error"):
        rows = [{"text": f"{i} " + prose[i * 9 : i * 9 + 60]} for i in range(12)]
        held = [{"text": f"{i} " + prose[i * 7 : i * 7 + 50]} for i in range(20, 25)]
        for row in (rows[3], rows[8], held[2]):
            row["text"] = row["text"][:20] + BAD + row["text"][20:]
        return experiment(
            tmp_path,
            prose,
            ill_teacher,
            student_folder,
            data__train=write_rows(tmp_path / "rows.jsonl", rows),
            data__validation=write_rows(tmp_path / "held.jsonl", held),
            cache__codec={"kind": codec},
            cache__not_numbers=not_numbers,
            training__max_steps=3,
        )

    return make


def test_it_is_an_error_that_names_the_row_and_nothing_of_it_is_stored(tmp_path, ill):
    with pytest.raises(InputError, match=r"row [0-9a-f]{32}: .*position \d+ .*nan.*drop_row") as e:
        pipeline.run(ill(), where(tmp_path))
    named = bytes.fromhex(str(e.value).split("row ")[1][:32])
    store = pipeline.Materials(ill(), tmp_path / "cache", Said()).store
    assert store.cache.missing([RowPositions(named, np.array([0], np.int32))]) == [0]


@pytest.mark.parametrize("not_numbers", ["drop_row", "mask_position"])
def test_left_out_by_a_setting_the_run_goes_its_way(tmp_path, ill, not_numbers):
    said = Said()
    outcome = pipeline.run(ill(not_numbers=not_numbers), where(tmp_path, progress=said))
    assert str(said).count("the teacher's logits are not numbers at") == 3
    assert "data: 3 rows without what the teacher had no numbers for" in str(said)
    for figures in outcome.evaluation["sets"]["validation"].values():
        assert np.isfinite(figures["student"])
    trained = [
        json.loads(line)["loss"]
        for line in (outcome.folder / "metrics.jsonl").read_text("utf-8").splitlines()
        if "loss" in line
    ]
    assert np.isfinite(trained).all()


@pytest.mark.parametrize("not_numbers", ["drop_row", "mask_position"])
def test_what_is_left_out_is_not_asked_again(tmp_path, ill, not_numbers):
    made = ill(not_numbers=not_numbers)
    first, _ = cache_commands.fill_cache(made, where(tmp_path))
    again, _ = cache_commands.fill_cache(made, where(tmp_path))
    assert first["rows"] > 0
    assert again["rows"] == 0


@pytest.fixture
def faltering(teacher_folder):
    """Its last norm fails where a state is large: at a few positions of a few rows."""
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    model.model.norm.register_forward_hook(
        lambda module, given, states: states.masked_fill(states[..., :1] > 1.7, torch.nan)
    )
    return model


@pytest.mark.parametrize("codec", [TopK(k=16), Dense()])
def test_a_masked_row_keeps_its_other_positions(tmp_path, faltering, teacher_folder, codec):
    rows = token_rows(20)
    healthy = AutoModelForCausalLM.from_pretrained(teacher_folder)
    whole = filled(tmp_path / "healthy", healthy, [rows], codec)
    settings = MmapCache(codec=codec, not_numbers="mask_position")
    store = open_cache(settings, {"teacher": "any"}, TeacherShape(V), tmp_path)
    caching.fill(store, [rows], lambda: faltering, batch_tokens=64, progress=Quiet())
    assert store.missing([rows]) == []
    after = LeftOut(store.cache).without(rows)
    assert 0.5 * rows.counted_tokens < after.counted_tokens < rows.counted_tokens
    for i in range(len(after)):
        kept = store.targets([after.request(i)], V)
        right = whole.targets([after.request(i)], V)
        torch.testing.assert_close(kept.log_probs, right.log_probs, atol=1e-3, rtol=1e-3)


def test_a_dropped_row_leaves_its_neighbours_as_they_were(tmp_path, faltering, teacher_folder):
    rows = token_rows(20)
    healthy = AutoModelForCausalLM.from_pretrained(teacher_folder)
    whole = filled(tmp_path / "healthy", healthy, [rows])
    settings = MmapCache(codec=TopK(k=16), not_numbers="drop_row")
    store = open_cache(settings, {"teacher": "any"}, TeacherShape(V), tmp_path)
    caching.fill(store, [rows], lambda: faltering, batch_tokens=64, progress=Quiet())
    after = LeftOut(store.cache).without(rows)
    assert 0 < len(after) < len(rows)
    requests = [after.request(i) for i in range(len(after))]
    assert np.array_equal(store.cache.read(requests), whole.cache.read(requests))
    assert store.cache.info()["rows"] == len(after)


def test_a_held_out_row_goes_whole(tmp_path, ill):
    """A part of its text cannot be compared with the whole."""
    made = ill(not_numbers="mask_position")
    cache_commands.fill_cache(made, where(tmp_path))
    materials = pipeline.Materials(made, tmp_path / "cache", Said())
    materials.leave_out()
    assert len(materials.dataset.validation) == 4


def test_positions_of_several_starts_add_up(tmp_path, teacher_folder):
    rows = token_rows(3)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    cache = filled(tmp_path, teacher, [rows]).cache
    left_out = LeftOut(cache)
    first, second = rows.positions(0)[:2].tolist()
    left_out.add(rows.key(0), [first])
    left_out.add(rows.key(0), [second])
    left_out.add(rows.key(1), None)
    found = LeftOut(cache).without(rows)
    assert len(found) == 2
    assert found.positions(0).tolist() == rows.positions(0)[2:].tolist()
    assert found.key(1) == rows.key(2)
    assert len(LeftOut(cache).without(rows, whole=True)) == 1
