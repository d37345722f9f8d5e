"""The pluggy hook specifications. `CONTRACT` is their version.

Collected hooks take no argument and answer with configuration classes. Lifecycle hooks are told
what happens in a run; one that raises is reported and dropped, and never ends the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pluggy

from kdframe import cache_parts, parts

CONTRACT = 0
"""Version of the hook contract. A plugin module may state the one it needs as `CONTRACT`."""

GROUP = "kdframe"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def kdframe_losses() -> Sequence[type[parts.LossConfig]]:
    """Losses that compare a student with its teacher."""
    return ()


@hookspec
def kdframe_projections() -> Sequence[type[parts.ProjectionConfig]]:
    """Maps from a teacher's vocabulary to a student's."""
    return ()


@hookspec
def kdframe_codecs() -> Sequence[type[cache_parts.CodecConfig]]:
    """Ways to write a distribution in few bytes."""
    return ()


@hookspec
def kdframe_caches() -> Sequence[type[cache_parts.CacheConfig]]:
    """Places to keep a teacher's predictions."""
    return ()


@hookspec
def kdframe_evaluators() -> Sequence[type[parts.EvaluatorConfig]]:
    """Measures of a model."""
    return ()


@hookspec
def kdframe_exporters() -> Sequence[type[parts.ExporterConfig]]:
    """Formats to ship a student in."""
    return ()


@hookspec
def kdframe_run_started(run: Path) -> None:
    """A run begins or goes on; `run` is its folder."""


@hookspec
def kdframe_metrics(run: Path, step: int, metrics: Mapping[str, float]) -> None:
    """A line was added to the run's `metrics.jsonl`."""


@hookspec
def kdframe_checkpoint(run: Path, step: int, folder: Path) -> None:
    """A checkpoint is complete on the disk."""


@hookspec
def kdframe_run_finished(run: Path, status: str) -> None:
    """A run ended: `done`, `interrupted` or `failed`."""


COLLECTED: Mapping[str, str] = {
    "kdframe_losses": "loss",
    "kdframe_projections": "projection",
    "kdframe_codecs": "codec",
    "kdframe_caches": "cache",
    "kdframe_evaluators": "evaluator",
    "kdframe_exporters": "exporter",
}
"""Collected hook to the slot that it fills."""
