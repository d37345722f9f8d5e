"""What the tests of whole runs share: a tiny experiment, and the loop on tiny rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from kdframe import caching, training
from kdframe.api import LossConfig, TeacherShape
from kdframe.batching import TokenRows
from kdframe.experiment import Experiment, Training
from kdframe.output_layer import Halves
from kdframe.pipeline import Where
from kdframe.progress import Quiet
from kdframe.runtime import InProcess
from kdframe.teacher_cache import TeacherCache, open_cache
from kdframe_codecs import TopK
from kdframe_logit_kd import LogitKD
from kdframe_mmap_cache import MmapCache

torch.set_num_threads(1)  # at this size, two wait for each other

TIMES = ("tokens_per_second",)


class Said(Quiet):
    """Remembers what was said."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, message):
        self.lines.append(message)

    def __str__(self):
        return "\n".join(self.lines)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def texts(prose: str, count: int, size: int = 60, start: int = 0) -> list[dict]:
    """Rows of text of different lengths."""
    rows = []
    for i in range(start, start + count):
        at = i * 17 % (len(prose) - size)
        rows.append({"text": f"{i} " + prose[at : at + size // 3 + i * 7 % size]})
    return rows


def experiment(folder: Path, prose: str, teacher: Path, student: Path | dict, **changes):
    """A run of a few dozen steps; `changes` by dotted path with `__` for the dot."""
    folder.mkdir(exist_ok=True)
    student = student if isinstance(student, dict) else {"model": str(student)}
    plain = {
        "name": "tiny",
        "teacher": {"model": str(teacher)},
        "student": student,
        "data": {
            "train": write_rows(folder / "train.jsonl", texts(prose, 24)),
            "validation": write_rows(folder / "validation.jsonl", texts(prose, 5, start=100)),
            "test": {"more": write_rows(folder / "more.jsonl", texts(prose, 4, start=200))},
            "max_length": 48,
        },
        "cache": {"kind": "mmap", "codec": {"kind": "topk", "k": 16}},
        "training": {"batch_size": 4, "learning_rate": 2e-3, "eval_steps": 4, "epochs": 2},
    }
    made = Experiment.model_validate(plain)
    return made.with_({name.replace("__", "."): value for name, value in changes.items()})


def where(folder: Path, **more) -> Where:
    return Where(folder / "runs", folder / "cache", **more)


def lines(folder: Path) -> list[dict]:
    """A run's metrics without what a clock measured."""
    text = (folder / "metrics.jsonl").read_text("utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def token_rows(count: int, *, longest: int = 20, seed: int = 0, taught=True, weights=1.0):
    """Random rows, of which about three positions in four count."""
    chance = np.random.default_rng(seed)
    ids = [chance.integers(3, 300, size) for size in chance.integers(4, longest, count)]
    counted = [np.append(chance.random(len(row) - 1) < 0.75, False) for row in ids]
    for row in counted:
        row[0] = True
    return TokenRows.join(
        ids,
        counted,
        taught=np.broadcast_to(taught, count),
        weights=np.broadcast_to(weights, count),
        text_bytes=[2 * int(row.sum()) for row in counted],
    )


def filled(folder: Path, teacher, sets: list[TokenRows], codec=None) -> TeacherCache:
    """A cache in which the teacher's predictions for the rows are."""
    settings = MmapCache(codec=codec or TopK(k=16))
    shape = TeacherShape(Halves(teacher).vocab_size, teacher.config.hidden_size)
    store = open_cache(settings, {"teacher": "any"}, shape, folder)
    caching.fill(store, sets, lambda: teacher, batch_tokens=64, progress=Quiet())
    return store


class Ready(LossConfig):
    """The settings of a loss that is there already: a function."""

    kind: str = "ready"
    made: Any

    def build(self):
        return self.made


def lesson(folder: Path, student, cache: TeacherCache, rows: TokenRows, **settings):
    """A lesson; what `Training` does not know goes to the lesson itself."""
    folder.mkdir(exist_ok=True)
    own = {k: settings.pop(k) for k in ("loss", "validation", "packing") if k in settings}
    parts = {"loss": LogitKD(alpha=0.4, temperature=2), "validation": rows.select([])}
    if not isinstance(own.get("loss", LogitKD()), LossConfig):
        own["loss"] = Ready(made=own["loss"])
    parts |= {"packing": None, "batch_tokens": 64, "pad_id": 0} | own
    return training.Lesson(
        student=student,
        train=rows,
        cache=cache,
        settings=Training(**settings),
        folder=folder,
        **parts,
    )


def learn(given: training.Lesson, *, stop_at: int | None = None, progress=None):
    """Run the loop; with `stop_at` it is asked to stop after that step."""
    seen: list[int] = []
    carrier = InProcess(
        on_report=lambda step, line: seen.append(step),
        stop=lambda: stop_at is not None and seen[-1] >= stop_at,
    )
    return training.train(given, carrier, progress or Quiet())


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)
