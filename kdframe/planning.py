"""What a run would cost, measured on a sample of its own tokens."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kdframe import batching, caching, durable, models
from kdframe.batching import TokenRows
from kdframe.checks import Guard
from kdframe.errors import InputError
from kdframe.experiment import Experiment
from kdframe.losses import StudentWithLoss
from kdframe.materials import Materials
from kdframe.output_layer import Halves
from kdframe.plugins import installed
from kdframe.targets import resized

SAMPLE_TOKENS = 1024


@dataclass(frozen=True)
class Estimate:
    """What a run would cost, from a measured sample.

    Attributes:
        tokens: tokens of all training rows, once.
        sample_tokens: how many of them were run through the models.
        cache_bytes: size of the teacher cache; by codec in `cache_bytes_by_codec`.
        peak_memory_bytes: largest memory of a run in this process.
        seconds: capture, training and evaluation together.
    """

    tokens: int
    sample_tokens: int
    cache_bytes: int
    cache_bytes_by_codec: Mapping[str, int]
    peak_memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Check:
    """What `kdframe check` found: guards, and the estimate if no static error stood before it."""

    guards: Sequence[Guard]
    estimate: Estimate | None = None

    @property
    def errors(self) -> list[Guard]:
        """The guards that would stop a run."""
        return [guard for guard in self.guards if guard.level == "error"]

    def plain(self) -> dict[str, Any]:
        """The check as JSON."""
        guards = [asdict(guard) for guard in self.guards]
        return {"guards": guards, "estimate": asdict(self.estimate) if self.estimate else None}


def measure(materials: Materials) -> Check:
    """Run a sample of the training rows through teacher and student, and reckon from it.

    Raises:
        InputError: tokenizers that differ, unreadable rows, a model that cannot be loaded.
    """
    experiment = materials.experiment
    dataset = materials.dataset
    sample = _sample(dataset.train)
    teacher = Halves(materials.teacher)
    codec = experiment.cache.codec.build(teacher.vocab_size)
    requests = [sample.request(i) for i in range(len(sample))]
    records: list[Any] = []
    rows = [sample.row(i) for i in range(len(sample))]
    capture = _seconds(lambda: records.extend(caching.capture(teacher, codec, rows, requests)))
    step = _seconds(lambda: _train_on(materials, sample, np.concatenate(records)))
    tokens = int(sample.lengths.sum())
    estimate = _reckon(materials, capture / tokens, step / tokens, tokens)
    return Check(_room(materials, estimate), estimate)


def _sample(rows: TokenRows) -> TokenRows:
    """The first rows up to the sample's size (at least one)."""
    many = int(np.searchsorted(np.cumsum(rows.lengths), SAMPLE_TOKENS)) + 1
    return rows.select(np.arange(min(many, len(rows))))


def _train_on(materials: Materials, sample: TokenRows, records: Any) -> None:
    """One forward and backward pass of the student on the sample."""
    experiment = materials.experiment
    codec = experiment.cache.codec.build(materials.teacher_rows)
    student = models.load_student(
        experiment.student,
        teacher=experiment.teacher,
        teacher_model=materials.teacher,
        device=materials.device,
        seed=experiment.training.seed,
    )
    halves = Halves(models.causal_lm(student))
    module = StudentWithLoss(student, halves, experiment.loss.build())
    batch = tuple((i,) for i in range(len(sample)))
    one = batching.collate(sample, batch, pad_id=materials.pad_id)
    targets = resized(codec.decode(records), halves.vocab_size)
    to = materials.device
    inputs = {
        "input_ids": torch.from_numpy(one.input_ids).to(to),
        "attention_mask": torch.from_numpy(one.attention_mask).to(to),
    }
    labels = torch.from_numpy(one.labels).to(to)
    positions = torch.from_numpy(one.counted).to(to)
    taught = torch.ones_like(labels, dtype=torch.bool)
    module(inputs, positions, labels, taught, targets.to(to)).total.backward()


def _reckon(materials: Materials, capture: float, train: float, sample: int) -> Estimate:
    """`capture` and `train` are seconds per token."""
    experiment, dataset = materials.experiment, materials.dataset
    held_out = [dataset.validation, *dataset.test.values()]
    tokens = int(dataset.train.lengths.sum())
    held = sum(int(rows.lengths.sum()) for rows in held_out)
    positions = sum(
        len(rows.positions(int(i)))
        for rows in (dataset.train, *held_out)
        for i in np.flatnonzero(rows.taught)
    )
    evaluators = len(experiment.evaluation.evaluators)
    forward = train / 3  # a backward pass costs about two forward passes
    seconds = (
        (tokens + held) * capture
        + tokens * experiment.training.epochs * train
        + held * (capture + 2 * evaluators * forward)
    )
    sizes = _sizes(experiment, positions, materials.teacher_rows)
    return Estimate(
        tokens=tokens,
        sample_tokens=sample,
        cache_bytes=sizes[experiment.cache.codec.kind],
        cache_bytes_by_codec=sizes,
        peak_memory_bytes=_peak_memory(),
        seconds=round(seconds, 1),
    )


def _sizes(experiment: Experiment, positions: int, vocab_size: int) -> dict[str, int]:
    """Cache size with the experiment's codec, and with the defaults of every other one."""
    codecs = {kind: found.part() for kind, found in installed().kinds["codec"].items()}  # type: ignore[call-arg]
    codecs[experiment.cache.codec.kind] = experiment.cache.codec
    return {kind: positions * codec.record_bytes(vocab_size) for kind, codec in codecs.items()}  # type: ignore[attr-defined]


def _room(materials: Materials, estimate: Estimate) -> list[Guard]:
    """Whether the cache fits on the disk."""
    try:
        needed = int(estimate.cache_bytes * 1.1)
        durable.require_space(materials.caches, needed, "the teacher cache")
    except InputError as error:
        return [Guard("disk", "error", str(error), "fewer ids (cache.codec.k), or another disk")]
    return []


def _peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _seconds(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
