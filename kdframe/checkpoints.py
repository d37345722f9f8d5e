"""Checkpoints: whole, summed, and skipped when damaged.

A checkpoint is a folder `step-N` that appears by rename. Its `complete.json` holds the sum of
every file; one that is damaged is named, and the one before it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdframe import durable
from kdframe.errors import DamagedError
from kdframe.progress import Progress

COMPLETE = "complete.json"
_FILES = {"model.safetensors", "optimizer.safetensors", "state.json"}


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        step: optimiser steps done.
        best: the step of the best checkpoint so far, which must be there too; 0 for none.
        model: trained weights by name.
        optimizer: the optimiser's tensors by name, random states among them.
        state: everything else, as plain data.
    """

    step: int
    best: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-N` whole; keep it, the one before it and the best, and no other."""
    target = folder / f"step-{checkpoint.step}"
    with durable.folder(target) as aside:
        save_file(_contiguous(checkpoint.model), aside / "model.safetensors")
        save_file(_contiguous(checkpoint.optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(
            json.dumps(
                {"step": checkpoint.step, "best": checkpoint.best, "state": checkpoint.state}
            ),
            encoding="utf-8",
        )
        sums = {file.name: _sum(file) for file in sorted(aside.iterdir())}
        (aside / COMPLETE).write_text(json.dumps(sums), encoding="utf-8")
    before = [step for step in steps(folder) if step < checkpoint.step][-1:]
    for step in steps(folder):
        if step not in (checkpoint.step, checkpoint.best, *before):
            shutil.rmtree(folder / f"step-{step}")
    return target


def steps(folder: Path) -> list[int]:
    """The steps at which there are checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def latest(folder: Path, progress: Progress) -> Checkpoint | None:
    """The newest checkpoint that is whole, and its best one too; names those passed over."""
    damaged = False
    for step in reversed(steps(folder)):
        try:
            found = load(folder / f"step-{step}")
            if found.best not in (0, step):
                load_weights(folder / f"step-{found.best}")  # the run will end with it
            return found
        except DamagedError as error:
            damaged = True
            progress.say(f"{error}; step {step} is passed over")
    if damaged:
        progress.say(f"{folder}: no whole checkpoint is left; training begins anew")
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DamagedError: a file is missing or is not what was written.
    """
    model = load_weights(path)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    optimizer = load_file(path / "optimizer.safetensors")
    return Checkpoint(state["step"], state["best"], model, optimizer, state["state"])


def load_weights(path: Path) -> dict[str, Tensor]:
    """Only the trained weights; every file of the checkpoint is checked."""
    try:
        sums = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        wrong = [name for name, wanted in sums.items() if _sum(path / name) != wanted]
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path}: not a whole checkpoint: {error}") from error
    if wrong or set(sums) != _FILES:
        raise DamagedError(f"{path}: damaged: {', '.join(wrong) or COMPLETE}")
    return load_file(path / "model.safetensors")


def _sum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while piece := stream.read(2**23):
            digest.update(piece)
    return digest.hexdigest()


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
