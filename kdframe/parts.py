"""The parts that plugins bring: configuration classes and the things they build.

A part's configuration is a frozen pydantic model with a `kind` and its settings as fields; one
method builds what the engine runs. No module here imports torch: a part imports its maths inside
the method that builds it.

Letters: `n` counted positions, `V` the vocabulary, `B` bytes of one record.
Position `t` of a row predicts token `t + 1`; the engine alone shifts, masks and cuts into chunks,
so a part only ever meets counted positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

import pydantic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from kdframe.targets import TeacherTargets

TargetForm = Literal["truncated", "dense"]
Role = Literal["teacher", "student_before", "student"]

_FILE_ENDINGS = frozenset({".jsonl", ".json", ".parquet", ".txt", ".gguf"})


def _found(value: str, info: pydantic.ValidationInfo) -> str:
    """Make a path absolute. What exists, or looks like a path, is one; all else is a name."""
    base = (info.context or {}).get("base")
    if base is None or value.startswith("pkg:"):
        return value
    path = Path(base, value).expanduser()
    looks_local = (
        value.startswith((".", "/", "~"))
        or path.suffix in _FILE_ENDINGS
        or value.count("/") > 1  # a hub id has one slash at most
    )
    return str(path.resolve()) if looks_local or path.exists() else value


def _absolute(value: Path, info: pydantic.ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return value if base is None else Path(base, value).expanduser().resolve()


Place = Annotated[str, pydantic.AfterValidator(_found)]
"""A hub name, `pkg:package/path`, or a path (relative to the file that names it)."""

Folder = Annotated[Path, pydantic.AfterValidator(_absolute)]
"""A folder (relative to the file that names it)."""


class Part(pydantic.BaseModel):
    """Base of every configuration class that a plugin brings.

    A subclass declares its name as `kind: Literal["my_kind"] = "my_kind"`.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    requires: ClassVar[tuple[str, ...]] = ()
    """Modules that must be importable; a part whose module is missing is listed as unavailable."""
    install: ClassVar[str] = ""
    """The `pip install` line that brings them."""

    kind: str


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

    def __call__(self, logits: Tensor, targets: TeacherTargets, labels: Tensor) -> LossTerms:
        """Compare a student with its teacher.

        Args:
            logits: `[n, V]` float32, the student's, at T = 1.
            targets: the teacher's distribution for the same positions.
            labels: `[n]` int64, the token that came next.
        """


class LossConfig(Part):
    """Settings of a loss."""

    accepts: ClassVar[frozenset[TargetForm]] = frozenset({"truncated", "dense"})
    """The forms of TeacherTargets that the loss understands."""

    def temperatures(self) -> tuple[float, ...]:
        """Every temperature at which the loss will read the teacher."""
        return (1.0,)

    def describe(self) -> str:
        """What it minimises, in words, for the header of a run."""
        settings = self.model_dump(mode="json", exclude={"kind"})
        return ", ".join([self.kind, *(f"{name} {value}" for name, value in settings.items())])

    def build(self) -> Loss:
        """The loss itself."""
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


# ------------------------------------------------------------------------------------- codecs
class Codec(Protocol):
    """How the distribution at one position becomes a record of fixed size, and back."""

    record_bytes: int

    def encode(self, logits: Tensor) -> NDArray[np.uint8]:
        """`logits [n, V]` float32 at T = 1, finite or `-inf`, to records `[n, B]`."""

    def decode(self, records: NDArray[np.uint8]) -> TeacherTargets:
        """Records `[n, B]` to targets."""


class CodecConfig(Part):
    """Settings of a codec."""

    form: ClassVar[TargetForm]
    """The form of TeacherTargets that it decodes to."""

    def serves(self, temperature: float) -> bool:
        """Whether the targets can be read at `temperature`."""
        raise NotImplementedError

    def record_bytes(self, vocab_size: int) -> int:
        """Bytes of one position's record."""
        raise NotImplementedError

    def build(self, vocab_size: int) -> Codec:
        """The codec for a teacher with `vocab_size` output rows."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------- caches
@dataclass(frozen=True)
class RowPositions:
    """A row of text, by key, and the positions of it that count.

    Attributes:
        key: hash of the teacher's token ids.
        positions: `[n]` int32, ascending.
    """

    key: bytes
    positions: NDArray[np.int32]


@dataclass(frozen=True)
class BadRow:
    """A damaged row: its key in hexadecimal, the shard's file name, and what is wrong."""

    row: str
    shard: str
    reason: str


@dataclass(frozen=True)
class CacheSpec:
    """What a cache must hold, whoever keeps it.

    Attributes:
        identity: everything that changes the records, by name (weights, tokenizer, codec, ...).
        folder: where it lives unless the backend's settings say otherwise.
        record_bytes: size of one position's record.
        codec: the codec's settings as plain data, for the manifest.
    """

    identity: Mapping[str, str]
    folder: Path
    record_bytes: int
    codec: Mapping[str, Any]


class Cache(Protocol):
    """Records of a teacher's predictions, addressed by key. Safe with other writers."""

    folder: Path

    def missing(self, rows: Sequence[RowPositions]) -> list[int]:
        """Indices of the rows whose stored positions do not cover what is asked."""

    def write(self, rows: Sequence[RowPositions], records: Sequence[NDArray[np.uint8]]) -> None:
        """Store `records[i]` `[n_i, B]` for `rows[i]`. Durable on return; idempotent."""

    def read(self, rows: Sequence[RowPositions]) -> NDArray[np.uint8]:
        """Records of all rows' positions, in their order, `[sum n_i, B]`.

        Raises:
            DamagedError: a row is absent, does not hold a position, or fails its checksum.
        """

    def verify(self) -> tuple[int, list[BadRow]]:
        """How many rows there are, and every one whose bytes are not what was written."""

    def drop(self, rows: Sequence[BadRow]) -> None:
        """Forget rows, so that they are missing."""

    def info(self) -> dict[str, Any]:
        """Counts and sizes as plain data: `rows`, `positions`, `bytes`, `shards`, `identity`."""


class CacheConfig(Part):
    """Settings of a cache backend. A subclass has a field `codec: CodecSlot`."""

    codec: Any

    def open(self, spec: CacheSpec) -> Cache:
        """Open the cache, or begin it.

        Raises:
            InputError: the folder holds another identity; names the parts that differ.
        """
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


Measure = Callable[["Tensor", "Tensor", "TeacherTargets | None"], Mapping[str, "Tensor"]]
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
