"""Settings that move over the training: read, resolved, trained with, and resumed."""

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdframe import reading
from kdframe.api import LossConfig, Schedule, fixed
from kdframe.errors import InputError, Interrupted
from kdframe.experiment import Experiment
from kdframe_codecs import TopK
from kdframe_divergences import JSD, ForwardKL, Mixture, ReverseKL
from kdframe_logit_kd import LogitKD
from tests.run_kit import (
    experiment,
    filled,
    learn,
    lesson,
    lines,
    load,
    same,
    token_rows,
    weights,
    where,
)

ANNEALED = LogitKD(temperature=Schedule(start=4, end=1), alpha=Schedule(start=0.2, end=0.6))
numbers = st.floats(-1e3, 1e3)
shapes = st.sampled_from(["linear", "cosine"])


# --------------------------------------------------------------------------------- the schedule
@given(numbers, numbers, shapes)
def test_it_goes_from_start_to_end(start, end, shape):
    schedule = Schedule(start=start, end=end, shape=shape)
    assert schedule.at(0) == start
    assert schedule.at(1) == end
    assert schedule.at(0.5) == pytest.approx((start + end) / 2, abs=1e-9)


@given(numbers, numbers, shapes, st.floats(0, 1))
def test_it_never_leaves_what_lies_between(start, end, shape, progress):
    """Not by a rounding either: a cache would refuse the temperature in the middle of a run."""
    value = Schedule(start=start, end=end, shape=shape).at(progress)
    assert min(start, end) <= value <= max(start, end)


def test_a_cosine_is_slow_at_both_ends():
    even, wave = Schedule(start=0, end=1), Schedule(start=0, end=1, shape="cosine")
    assert wave.at(0.1) < even.at(0.1) == 0.1
    assert wave.at(0.9) > even.at(0.9) == 0.9


# ------------------------------------------------------------------------------ in the settings
def test_settings_without_schedules_are_the_same_at_every_moment():
    for loss in (LogitKD(), JSD(beta=0.3), Mixture(parts=[{"loss": "jsd"}])):
        assert loss.at(0.3) is loss


def test_every_schedule_of_a_loss_is_resolved():
    assert ANNEALED.at(0) == LogitKD(temperature=4, alpha=0.2)
    assert ANNEALED.at(0.5) == LogitKD(temperature=2.5, alpha=0.4)
    assert ANNEALED.at(1) == LogitKD(temperature=1, alpha=0.6)


def test_a_stranger_s_loss_has_schedules_for_the_asking():
    class Mine(LossConfig):
        kind: str = "mine"
        strength: Schedule | float = 1.0

    assert Mine(strength=Schedule(start=0, end=2)).at(0.25).strength == 0.5


def test_a_loss_is_built_of_a_moment_alone():
    with pytest.raises(TypeError, match=r"build the loss of `config.at\(progress\)`"):
        ANNEALED.build()
    assert fixed(ANNEALED.at(0.5).temperature) == 2.5


def test_the_header_says_how_it_moves():
    said = ANNEALED.describe()
    assert "alpha 0.2 to 0.6 (linear): 20 to 60 (linear) % hard labels" in said
    assert "at temperature 4 to 1 (linear)" in said


EXPERIMENT = """
name: e
teacher: a/b
student: a/c
data: {train: rows.jsonl}
loss: {kind: logit_kd, temperature: 2}
"""


def read(tmp_path, *overrides, text=EXPERIMENT):
    (tmp_path / "e.yaml").write_text(text)
    return reading.load(tmp_path / "e.yaml", overrides)


def test_in_yaml_it_is_a_mapping_and_on_the_command_line_its_parts(tmp_path):
    given_ = read(tmp_path, "loss.temperature.start=4", "loss.temperature.end=1")
    assert given_.loss == LogitKD(temperature=Schedule(start=4, end=1))
    text = EXPERIMENT.replace("temperature: 2", "temperature: {start: 4, end: 1, shape: cosine}")
    written = read(tmp_path, "loss.temperature.start=3", text=text)
    assert written.loss == LogitKD(temperature=Schedule(start=3, end=1, shape="cosine"))
    assert read(tmp_path, "loss.temperature=2", text=text).loss == LogitKD(temperature=2)
    assert Experiment.model_validate(written.plain()) == written
    assert written.fingerprint() != given_.fingerprint()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("temperature: {start: 4}", r"loss.temperature.end: is missing"),
        ("temperature: {start: 4, ende: 1}", r"temperature.ende: there is no.*did you mean 'end'"),
        ("temperature: {start: 4, end: 0}", r"loss.temperature: .*greater than 0 \(given: 0.0\)"),
        ("temperature: -1", r"loss.temperature: .*greater than 0 \(given: -1\)"),
        ("temperature: warm", r"loss.temperature: .*valid number"),
        ("alpha: {start: 0, end: 2}", r"loss.alpha: .*less than or equal to 1"),
        ("alpha: .nan", r"loss.alpha: .*finite"),
        ("temperature: {start: 4, end: .inf}", r"loss.temperature.end: .*finite"),
        ("temperature: {start: 1, end: 9}", r"codec 'topk' does not serve temperature 9"),
        ("temperature: {start: 0.5, end: 1}", r"codec 'topk' does not serve temperature 0.5"),
    ],
)
def test_a_fault_is_named_at_its_own_key(tmp_path, written, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text=EXPERIMENT.replace("temperature: 2", written))


