"""Which codec: measured on some of the user's own positions, against the truth."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from kdframe import cache_commands, codec_trials, sampling
from kdframe.api import TeacherOutputs, TeacherShape
from kdframe.codec_plan import plan
from kdframe.errors import InputError
from kdframe.fidelity import compare
from kdframe.materials import Materials
from kdframe.progress import Quiet
from kdframe_codecs import Dense, Sampled, TopK
from kdframe_logit_kd import LogitKD
from tests.codec_kit import Broken, States
from tests.conftest import make_llama
from tests.model_helpers import logits
from tests.run_kit import experiment, load, texts, where, write_rows
from tests.test_output_layer import Bent, LlamaConfig, build

ALL = 10_000  # more tokens than there are


@pytest.fixture
def tiny(tmp_path, prose, teacher_folder, student_folder):
    def make(student=student_folder, teacher=teacher_folder, **changes):
        return experiment(tmp_path, prose, teacher, student, **changes)

    return make


def taught(made):
    materials = Materials(made, Path("cache"), Quiet())
    return sampling.taught_rows([materials.dataset.train, *materials.held_out.values()])


def said(folder, rows) -> torch.Tensor:
    """A model's logits at every position that counts, each row alone."""
    model = load(folder)
    found = []
    for row in rows:
        whole = logits(model, torch.from_numpy(row.ids.astype(np.int64))[None])[0]
        found.append(whole[torch.from_numpy(row.request.positions.astype(np.int64))])
    return torch.cat(found)


def rows_of(found, kind, temperature=1.0, **settings):
    return [
        row
        for row in found.rows
        if row.codec == kind
        and row.temperature == temperature
        and settings.items() <= row.settings.items()
    ]


# --------------------------------------------------------------------------------- the figures
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_figures_are_those_of_both_models_over_all_rows(
    tiny, teacher_folder, student_folder, temperature
):
    made = tiny()
    found = made.plan(tokens=ALL, codecs=[TopK(k=4)])
    rows = taught(made)
    teacher, student = said(teacher_folder, rows), said(student_folder, rows)
    codec = TopK(k=4).build(TeacherShape(400))
    targets = codec.decode(codec.encode(TeacherOutputs.of(teacher)))
    truth = compare(targets, teacher, student, temperature)
    (row,) = rows_of(found, "topk", temperature, k=4)
    assert found.tokens == found.positions == truth.positions
    assert row.kl == pytest.approx(truth.mean_kl, rel=1e-3)
    assert row.gradient_error == pytest.approx(truth.gradient_error, rel=1e-3)
    assert row.gradient_angle_deg == pytest.approx(truth.gradient_angle, rel=1e-3)
    assert row.gradient_size == pytest.approx(truth.gradient_size, rel=1e-3)
    assert row.entropy == pytest.approx(truth.entropy / truth.positions, rel=1e-3)
    assert row.support == pytest.approx(truth.support / truth.positions, rel=1e-3)


def test_more_ids_keep_more(tiny):
    found = tiny().plan(codecs=[TopK(k=k) for k in (4, 64)])
    few, many = (rows_of(found, "topk", k=k)[0] for k in (4, 64))
    assert few.gradient_error > 2 * many.gradient_error > 0
    assert few.kl > many.kl
    assert few.support < many.support
    assert few.bytes_per_token < many.bytes_per_token


@pytest.mark.parametrize(("wide", "width"), [(400, 416), (416, 400)])
def test_two_models_may_pad_their_vocabularies_differently(tiny, tmp_path, tokenizer, wide, width):
    def made(name, size, **more):
        return make_llama(tmp_path / name, tokenizer, vocab_size=size, seed=1, **more)

    teacher = made("wide", wide, layers=2, hidden=32)
    student = made("padded", width, layers=1, hidden=16)
    found = tiny(student, teacher).plan(codecs=[Dense(), TopK(k=64)])
    assert 0 <= rows_of(found, "dense")[0].gradient_error < 1e-2
    assert rows_of(found, "topk", k=64)[0].gradient_error < 1


def test_the_size_is_what_a_cache_of_the_whole_data_takes(tiny, tmp_path, prose):
    path = write_rows(tmp_path / "rows.jsonl", [*texts(prose, 60), *texts(prose, 30)])
    made = tiny(data__train=path)
    found = made.plan(codecs=[])
    _, info = cache_commands.fill_cache(made, where(tmp_path))
    assert found.positions == info["positions"]
    assert rows_of(found, "topk")[0].total_bytes == pytest.approx(info["bytes"], rel=0.05)


