"""A run that is killed at moments that are drawn, and started again, ends as one never killed."""

import json
import random

import pytest

from kdframe import cache_commands
from kdframe.caching import PLAN
from kdframe.experiment import Experiment
from tests.conftest import make_llama
from tests.kill_kit import attempts, events, passes
from tests.run_kit import experiment, lines, texts, where, write_rows

CACHE_KILLS, TRAIN_KILLS, ALL_KILLS = 3, 4, 40


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer):
    """With dropout: its random state must come back too."""
    folder = tmp_path_factory.mktemp("models") / "dropping"
    return make_llama(folder, tokenizer, layers=1, hidden=16, seed=2, attention_dropout=0.2)


@pytest.fixture
def plain(tmp_path, prose, teacher_folder, student):
    def make(count=120, **changes):
        rows = write_rows(tmp_path / "rows.jsonl", texts(prose, count))
        made = experiment(
            tmp_path,
            prose,
            teacher_folder,
            {"model": str(student)},
            data__train=rows,
            training__epochs=10,
            training__eval_steps=7,
            evaluation__batch_tokens=48,
            export=["hf"],
            **changes,
        )
        return made.plain()

    return make


def drawn(seed: int) -> list[dict]:
    chance = random.Random(seed)
    cache = [
        {"kind": "cache", "count": chance.randint(1, 12), "delay": chance.random() * 0.02}
        for _ in range(CACHE_KILLS)
    ]
    train = [
        {"kind": "train", "count": chance.randint(5, 60), "delay": chance.random() * 0.03}
        for _ in range(TRAIN_KILLS)
    ]
    return cache + train


def many(seed: int) -> list[dict]:
    """Kills that each let a fill get on by a batch or so."""
    chance = random.Random(seed)
    return [
        {"kind": "cache", "count": chance.randint(1, 4), "delay": chance.random() * 0.02}
        for _ in range(ALL_KILLS)
    ]


def left(folder) -> dict:
    run = folder / "runs" / "tiny"
    return {
        "student": (run / "student" / "model.safetensors").read_bytes(),
        "export": (run / "exports" / "hf" / "model.safetensors").read_bytes(),
        "metrics": lines(run),
        "evaluation": json.loads((run / "evaluation.json").read_text("utf-8")),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


@pytest.mark.parametrize("variant", ["all weights", "adapters"])
def test_killed_at_moments_that_are_drawn(tmp_path, plain, variant):
    changes = {}
    if variant == "adapters":
        changes = {"student__lora": {"rank": 2, "dropout": 0.2}, "training__learning_rate": 0.01}
    made = plain(**changes)
    attempts(tmp_path / "whole", made, [])
    ends = attempts(tmp_path / "killed", made, drawn(seed=len(variant)))
    kills = CACHE_KILLS + TRAIN_KILLS
    assert [end["killed"] for end in ends] == [True] * kills + [False]
    assert sum(end["checkpoints_before"] > 0 for end in ends) >= TRAIN_KILLS - 1
    whole, killed = left(tmp_path / "whole"), left(tmp_path / "killed")
    assert whole["metrics"][-1]["step"] == 300
    for part in whole:
        assert killed[part] == whole[part], part
    assert not list((tmp_path / "killed" / "runs").rglob("*.tmp"))


def test_of_the_teachers_work_at_most_two_batches_are_done_twice_by_a_kill(
    tmp_path, plain, all_faults
):
    made = plain(count=400 if all_faults else 120, training__max_steps=1)
    attempts(tmp_path / "whole", made, [])
    batches = passes(tmp_path / "whole")
    kills = many(seed=3) if all_faults else drawn(seed=3)[:CACHE_KILLS]
    ends = attempts(tmp_path / "killed", made, kills)
    assert [end["killed"] for end in ends] == [True] * len(kills) + [False]
    announced = [end["announced"] for end in ends]
    assert announced == sorted(announced)
    assert 0 < announced[-2] < announced[-1] == batches
    # One is written while the next is computed; what was announced is not asked again.
    again = passes_again(tmp_path / "killed")
    assert max(again) <= 2
    assert passes(tmp_path / "killed") == batches + sum(again)
    print(f"{len(kills)} kills of a fill of {batches} batches: {sum(again)} computed again")
    read = Experiment.model_validate(made)
    infos = [
        cache_commands.cache_info(read, where(tmp_path / name)) for name in ("whole", "killed")
    ]
    rows = infos[0]["rows"]
    assert infos[1]["rows"] == rows > 120
    noted = json.loads((tmp_path / "killed/runs/tiny/manifest.json").read_text("utf-8"))
    assert 0 < noted["done"]["cache"]["rows"] < rows
    assert not list((tmp_path / "killed" / "cache").glob(f"*/{PLAN}"))


def passes_again(folder) -> list[int]:
    """For each process the batches that it had begun and that are not announced at its end.

    A batch that was announced and is begun again fails the test.
    """
    lost, begun, known = [], [], set()
    for kind, keys in events(folder):
        if kind == "pass":
            assert keys.isdisjoint(known)
            begun.append(keys)
        else:
            assert known <= keys
            known = keys
            lost.append(sum(not batch <= known for batch in begun))
            begun = []
    return lost
