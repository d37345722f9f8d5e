"""A run's folder: who owns it, what is done, and what it was made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kdframe import durable, reading
from kdframe.errors import DamagedError, InputError, Interrupted
from kdframe.experiment import Experiment
from kdframe.plugins import installed

MANIFEST = "manifest.json"
EXPERIMENT = "experiment.yaml"
_WAIT = 0.5  # seconds between two looks at a lock
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
        before = _read(self.path)
        if not before.get("done"):  # nothing to lose: other settings may have claimed the name
            (self.path / EXPERIMENT).unlink(missing_ok=True)
            before = {}
        self.manifest: dict[str, Any] = before or {
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

    def _write(self) -> None:
        durable.write_json(self.path / MANIFEST, self.manifest)


def refuse_other(
    experiment: Experiment, runs: Path, command: str = "kdframe run EXPERIMENT"
) -> None:
    """Refuse a run's name that other settings have already taken.

    A run that has finished no stage holds nothing, and does not stand in the way.

    Args:
        command: what the user typed; the refusal prints it with a free name.

    Raises:
        InputError: names the settings that differ and a free name.
        DamagedError: the run's files cannot be read.
    """
    require_folder(runs, "--runs")
    folder = runs.resolve() / experiment.name
    if not folder.exists() or not any(folder.iterdir()):
        return
    other = f"{command} --name {shlex.quote(free_name(experiment, runs))}"
    if not (folder / EXPERIMENT).exists() and not (folder / MANIFEST).exists():
        raise InputError(f"{folder}: not empty, and not a run; take another name: {other}")
    if not _read(folder).get("done"):
        return
    differing = _differences(_settings_of(folder), _compared(experiment.plain()))
    if differing:
        raise InputError(
            f"{folder}: belongs to an experiment with other settings: {'; '.join(differing)}; "
            f"take another name: {other}"
        )


def free_name(experiment: Experiment, runs: Path) -> str:
    """The first of NAME-2, NAME-3, ... that no run has."""
    names = (f"{experiment.name}-{i}" for i in range(2, 10_000))
    return next(name for name in names if not (runs / name).exists())


def require_folder(path: Path, option: str) -> None:
    """Refuse a path that is not a folder, and cannot become one that can be written.

    Raises:
        InputError: names the option, and what stands there.
    """
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise InputError(f"{option} {path}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"{option} {path}: {there} cannot be written; name another folder")


def lock(experiment: Experiment, runs: Path, timeout: float = -1) -> FileLock:
    """The lock that a process holds while it works on a run."""
    return durable.lock(runs.resolve() / f".{experiment.name}.lock", timeout)


def wait_for_others(
    experiment: Experiment, runs: Path, say: Callable[[str], None], stop: Callable[[], bool]
) -> None:
    """Wait until no other process works on the run; says so once.

    Raises:
        Interrupted: `stop` became true.
    """
    said = False
    while True:
        try:
            with lock(experiment, runs, timeout=_WAIT if said else 0):
                return
        except Timeout:
            if not said:
                say(f"another process works on {runs / experiment.name}; waiting until it ends")
            said = True
            if stop():
                raise Interrupted("stopped while waiting; nothing was begun") from None


def _read(folder: Path) -> dict[str, Any]:
    """The manifest; empty where there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(f"{path}: damaged ({error}); remove the run's folder") from error
    if not isinstance(whole, dict):
        raise DamagedError(f"{path}: damaged (not a mapping); remove the run's folder")
    return whole


def _settings_of(folder: Path) -> dict[str, Any]:
    """What a run was begun with; settings that came into kdframe since have their defaults."""
    path = folder / EXPERIMENT
    try:
        plain = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path}: damaged ({reason}); remove the run's folder") from error
    if not isinstance(plain, dict):
        raise DamagedError(f"{path}: damaged (not a mapping); remove the run's folder")
    with contextlib.suppress(InputError):  # a setting or a kind that is no more
        plain = reading.from_plain(plain).plain()
    return _compared(plain)


def _compared(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key not in ("name", "runtime")}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
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
