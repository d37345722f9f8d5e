"""What a run would cost, measured on a sample, without a trace."""

import json

import pytest

from kdframe import cache_commands, planning
from kdframe.materials import Materials
from kdframe.progress import Quiet
from tests.run_kit import experiment, texts, where, write_rows


@pytest.fixture
def materials(tmp_path, prose, teacher_folder, student_folder):
    def make(student=student_folder, **changes):
        made = experiment(tmp_path, prose, teacher_folder, student, **changes)
        return Materials(made, tmp_path / "cache", Quiet())

    return make


def measure(materials) -> planning.Estimate:
    found = planning.measure(materials)
    assert found.errors == []
    return found.estimate


@pytest.mark.parametrize(
    "codec", [{"kind": "topk", "k": 4}, {"kind": "topk", "k": 64}, {"kind": "dense"}]
)
@pytest.mark.parametrize("rows", [3, 24, 200])
def test_the_size_of_the_cache_is_what_is_written(materials, tmp_path, prose, codec, rows):
    path = write_rows(tmp_path / "rows.jsonl", [*texts(prose, rows), *texts(prose, rows // 2)])
    found = materials(cache__codec=codec, data__train=path)
    estimate = measure(found)
    _, info = cache_commands.fill_cache(found.experiment, where(tmp_path))
    written = sum(p.stat().st_size for p in found.store.cache.folder.glob("[!.]*"))
    assert info["bytes"] == written
    assert estimate.cache_bytes == pytest.approx(written, rel=0.05)
    assert estimate.cache_bytes_by_codec[codec["kind"]] == estimate.cache_bytes
    assert set(estimate.cache_bytes_by_codec) >= {"topk", "dense"}


def test_nothing_is_left_behind(materials, tmp_path):
    measure(materials())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "more.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]


def test_rows_without_a_teacher_take_no_room(materials, tmp_path):
    untaught = {
        name: {"path": str(tmp_path / f"{name}.jsonl"), "teacher": False}
        for name in ("train", "validation", "more")
    }
    found = materials(
        data__train=untaught["train"],
        data__validation=untaught["validation"],
        data__test={"more": untaught["more"]},
    )
    estimate = measure(found)
    assert estimate.cache_bytes < 4096  # an empty cache
    assert "teacher" not in vars(found)  # never loaded
    assert estimate.seconds >= 0


def test_the_sample_is_small_and_never_padded_to_one_long_row(materials, tmp_path, prose):
    rows = [{"text": f"{i} short"} for i in range(150)] + [{"text": prose * 3}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = materials(data__train=path, data__max_length=400)
    estimate = measure(found)
    assert planning.SAMPLE_TOKENS <= estimate.sample_tokens <= planning.SAMPLE_TOKENS + 400
    assert estimate.tokens == found.dataset.train.lengths.sum()


def test_steps_and_weights_are_reckoned(materials, tmp_path):
    def trained(**changes):
        found = materials(**changes)
        return planning._trained_tokens(found.experiment, found.dataset.train)

    tokens = materials().dataset.train.lengths.sum()
    assert trained(training__epochs=3) == 3 * tokens
    half = {"path": str(tmp_path / "train.jsonl"), "weight": 0.5}
    assert trained(training__epochs=1, data__train=half) == tokens / 2
    assert trained(training__max_steps=2) == pytest.approx(2 * 4 * tokens / 24)
    assert trained(training__max_steps=10_000) == 2 * tokens


@pytest.mark.parametrize(
    "student", [{"from_teacher": {"layers": 2}}, {"from_teacher": {"layers": 2}, "lora": {}}]
)
def test_every_kind_of_student(materials, student):
    assert measure(materials(student=student)).seconds > 0


def test_a_disk_that_is_too_small_is_an_error(materials):
    found = materials()
    estimate = measure(found)
    huge = planning.Estimate(**{**vars(estimate), "cache_bytes": 10**18})
    (guard,) = planning._room(found, huge)
    assert (guard.name, guard.level) == ("disk", "error")


def test_as_json(materials):
    plain = json.loads(json.dumps(planning.measure(materials()).plain()))
    assert plain["guards"] == []
    assert {"tokens", "cache_bytes", "peak_memory_bytes", "seconds"} <= set(plain["estimate"])