def test_what_is_kept_beside_the_records_counts(tiny):
    found = tiny().plan(codecs=[States()])
    (row,) = rows_of(found, "states")
    assert row.total_bytes > found.positions * row.bytes_per_token + 400 * 32 * 4


def test_costs_are_measured(tiny):
    for row in tiny().plan(codecs=[Dense()]).rows:
        assert 0 < row.codec_seconds_per_token < row.seconds_per_token
        assert row.read_seconds_per_token > 0


# ---------------------------------------------------------------------------------- the sample
def test_every_source_has_its_share(tiny, tmp_path, prose):
    sources = [
        write_rows(tmp_path / f"{i}.jsonl", texts(prose, 40, start=100 * i)) for i in range(3)
    ]
    rows = taught(tiny(data__train=sources))
    drawn = {row.request.key for row in sampling.draw(rows, 200)}
    places = [i for i, row in enumerate(rows) if row.request.key in drawn]
    assert [sum(40 * i <= place < 40 * (i + 1) for place in places) > 1 for i in range(3)] == [
        True
    ] * 3


def test_of_a_long_row_only_some_positions_are_measured(tiny, tmp_path, prose):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{i} {prose}"} for i in range(20)])
    made = tiny(data__train=path, data__max_length=200)
    found = made.plan(tokens=64, codecs=[])
    assert 32 <= found.tokens <= 72
    rows = sampling.draw(taught(made), 64)
    assert len(rows) == sampling.FEWEST
    for row, thinned in zip(rows, sampling.thin(rows, 64), strict=True):
        assert set(thinned.request.positions) <= set(row.request.positions)
        assert len(thinned.request.positions) == min(8, len(row.request.positions))


def test_fitted_codecs_are_fitted_on_other_rows(tiny, tmp_path):
    asked = []

    class Watched(States):
        def fit(self, sample):
            asked.append(sample.hidden)
            return super().fit(sample)

    found = tiny().plan(tokens=ALL, codecs=[Watched()])
    assert found.fitted == len(asked[0]) > 0
    assert found.tokens + found.fitted == found.positions


def test_one_row_is_too_few_to_fit_on(tiny, tmp_path, prose):
    one = write_rows(tmp_path / "one.jsonl", texts(prose, 1))
    made = tiny(data__train=one, data__validation=one, data__test={})
    found = made.plan(codecs=[States()])
    (row,) = rows_of(found, "states")
    assert not row.usable
    assert "one row is too few" in row.reason
    assert row.gradient_error is None
    assert rows_of(found, "topk")[0].usable


# --------------------------------------------------------------------------- what can be used
def test_the_experiments_own_codec_comes_first_and_no_settings_come_twice(tiny):
    found = tiny(cache__codec={"kind": "topk", "k": 32}).plan()
    names = list(dict.fromkeys((row.codec, json.dumps(row.settings)) for row in found.rows))
    assert names[0] == ("topk", '{"k": 32}')
    assert len(names) * 3 == len(found.rows)
    assert [json.loads(settings)["k"] for kind, settings in names if kind == "topk"] == [
        *(32, 16, 64, 128, 256)
    ]
    assert "dense" in {kind for kind, _ in names}


def test_temperatures_are_the_losss_the_usual_ones_and_those_that_are_asked(tiny):
    made = tiny(loss__temperature=3.0)
    found = made.plan(temperatures=[8.0, 2.0], codecs=[])
    assert [at.temperature for at in found.teacher] == [1, 2, 3, 4, 8]
    assert [at.temperature for at in found.teacher if at.read] == [3]


def test_a_temperature_that_a_codec_does_not_serve_is_told(tiny):
    found = tiny().plan(temperatures=[8.0], codecs=[])
    (row,) = rows_of(found, "topk", 8.0)
    assert not row.usable
    assert row.reason == "codec 'topk' does not serve temperature 8"
    assert row.kl is row.gradient_error is None
    assert row.entropy > 0


def test_the_ladder_of_topk_covers_the_losss_temperature(tiny):
    made = tiny(cache__codec={"kind": "dense"}, loss__temperature=8.0)
    assert all(row.usable for row in rows_of(made.plan(), "topk", 8.0))
    assert not any(codec.serves(8.0) for codec in TopK.ladder())
    assert not any(codec.serves(0.5) for codec in TopK.ladder([0.5]))


