"""The parts that plugins bring: configuration classes and the things they build.

A part's configuration is a frozen pydantic model with a `kind` and its settings as fields; one
method builds what the engine runs. No module here imports torch: a part imports its maths inside
the method that builds it. Codecs and caches are in `cache_parts`.

Letters: `n` counted positions, `V` the vocabulary.
Position `t` of a row predicts token `t + 1`; the engine alone shifts, masks and cuts into chunks,
so a part only ever meets counted positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from kdframe.cache_parts import CacheConfig, CodecConfig
from kdframe.part import Part, TargetForm
from kdframe.schedules import Schedule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from kdframe.targets import ChunkTargets, TeacherTargets

Role = Literal["teacher", "student_before", "student"]


# ------------------------------------------------------------------------------------- losses
@dataclass(frozen=True)
class LossTerms:
    """What a loss says of `n` positions.

    Attributes:
        total: `[n]` float32, nats; what is minimised.
        terms: named parts of it, `[n]` each, for the log (`hard`, `soft`, ...).
    """

    total: Tensor
    terms: Mapping[str, Tensor]


class Loss(Protocol):
    """A stateless function of `n` counted positions."""

    def __call__(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> LossTerms:
        """Compare a student with its teacher.

        Args:
            logits: `[n, V]` float32, the student's, at T = 1.
            targets: the teacher's distribution for the same positions.
            labels: `[n]` int64, the token that came next.
        """


@runtime_checkable
class AnalyticLoss(Loss, Protocol):
    """A loss that knows its own gradient: faster than what autograd makes of it."""

    def with_gradient(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> LossTerms:
        """The same terms, `hard` among them; `logits` becomes the gradient of `total.sum()`."""


class LossConfig(Part):
    """Settings of a loss."""

    accepts: ClassVar[frozenset[TargetForm]] = frozenset({"truncated", "dense"})
    """The forms of TeacherTargets that the loss understands."""

    def temperatures(self) -> tuple[float, ...]:
        """The temperatures at which the loss will read the teacher.

        Of a schedule its two ends: a codec that serves both serves what lies between them.
        """
        return (1.0,)

    def at(self, progress: float) -> Self:
        """The settings at a share of the training, 0 to 1: every schedule at its value.

        The engine asks before each optimiser step, and builds the loss anew when they changed.
        """
        now = {name: value.at(progress) for name, value in self if isinstance(value, Schedule)}
        return self.model_copy(update=now) if now else self

    def describe(self) -> str:
        """What it minimises, in words, for the header of a run."""
        settings = self.model_dump(mode="json", exclude={"kind"})
        return ", ".join([self.kind, *(f"{name} {value}" for name, value in settings.items())])

    def build(self) -> Loss:
        """The loss itself; the engine calls it on settings without schedules, see `at`."""
        raise NotImplementedError


# -------------------------------------------------------------------------------- projections
class Projection(Protocol):
    """A map from the teacher's vocabulary to the student's."""

    def __call__(self, targets: TeacherTargets) -> TeacherTargets:
        """The same predictions over the student's ids; mass without a home joins the tail."""


class ProjectionConfig(Part):
    """Settings of a vocabulary projection."""

    def build(self, teacher: Mapping[int, bytes], student: Mapping[int, bytes]) -> Projection:
        """Build the map from the two tokenizers' id to bytes tables."""
        raise NotImplementedError


# --------------------------------------------------------------------------------- evaluators
@dataclass(frozen=True)
class Figure:
    """A measured value, which direction is better, and its 95 % interval where it samples."""

    value: float
    better: Literal["lower", "higher"]
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class EvaluationRow:
    """One held-out row: the bytes of the text that its counted tokens spell, and their number."""

    text_bytes: int
    counted: int


Measure = Callable[["Tensor", "Tensor", "ChunkTargets | None"], Mapping[str, "Tensor"]]
"""`(logits [n, V], labels [n], targets or None) -> {name: [n]}` for counted positions."""


class Subject(Protocol):
    """A model, and the held-out set on which it is to be measured."""

    @property
    def role(self) -> Role:
        """Which of the models it is."""

    @property
    def rows(self) -> Sequence[EvaluationRow]:
        """The held-out rows."""

    @property
    def has_targets(self) -> bool:
        """Whether the teacher read every row, so that a measure gets its predictions."""

    def per_row(self, measure: Measure) -> dict[str, NDArray[np.float64]]:
        """Sums of the measured values over each row's counted positions, `[rows]` by name.

        The model runs in evaluation mode; `[tokens, V]` is never held. Where several evaluators
        ask, the model runs once for each.
        """


class Evaluator(Protocol):
    """A measure of a model."""

    def __call__(self, subject: Subject) -> dict[str, Figure]:
        """Named figures; empty where the measure does not apply to the subject."""


class EvaluatorConfig(Part):
    """Settings of an evaluator."""

    def build(self) -> Evaluator:
        """The evaluator itself."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------- exporters
@dataclass(frozen=True)
class ExportContext:
    """What an exporter may use.

    Attributes:
        card: the model card, in Markdown.
        facts: what the card tells of the run: name, teacher, data, settings.
        probe: rows of token ids on which the written file is compared with the student.
        load: a service: load a causal language model from a folder, in float32 and eval mode.
    """

    card: str
    facts: Mapping[str, str]
    probe: Sequence[Sequence[int]]
    load: Callable[[Path], Any]


@dataclass(frozen=True)
class ExportReport:
    """What was written and what running it showed."""

    kind: str
    files: Sequence[str]
    bytes: int
    status: Literal["verified", "unverified", "failed"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    tokens_equal: bool | None = None
    types: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""


class Exporter(Protocol):
    """Writes a student in a format that people run, and runs it."""

    def __call__(self, student: Path, out: Path, context: ExportContext) -> ExportReport:
        """Fill the empty folder `out` from the plain Hugging Face folder `student`."""


class ExporterConfig(Part):
    """Settings of an exporter."""

    def build(self) -> Exporter:
        """The exporter itself."""
        raise NotImplementedError


SLOTS: Mapping[str, type[Part]] = {
    "loss": LossConfig,
    "projection": ProjectionConfig,
    "codec": CodecConfig,
    "cache": CacheConfig,
    "evaluator": EvaluatorConfig,
    "exporter": ExporterConfig,
}
"""Every place in an experiment where a plugin's part can stand, and the class it must derive."""


def kind_of(part: type[Part]) -> str | None:
    """The kind that a configuration class declares, or None."""
    default = part.model_fields["kind"].default
    return default if isinstance(default, str) and default else None
