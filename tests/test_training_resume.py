"""A run that stops, or finds damage, ends as one that did not: bit for bit."""

import pytest
import torch

from kdframe import checkpoints, training
from kdframe.errors import Interrupted
from kdframe.experiment import Lora
from kdframe.progress import Quiet
from kdframe.runtime import InProcess
from tests.model_helpers import student_of
from tests.run_kit import Said, filled, learn, lesson, lines, load, same, token_rows, weights
from tests.test_checkpoints import FILES, half, missing, one_bit


@pytest.fixture(scope="module")
def rows():
    """The last three rows have no teacher; a copy of the first is there too."""
    made = token_rows(16, taught=[True] * 13 + [False] * 3)
    return made.select([*range(16), 0])


@pytest.fixture(scope="module")
def held_out():
    return token_rows(4, seed=9)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_folder, rows):
    return filled(tmp_path_factory.mktemp("cache"), load(teacher_folder), [rows])


def dropping(student_folder):
    """A student with dropout, so that the random state matters."""
    return load(student_folder, attention_dropout=0.2).train()


def with_adapters(student_folder):
    return student_of(model=str(student_folder), lora=Lora(rank=2, dropout=0.2))


CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "batch_size": 2, "epochs": 4},
    "packing": {"packing": 40, "batch_size": 1},
    "early stopping": {"early_stopping_patience": 2, "learning_rate": 0.03, "epochs": 8},
    "float16": {"precision": "float16"},
    "bfloat16": {"precision": "bfloat16"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "linear": {"scheduler": "linear", "weight_decay": 0.1},
    "constant": {"scheduler": "constant"},
}


def run(folder, model, cache, rows, held_out, stops=(), **case):
    """Weights, lines and result of a lesson that stops and goes on."""
    settings = {"batch_size": 4, "epochs": 3, "eval_steps": 3, "learning_rate": 5e-3} | case
    for stop in stops:
        given = lesson(folder, model(), cache, rows, validation=held_out, **settings)
        with pytest.raises(Interrupted, match=f"after step {stop}; run it again"):
            learn(given, stop_at=stop)
        assert checkpoints.steps(folder / "checkpoints")[-1] == stop
    given = lesson(folder, model(), cache, rows, validation=held_out, **settings)
    result = learn(given)
    return weights(given.student), lines(folder), result


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(name, tmp_path, student_folder, cache, rows, held_out):
    def model():
        return dropping(student_folder)

    parts = (model, cache, rows, held_out)
    whole = run(tmp_path / "whole", *parts, **CASES[name])
    parted = run(tmp_path / "parted", *parts, stops=(2, 3, 7), **CASES[name])
    assert same(whole[0], parted[0])
    assert whole[1] == parted[1]
    assert (whole[2].steps, whole[2].best_step) == (parted[2].steps, parted[2].best_step)
    assert not same(whole[0], weights(model()))
    if name == "early stopping":
        assert whole[2].stopped_early
        assert whole[2].best_step < whole[2].steps < 8 * 5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_adapters_too(tmp_path, student_folder, cache, rows, held_out, checkpointing):
    def model():
        return with_adapters(student_folder)

    parts, case = (model, cache, rows, held_out), {"gradient_checkpointing": checkpointing}
    whole = run(tmp_path / "whole", *parts, **case)
    parted = run(tmp_path / "parted", *parts, stops=(1, 8), **case)
    assert same(whole[0], parted[0])
    assert whole[1] == parted[1]
    start = weights(model())
    moved = [name for name, value in start.items() if not torch.equal(value, whole[0][name])]
    assert moved
    assert all("lora_" in name for name in moved)