def test_the_schema_knows_numbers_and_schedules():
    alternatives = LogitKD.model_json_schema()["properties"]["temperature"]["anyOf"]
    assert [one["type"] for one in alternatives] == ["number", "object"]
    assert alternatives[0]["exclusiveMinimum"] == 0


# ------------------------------------------------------------------------------- in the training
@pytest.fixture(scope="module")
def rows():
    return token_rows(16, taught=[True] * 13 + [False] * 3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_folder, rows):
    return filled(tmp_path_factory.mktemp("cache"), load(teacher_folder), [rows], TopK(k=16))


def test_each_step_is_taken_with_the_settings_of_its_moment(tmp_path, student_folder, cache, rows):
    """Of `n` steps, step `i` (from 0) is at progress `i / n`; the end is reached after the last."""
    built = []

    class Spy(LogitKD):
        def build(self):
            built.append(self.temperature)
            return super().build()

    loss = Spy(temperature=Schedule(start=4, end=2))
    learn(lesson(tmp_path, load(student_folder), cache, rows, loss=loss, batch_size=4))
    assert built == [4, 3.5, 3, 2.5]


def test_a_loss_that_does_not_move_is_built_once(tmp_path, student_folder, cache, rows):
    built = []

    class Spy(LogitKD):
        def build(self):
            built.append(self)
            return super().build()

    learn(lesson(tmp_path, load(student_folder), cache, rows, loss=Spy(), batch_size=4))
    assert len(built) == 1


MIXED = Mixture(
    parts=[
        {"loss": ForwardKL(temperature=Schedule(start=3, end=1)), "weight": 0.5},
        {"loss": ReverseKL(alpha=0), "weight": Schedule(start=0, end=1, shape="cosine")},
    ]
)


@pytest.mark.parametrize("loss", [ANNEALED, MIXED], ids=["annealed", "mixture"])
def test_a_run_that_was_stopped_takes_up_the_schedule_bit_for_bit(
    tmp_path, student_folder, cache, rows, loss
):
    settings = {"batch_size": 4, "epochs": 3, "eval_steps": 3, "learning_rate": 5e-3, "loss": loss}

    def go(folder, stop_at=None):
        given_ = lesson(
            folder, load(student_folder, attention_dropout=0.2), cache, rows, **settings
        )
        learn(given_, stop_at=stop_at)
        return weights(given_.student)

    whole = go(tmp_path / "whole")
    for stop in (2, 3, 7):
        with pytest.raises(Interrupted):
            go(tmp_path / "parted", stop)
    assert same(whole, go(tmp_path / "parted"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parted")


def test_a_whole_run_with_a_mixture_and_a_schedule(tmp_path, prose, teacher_folder, student_folder):
    parts = [
        {"loss": {"kind": "logit_kd", "temperature": {"start": 4.0, "end": 1.0}}, "weight": 0.7},
        {"loss": {"kind": "jsd", "alpha": 0}, "weight": {"start": 0.0, "end": 0.3}},
    ]
    loss = {"kind": "mixture", "parts": parts}
    given_ = experiment(tmp_path / "e", prose, teacher_folder, student_folder, loss=loss)
    outcome = given_.run(**vars(where(tmp_path)))
    found = [line for line in lines(outcome.folder) if "loss" in line]
    assert {"hard", "logit_kd", "jsd"} <= found[0].keys()
    assert found[0]["loss"] == pytest.approx(0.7 * found[0]["logit_kd"])
    assert found[-1]["loss"] > 0.7 * found[-1]["logit_kd"]
    card = (outcome.folder / "student" / "README.md").read_text()
    assert "temperature 4 to 1 (linear)" in card


def test_an_experiment_says_of_a_part_what_its_codec_cannot_serve(tmp_path):
    text = EXPERIMENT.replace(
        "{kind: logit_kd, temperature: 2}",
        "{kind: mixture, parts: [{loss: jsd}, {loss: {kind: reverse_kl, temperature: 9}}]}",
    )
    with pytest.raises(InputError, match="does not serve temperature 9 of loss 'mixture'"):
        read(tmp_path, text=text)


def test_pydantic_alone_refuses_it_too():
    with pytest.raises(pydantic.ValidationError, match="greater than 0"):
        LogitKD(temperature=Schedule(start=1, end=0))
