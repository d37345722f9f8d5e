"""The Experiment and its sections: the one description of a distillation.

Identical from Python and YAML. Every section is frozen and refuses unknown keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kdframe.cache_parts import CacheConfig, CodecConfig
from kdframe.part import Place
from kdframe.parts import EvaluatorConfig, ExporterConfig, LossConfig, ProjectionConfig
from kdframe.plugins import Slot, installed

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Precision = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Base of the sections of an experiment."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


def _short(key: str) -> BeforeValidator:
    """Let a section be written as the string that is its main field."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class Lora(Section):
    """Low-rank adapters on a student; merged into `student/` when it is saved."""

    rank: PositiveInt = 16
    """Rank of the update matrices."""
    alpha: PositiveFloat = 32
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in front of the adapters."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get one."""


class Cut(Section):
    """A student made of some of the teacher's layers."""

    layers: PositiveInt | Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Indices of the layers to keep, or how many: the first half and the last half of them."""


class Teacher(Section):
    """The model to learn from. Always frozen, always in evaluation mode."""

    model: Place
    """A hub id, a folder, a `.gguf` file, or `pkg:package/path` in an installed package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Dtype = "auto"
    """Type of the weights; `auto` is the type that they are stored in (float32 for `.gguf`)."""
    adapter: Place | None = None
    """A LoRA adapter to put on the model."""
    quantize: Literal["int8", "int4"] | None = None
    """Quantise the weights while loading (needs the extra `bitsandbytes`)."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """Spread the model over devices (accelerate)."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class Student(Section):
    """The model that learns: a model, or a cut of the teacher; with LoRA or without."""

    model: Place | None = None
    """A hub id, a folder, a `.gguf` file, or `pkg:package/path` in an installed package."""
    from_teacher: Cut | None = None
    """Cut the student from the teacher's layers instead."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.from_teacher is None):
            raise ValueError("give either `model` or `from_teacher`")
        return self


class Source(Section):
    """A set of rows."""

    path: Place
    """A `.jsonl`, `.parquet` or `.txt` file, a folder (saved by `datasets`, or of such files),
    or the name of a dataset on the hub."""
    split: str = "train"
    """Split of a saved or hub dataset."""
    columns: Mapping[Literal["text", "messages", "prompt", "completion"], str] = {}
    """Names of the columns in the file, where they are not `text`, `messages` (or
    `conversations`), `prompt` and `completion` (or `response`)."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What one row of a `.txt` file is; paragraphs are parted by blank lines."""
    weight: PositiveFloat = 1.0
    """How often a row is used in an epoch; a fraction uses that share of the rows, another one
    each epoch."""
    teacher: bool = True
    """False: the rows give hard labels only, the teacher never reads them."""
    limit: PositiveInt | None = None
    """Use only the first rows."""


SourceField = Annotated[Source, _short("path")]


