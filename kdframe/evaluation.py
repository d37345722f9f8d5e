"""The stage that measures teacher and student on named held-out sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdframe.batching import TokenRows
from kdframe.output_layer import Halves
from kdframe.parts import EvaluationRow, EvaluatorConfig, Figure, Measure, Role
from kdframe.progress import Bar, Progress
from kdframe.scoring import score
from kdframe.teacher_cache import TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Setting:
    """How models are measured: the evaluators, and the shape of a forward pass."""

    evaluators: Sequence[EvaluatorConfig]
    pad_id: int
    batch_tokens: int


@dataclass
class ModelOnSet:
    """A model and a held-out set: the `Subject` that evaluators meet."""

    role: Role
    halves: Halves
    tokens: TokenRows
    cache: TeacherCache | None
    setting: Setting
    bar: Bar
    rows: Sequence[EvaluationRow] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [
            EvaluationRow(int(self.tokens.text_bytes[i]), len(self.tokens.positions(i)))
            for i in range(len(self.tokens))
        ]

    @property
    def has_targets(self) -> bool:
        """Whether the teacher read every row."""
        return self.cache is not None and bool(self.tokens.taught.all())

    def per_row(self, measure: Measure) -> dict[str, NDArray[np.float64]]:
        """Sums of the measured values over each row's counted positions."""
        return score(
            self.halves,
            self.tokens,
            measure,
            pad_id=self.setting.pad_id,
            batch_tokens=self.setting.batch_tokens,
            cache=self.cache if self.has_targets else None,
            bar=self.bar,
        )


Figures = dict[str, dict[str, Figure]]
"""Held-out set to metric to figure."""


def evaluate(
    role: Role,
    model: PreTrainedModel,
    sets: Mapping[str, TokenRows],
    setting: Setting,
    *,
    cache: TeacherCache | None,
    progress: Progress,
) -> Figures:
    """Every evaluator's figures for a model, on every set that has rows."""
    halves = Halves(model)
    sets = {name: rows for name, rows in sets.items() if len(rows)}
    total = sum(int(rows.lengths.sum()) for rows in sets.values())
    figures: Figures = {name: {} for name in sets}
    name = role.replace("_", " ")
    with progress.stage(f"evaluate {name}", total * len(setting.evaluators), "tokens") as bar:
        for config in setting.evaluators:
            evaluator = config.build()
            for set_name, rows in sets.items():
                subject = ModelOnSet(role, halves, rows, cache, setting, bar)
                figures[set_name] |= evaluator(subject)
    return figures


def plain(figures: Figures) -> dict[str, Any]:
    """Figures as JSON."""
    return {
        name: {metric: vars(figure) for metric, figure in by_metric.items()}
        for name, by_metric in figures.items()
    }


def combine(by_role: Mapping[str, Mapping[str, Any]], missing: Sequence[str]) -> dict[str, Any]:
    """`evaluation.json`: set, metric, then a value for each model.

    Args:
        by_role: plain figures of each model.
        missing: evaluators that were asked for and are not installed.
    """
    sets: dict[str, Any] = {}
    for role, figures in by_role.items():
        for set_name, metrics in figures.items():
            for metric, figure in metrics.items():
                entry = sets.setdefault(set_name, {}).setdefault(metric, {})
                entry[role] = figure["value"]
                entry["better"] = figure["better"]
                if role == "student" and figure["ci95"] is not None:
                    entry["ci95"] = figure["ci95"]
    whole: dict[str, Any] = {"sets": sets}
    if missing:
        whole["unavailable"] = dict.fromkeys(missing, "no such evaluator is installed")
    return whole