def test_the_error_of_draws_is_noise_and_not_held_against_the_tolerance(tiny):
    found = tiny().plan(codecs=[Sampled()], tolerance=100, tokens=64)
    (row,) = rows_of(found, "sampled")
    assert row.usable
    assert row.drawn
    assert row.kl is None  # none is defined
    assert row.gradient_error > 0
    assert row.total_bytes < rows_of(found, "topk")[0].total_bytes
    assert found.recommended.codec == "topk"


class Picky(LogitKD):
    """A loss that reads truncated targets alone."""

    accepts: ClassVar = frozenset({"truncated"})


def test_a_form_that_the_loss_does_not_accept_is_measured_and_told(tiny):
    made = tiny().model_copy(update={"loss": Picky()})
    found = made.plan(codecs=[Dense(), States(), Sampled()], tolerance=1e-9)
    for kind, form in (("dense", "dense"), ("states", "hidden"), ("sampled", "weighted")):
        (row,) = rows_of(found, kind)
        assert not row.usable
        assert f"does not accept {form} targets" in row.reason
        assert row.gradient_error is not None
    assert found.recommended is None
    assert found.nearest.codec == "topk"


def test_hidden_states_count_as_the_distribution_that_they_make(tiny):
    (row,) = rows_of(tiny().plan(codecs=[States(precision="float32")]), "states")
    assert row.usable
    assert row.gradient_error == pytest.approx(0, abs=1e-4)
    assert row.support == 1


def test_a_codec_that_fails_ends_only_its_own_trial(tiny):
    found = tiny().plan(codecs=[Broken(), Dense()])
    (row,) = rows_of(found, "broken")
    assert row.reason == "ArithmeticError: no such thing"
    assert row.gradient_error is row.seconds_per_token is None
    assert rows_of(found, "dense")[0].usable


def test_a_teacher_without_halves_has_no_hidden_states():
    bent = build(Bent, LlamaConfig)
    ids = np.arange(1, 30, dtype=np.int32)
    row = sampling.TaughtRow(ids, sampling.RowPositions(b"any", ids[:-1]))
    readings = codec_trials.read(bent, [row], [row], batch_tokens=64)
    found = codec_trials.measure(
        [States(), TopK(k=4)],
        [1.0],
        teacher=readings,
        student=readings,
        shape=TeacherShape(readings.vocab_size, 32),
        progress=Quiet(),
    )
    states, topk = found.trials
    assert "do not add up" in states.reason
    assert topk.reason == ""
    assert topk.found[1.0].positions == len(ids) - 1


def test_positions_at_which_a_model_gives_no_numbers_are_left_out(teacher_folder):
    ids = np.arange(3, 30, dtype=np.int32)
    row = sampling.TaughtRow(ids, sampling.RowPositions(b"any", ids[:-1] - 3))
    readings = codec_trials.read(load(teacher_folder), [row], [], batch_tokens=64)
    readings.states[5] = torch.nan
    asked = {"shape": TeacherShape(400, 32), "progress": Quiet()}
    found = codec_trials.measure([TopK()], [1.0], teacher=readings, student=readings, **asked)
    assert (found.positions, found.left_out) == (len(ids) - 2, 1)
    assert found.trials[0].found[1.0].positions == found.positions
    readings.states[:] = torch.nan
    with pytest.raises(InputError, match="no numbers at any position"):
        codec_trials.measure([TopK()], [1.0], teacher=readings, student=readings, **asked)


# --------------------------------------------------------------------------- what is advised
def test_the_smallest_within_the_tolerance_is_recommended_with_what_to_type(tiny):
    made = tiny(loss__temperature=1.0)
    ladder = [TopK(k=k) for k in (2, 8, 100)]
    found = made.plan(codecs=[*ladder, Dense()], tokens=ALL)
    error = {k: rows_of(found, "topk", k=k)[0].gradient_error for k in (2, 8, 16, 100)}
    between = (error[8] + error[100]) / 2
    chosen = made.plan(codecs=[*ladder, Dense()], tokens=ALL, tolerance=between)
    wanted = 16 if error[16] <= between else 100
    assert chosen.recommended.settings == {"k": wanted}
    assert chosen.recommended.gradient_error == pytest.approx(error[wanted])
    assert chosen.recommended.own == (wanted == 16)
    exact = made.plan(codecs=[*ladder, Dense()], tokens=ALL, tolerance=error[100] / 2)
    assert exact.recommended.override == "cache.codec='{kind: dense}'"
    assert exact.recommended.override in exact.advice
    own = made.plan(codecs=ladder, tokens=ALL, tolerance=error[16])
    assert "which the experiment has already" in own.advice