def _one_or_many(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


class Data(Section):
    """What is read, and how text becomes rows of tokens."""

    train: Annotated[tuple[SourceField, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
    """The rows to learn from."""
    validation: Annotated[float, Field(gt=0, lt=1)] | SourceField = 0.05
    """Held-out rows for early stopping: a source, or the share of the training rows to split off
    by a hash of their text."""
    test: Mapping[str, SourceField] = {}
    """Named held-out sets on which the models are compared at the end."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest row, in tokens."""
    long_rows: Literal["truncate", "split"] = "truncate"
    """Cut over-long rows off, or split them into windows of `max_length`."""
    truncation_side: Literal["left", "right"] = "right"
    """The side on which tokens are dropped."""
    chat_loss: Literal["assistant", "all"] = "assistant"
    """Tokens of a conversation that count: the assistant's turns, or all of them."""
    packing: bool = False
    """Put several rows into one sequence; they do not see each other."""
    transforms: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = ()
    """Augmentation: `module:function` from a row (a dict) to a row, a list of rows, or None; in
    order, on training rows only."""


class Training(Section):
    """How the student learns."""

    epochs: PositiveInt = 1
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimiser steps."""
    batch_size: PositiveInt = 8
    """Rows (or packed sequences) of a micro-batch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches of an optimiser step."""
    learning_rate: PositiveFloat = 1e-4
    """Highest learning rate."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decay, on matrices only."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the norm of the gradient; null does not."""
    precision: Precision = "float32"
    """Type of the forward pass (autocast); weights keep the student's own type."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    eval_steps: PositiveInt = 100
    """Steps between two evaluations on the validation rows (and two checkpoints)."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many evaluations without a lower hard-label loss on the validation rows."""
    seed: int = 0
    """Seed of order, dropout and adapters."""


class Evaluation(Section):
    """How teacher and student are measured."""

    evaluators: tuple[Annotated[EvaluatorConfig, Slot("evaluator")], ...] = Field(
        default=("perplexity", "agreement")  # type: ignore[arg-type]
    )
    """Measures of the models on every held-out set."""
    when_available: tuple[str, ...] = ()
    """Evaluators to use where they are installed, and to report as missing where they are not."""
    batch_tokens: PositiveInt = 2048
    """Tokens of one forward pass of evaluation and of capture."""


class Runtime(Section):
    """Where a run runs."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the models; `auto` takes a GPU if there is one."""
    threads: PositiveInt | None = None
    """CPU threads of torch."""


class Experiment(Section):
    """Teacher, student and data, and everything between them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Name of the run: its folder under `runs/`."""
    teacher: Annotated[Teacher, _short("model")]
    """The model to learn from."""
    student: Annotated[Student, _short("model")]
    """The model that learns."""
    data: Data
    """The rows."""
    cache: Annotated[CacheConfig, Slot("cache")] = Field(default="mmap")  # type: ignore[assignment]
    """Where the teacher's predictions are kept, and how they are written."""
    loss: Annotated[LossConfig, Slot("loss")] = Field(default="logit_kd")  # type: ignore[assignment]
    """What the student minimises."""
    projection: Annotated[ProjectionConfig, Slot("projection")] | None = None
    """The map between two vocabularies, where teacher and student do not share one."""
    training: Training = Training()
    """How the student learns."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """How teacher and student are measured."""
    export: tuple[Annotated[ExporterConfig, Slot("exporter")], ...] = ()
    """Formats to ship the student in; a plain Hugging Face folder is always saved."""
    runtime: Runtime = Runtime()
    """Where it runs."""

    @model_validator(mode="after")
    def _cache_serves_loss(self) -> Self:
        codec = self.cache.codec
        if fault := form_fault(self.loss, codec):
            raise ValueError(fault)
        for temperature in self.loss.temperatures():
            if not codec.serves(temperature):
                raise ValueError(
                    f"codec {codec.kind!r} does not serve temperature {temperature:g} of loss "
                    f"{self.loss.kind!r}; {codec.remedy(temperature)}"
                )
        return self

    def with_(self, changes: Mapping[str, Any]) -> Experiment:
        """A copy with some settings changed, by dotted path, through the same validation.

        `experiment.with_({"loss.temperature": 2.0})`. A change of a `kind` drops the old kind's
        settings.

        Raises:
            pydantic.ValidationError: a path or a value is wrong.
        """
        plain = self.plain()
        for path, value in changes.items():
            set_path(plain, path, value)
        return Experiment.model_validate(plain)

    def plain(self) -> dict[str, Any]:
        """The whole experiment as plain data (JSON types)."""
        return self.model_dump(mode="json")

    def run(self, **where: Any) -> Any:
        """Run the whole way: cache, train, evaluate, export. See `kdframe.pipeline.run`."""
        from kdframe import pipeline

        return pipeline.run(self, pipeline.Where(**where))

    def plan(self, **how: Any) -> Any:
        """Measure on some of the data what each codec keeps. See `kdframe.codec_plan.plan`."""
        from kdframe import codec_plan

        return codec_plan.plan(self, **how)

    def fingerprint(self) -> str:
        """Hash of all settings but the name, and where the run runs."""
        return fingerprint({k: v for k, v in self.plain().items() if k not in ("name", "runtime")})


def form_fault(loss: LossConfig, codec: CodecConfig) -> str:
    """Why a loss cannot read what a codec gives, and what it could; empty if it can."""
    if _reads(loss, codec):
        return ""
    return (
        f"loss {loss.kind!r} does not accept {codec.form} targets, which codec "
        f"{codec.kind!r} gives; it accepts: {', '.join(sorted(loss.accepts))}; "
        f"codecs that serve it: {', '.join(_codecs_of(loss)) or 'none installed'}"
    )


def _reads(loss: LossConfig, codec: CodecConfig | type[CodecConfig]) -> bool:
    # A loss meets hidden states as the dense distribution that they make.
    return ("dense" if codec.form == "hidden" else codec.form) in loss.accepts


def _codecs_of(loss: LossConfig) -> list[str]:
    """The installed codecs whose targets a loss reads, by name."""
    codecs = installed().kinds.get("codec", {}).values()
    return sorted(c.kind for c in codecs if _reads(loss, cast("type[CodecConfig]", c.part)))


def fingerprint(plain: Any) -> str:
    """Hash of plain data, independent of the order of keys."""
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def set_path(plain: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path in plain data; a new `kind` drops the settings of the old one.

    A section written as a string (a path, a kind) becomes a mapping with that main field.
    """
    *parents, last = path.split(".")
    at: Any = plain
    for name in parents:
        below = at[int(name)] if isinstance(at, list) and name.isdigit() else at.get(name)
        if isinstance(below, str):
            below = {_main_field(parents, name): below}
        if not isinstance(below, (dict, list)):
            below = {}
        if isinstance(at, list):
            at[int(name)] = below
        else:
            at[name] = below
        at = below
    if last == "kind" and at.get("kind") not in (None, value):
        at.clear()
    if isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value


def _main_field(parents: list[str], name: str) -> str:
    """The field that a section written as a string gives."""
    if name in ("teacher", "student"):
        return "model"
    return "path" if parents[0] == "data" else "kind"
