"""Checks of an experiment that touch no model and answer at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdframe import data, locating, runs, sources
from kdframe.errors import InputError
from kdframe.experiment import Experiment, Source
from kdframe.plugins import installed


@dataclass(frozen=True)
class Guard:
    """One check: what it saw, how bad that is, what mends it."""

    name: str
    level: Literal["error", "warning", "note"]
    evidence: str
    remedy: str = ""


def static(
    experiment: Experiment, folder: Path, command: str = "kdframe run EXPERIMENT"
) -> list[Guard]:
    """Everything that can be known without a model: files, columns, splits, names.

    Args:
        folder: the folder of all runs.
        command: what the user typed, to be printed with a free name.

    Raises:
        DamagedError: a run of this name is there, and its files cannot be read.
    """
    guards = inputs(experiment)
    try:
        runs.refuse_other(experiment, folder, command)
    except InputError as error:
        guards.append(Guard("run", "error", str(error)))
    for kind in experiment.evaluation.when_available:
        guards.append(
            Guard(
                "evaluators",
                "warning",
                f"evaluation: no evaluator of kind {kind!r} can run here; its figures will be "
                f"missing from the result",
                installed().absence("evaluator", kind),
            )
        )
    for plugin in installed().found:
        if plugin.broken:
            guards.append(Guard("plugins", "warning", f"plugin {plugin} {plugin.broken}"))
    return guards


def inputs(experiment: Experiment) -> list[Guard]:
    """The static checks of data and models."""
    guards = [Guard("data", "error", fault) for fault in _data_faults(experiment)]
    return guards + [Guard("models", "error", fault) for fault in _model_faults(experiment)]


def folders(**options: Path) -> list[Guard]:
    """Whether the folders that were given as options can be written."""
    guards = []
    for name, folder in options.items():
        try:
            runs.require_folder(folder, f"--{name}")
        except InputError as error:
            guards.append(Guard(name, "error", str(error)))
    return guards


def require_static(experiment: Experiment, folder: Path) -> None:
    """Refuse what cannot run, with every fault.

    Raises:
        InputError: any static check is an error.
    """
    refuse(static(experiment, folder))


def refuse(guards: Iterable[Guard]) -> None:
    """Raise the errors among the guards, if there are any.

    Raises:
        InputError: one of them is an error.
    """
    faults = [guard.evidence for guard in guards if guard.level == "error"]
    if faults:
        raise InputError(*faults)


def _data_faults(experiment: Experiment) -> list[str]:
    section = experiment.data
    named: list[tuple[str, Source]] = [
        (f"data.train.{i}", source) for i, source in enumerate(section.train)
    ]
    if not isinstance(section.validation, float):
        named.append(("data.validation", section.validation))
    named += [(f"data.test.{name}", source) for name, source in section.test.items()]
    faults = [f"{path}: {fault}" for path, source in named for fault in sources.check(source)]
    return faults + data.check_transforms(section)


def _model_faults(experiment: Experiment) -> list[str]:
    # Nobody asks the weights of a teacher whose predictions are imported, unless they are cut.
    asked = experiment.cache.imported is None or experiment.student.model is None
    named = [("teacher.model", experiment.teacher.model, asked)]
    if experiment.student.model is not None:
        named.append(("student.model", experiment.student.model, True))
    return [
        f"{path}: {fault}"
        for path, model, weights in named
        for fault in locating.check(model, weights)
    ]
