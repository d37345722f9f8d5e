"""A run's folder: who owns it, what is done, and what it was made with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from kdframe import durable, reading
from kdframe.errors import DamagedError, InputError
from kdframe.experiment import Experiment
from kdframe.plugins import installed

MANIFEST = "manifest.json"
EXPERIMENT = "experiment.yaml"
_PACKAGES = ("kdframe", "torch", "transformers", "datasets", "ray", "numpy", "tokenizers")


class RunFolder:
    """`runs/<name>/`: claimed for one experiment, with a manifest of what is done.

    Raises:
        InputError: the folder belongs to an experiment with other settings; names them.
    """

    def __init__(self, experiment: Experiment, runs: Path) -> None:
        self.path = runs.resolve() / experiment.name
        self.experiment = experiment
        refuse_other(experiment, runs)
        self.path.mkdir(parents=True, exist_ok=True)
        durable.remove_leftovers(self.path)
        self.manifest: dict[str, Any] = self._read() or {
            "experiment": experiment.fingerprint(),
            "status": "running",
            "done": {},
            "seconds": {},
        }
        self.manifest |= {
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "plugins": [asdict(plugin) for plugin in installed().found],
            "hardware": _hardware(),
            "seed": experiment.training.seed,
        }
        if not (self.path / EXPERIMENT).exists():
            durable.write_text(self.path / EXPERIMENT, reading.dump(experiment))
        self._write()

    def done(self, stage: str) -> Any:
        """What a finished stage noted, or None."""
        return self.manifest["done"].get(stage)

    def finish(self, stage: str, note: Any, seconds: float) -> None:
        """Note that a stage is done."""
        self.manifest["done"][stage] = note
        self.manifest["seconds"][stage] = round(seconds, 3)
        self._write()

    def note(self, **facts: Any) -> None:
        """Put facts into the manifest."""
        self.manifest |= facts
        self._write()

    def _read(self) -> dict[str, Any] | None:
        path = self.path / MANIFEST
        if not path.exists():
            return None
        try:
            whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedError(f"{path}: damaged ({error}); remove the run's folder") from error
        return whole

    def _write(self) -> None:
        durable.write_json(self.path / MANIFEST, self.manifest)


def refuse_other(experiment: Experiment, runs: Path) -> None:
    """Refuse a run's name that other settings have already taken.

    Raises:
        InputError: names the settings that differ and a free name.
    """
    folder = runs.resolve() / experiment.name
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / EXPERIMENT).exists():
        raise InputError(f"{folder}: not empty, and not a run; take another name with --name")
    old = YAML(typ="safe").load((folder / EXPERIMENT).read_text(encoding="utf-8"))
    differing = _differences(_compared(old), _compared(experiment.plain()))
    if not differing:
        return
    free = next(
        name
        for i in range(2, 10_000)
        if not (folder.parent / (name := f"{experiment.name}-{i}")).exists()
    )
    raise InputError(
        f"{folder}: belongs to an experiment with other settings: {'; '.join(differing)}; "
        f"run it under another name with --name {shlex.quote(free)}"
    )


def _compared(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key not in ("name", "runtime")}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in sorted({*old, *new})
            for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]


def _hardware() -> dict[str, Any]:
    import torch

    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