def test_the_error_that_counts_is_the_largest_at_the_losss_temperatures(tiny):
    made = tiny(loss__temperature=4.0)
    found = made.plan(codecs=[], tokens=ALL, tolerance=10)
    assert found.recommended.gradient_error == rows_of(found, "topk", 4.0)[0].gradient_error


def test_where_none_is_good_enough_the_nearest_is_named(tiny):
    found = tiny().plan(codecs=[TopK(k=4), TopK(k=32)], tolerance=1e-9)
    assert found.recommended is None
    assert found.nearest.settings == {"k": 32}
    assert "no codec reaches" in found.advice
    assert "cache.codec='{kind: topk, k: 32}'" in found.advice


def test_a_student_that_says_what_the_teacher_says_has_no_gradient_to_compare(tiny, teacher_folder):
    found = tiny(student=teacher_folder).plan(codecs=[Dense()])
    assert all(row.gradient_error is None for row in found.rows)
    assert all(row.kl is not None for row in found.rows)
    assert found.recommended is found.nearest is None
    assert any("no gradient to compare" in said for said in found.warnings)
    json.dumps(found.plain(), allow_nan=False)


def test_a_flat_teacher_and_ids_that_hold_little_are_warned_of(tiny):
    found = tiny().plan(temperatures=[100.0], codecs=[Dense(), TopK(k=4, temperatures=(1, 100))])
    flat = found.teacher[-1]
    assert flat.share > 0.9
    assert any("at T = 100 the teacher is nearly flat" in said for said in found.warnings)
    assert any("at T = 100 less than 30%" in said and "k=4" in said for said in found.warnings)
    assert not any("dense" in said for said in found.warnings)


# ---------------------------------------------------------------------- what is left, refused
@pytest.mark.parametrize(
    "student", [{"from_teacher": {"layers": 2}}, {"from_teacher": {"layers": 2}, "lora": {}}]
)
def test_every_kind_of_student(tiny, student):
    (dense,) = rows_of(tiny(student=student).plan(codecs=[Dense()]), "dense")
    assert dense.gradient_error == pytest.approx(0, abs=1e-2)


def test_nothing_is_left_behind(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny().plan(tokens=32)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["more.jsonl", "train.jsonl", "validation.jsonl"]


def test_as_json(tiny):
    plain = json.loads(json.dumps(tiny().plan(codecs=[Sampled()]).plain(), allow_nan=False))
    assert plain.keys() >= {"rows", "recommended", "tolerance", "tokens"}
    assert plain["rows"][0].keys() >= {
        *("codec", "settings", "bytes_per_token", "temperature", "kl", "gradient_error"),
        *("gradient_angle_deg", "gradient_size", "seconds_per_token", "read_seconds_per_token"),
        *("total_bytes", "entropy", "support", "usable", "reason"),
    }


def test_faults_are_told_before_a_model_is_loaded(tiny, tmp_path):
    made = tiny(teacher="./nowhere", data__train="nothing.jsonl")
    with pytest.raises(InputError) as refused:
        made.plan()
    assert len(refused.value.faults) == 2


@pytest.mark.parametrize(
    "how", [{"tokens": 0}, {"tolerance": 0}, {"temperatures": [-1.0]}, {"tolerance": float("nan")}]
)
def test_settings_that_mean_nothing_are_refused(tiny, how):
    with pytest.raises(InputError, match="above 0"):
        plan(tiny(), **how)


def test_rows_without_a_teacher_leave_nothing_to_measure(tiny, tmp_path):
    tiny()
    untaught = {
        name: {"path": str(tmp_path / f"{name}.jsonl"), "teacher": False}
        for name in ("train", "validation", "more")
    }
    made = tiny(
        data__train=untaught["train"],
        data__validation=untaught["validation"],
        data__test={"more": untaught["more"]},
    )
    with pytest.raises(InputError, match="the teacher reads no row"):
        made.plan()