def test_the_scale_of_float16_comes_back(tmp_path, student_folder, cache, rows):
    """It was halved by an overflow; to begin again with the large one would skip another step."""
    model = load(student_folder)
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    settings = {"precision": "float16", "batch_size": 2}
    with pytest.raises(Interrupted):
        learn(lesson(tmp_path, model, cache, rows, **settings), stop_at=3)
    given = lesson(tmp_path, load(student_folder), cache, rows, **settings)
    loop = training._Loop(given, InProcess(), Quiet())
    assert loop.scaler.get_scale() == 2**16
    loop._resume()
    assert loop.scaler.get_scale() == 2**13


def test_dropout_is_in_play(tmp_path, student_folder, cache, rows, held_out):
    """Else the tests above would say nothing about the random state."""
    one = run(tmp_path / "a", lambda: dropping(student_folder), cache, rows, held_out)
    other = run(tmp_path / "b", lambda: load(student_folder), cache, rows, held_out)
    assert not same(one[0], other[0])


def test_a_signal_in_the_middle_of_a_step_is_heeded_with_a_checkpoint(
    tmp_path, student_folder, cache, rows
):
    """It may come at any time; the loop must not leave without what it has done."""
    asked = iter([False, False, True, True, True])
    given = lesson(tmp_path, load(student_folder), cache, rows, batch_size=2)
    with pytest.raises(Interrupted, match="after step 3"):
        training.train(given, InProcess(stop=lambda: next(asked)), Quiet())
    assert checkpoints.steps(tmp_path / "checkpoints") == [3]


@pytest.mark.parametrize("damage", [missing, half, one_bit])
@pytest.mark.parametrize("file", FILES)
def test_damage_to_the_last_checkpoint_costs_only_time(
    tmp_path, student_folder, cache, rows, held_out, file, damage
):
    settings = {"batch_size": 4, "epochs": 2, "eval_steps": 2, "learning_rate": 5e-3}

    def go(folder, **more):
        given = lesson(
            folder, dropping(student_folder), cache, rows, validation=held_out, **settings
        )
        learn(given, **more)
        return weights(given.student)

    whole = go(tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(tmp_path / "run", stop_at=7)
    damage(tmp_path / "run" / "checkpoints" / "step-7" / file)
    said = Said()
    assert same(go(tmp_path / "run", progress=said), whole)
    assert "step-7" in str(said)
    assert "going on from step 6" in str(said)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_with_every_checkpoint_damaged_training_begins_anew(
    tmp_path, student_folder, cache, rows, held_out
):
    parts = (lambda: dropping(student_folder), cache, rows, held_out)
    whole = run(tmp_path / "whole", *parts)
    with pytest.raises(Interrupted):
        learn(
            lesson(
                tmp_path / "run", dropping(student_folder), cache, rows, validation=held_out,
                batch_size=4, epochs=3, eval_steps=3, learning_rate=5e-3,
            ),
            stop_at=7,
        )  # fmt: skip
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        half(folder / "model.safetensors")
    again = run(tmp_path / "run", *parts)
    assert same(whole[0], again[0])
    assert whole[1] == again[1]


def test_what_a_killed_save_left_is_swept_up(tmp_path, student_folder, cache, rows):
    left = tmp_path / "checkpoints" / ".step-3.0123abcd.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    learn(lesson(tmp_path, load(student_folder), cache, rows, max_steps=1))
    assert not left.exists()


def test_the_best_weights_are_the_result(tmp_path, student_folder, cache, rows, held_out):
    """Also where they are neither the last nor the one before."""
    settings = {"batch_size": 4, "epochs": 6, "eval_steps": 2, "learning_rate": 0.05}
    given = lesson(tmp_path, load(student_folder), cache, rows, validation=held_out, **settings)
    result = learn(given)
    losses = {
        li["step"]: li["validation_hard"] for li in lines(tmp_path) if "validation_hard" in li
    }
    assert result.best_step == min(losses, key=losses.get) < result.steps - 4
    best = checkpoints.load_weights(tmp_path / "checkpoints" / f"step-{result.best_step}")
    assert same(weights(given.student), best)
    assert len(checkpoints.steps(tmp_path / "checkpoints")) == 3
