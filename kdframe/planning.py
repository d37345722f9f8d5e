"""What a run would cost, measured on a sample of its own tokens."""

from __future__ import annotations

import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from kdframe import batching, caching, durable, models, sampling
from kdframe.batching import TokenRows
from kdframe.checks import Guard
from kdframe.errors import InputError
from kdframe.experiment import Experiment
from kdframe.losses import StudentWithLoss
from kdframe.materials import Materials
from kdframe.output_layer import Halves
from kdframe.plugins import installed
from kdframe.progress import Quiet
from kdframe.teacher_cache import TeacherCache, open_cache

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
    """Run a sample of the rows through teacher and student, and reckon from it.

    Raises:
        InputError: tokenizers that differ, unreadable rows, a model that cannot be loaded.
    """
    dataset = materials.dataset
    read = _sample([dataset.train, *materials.held_out.values()], taught=True)
    trained = _sample([dataset.train], taught=True) or _sample([dataset.train], taught=False)
    if read:
        _ = materials.teacher  # loading it is no part of the pace
    with tempfile.TemporaryDirectory(prefix="kdframe-") as scratch:
        store = _scratch_store(materials, Path(scratch))
        empty = store.cache.info()["bytes"]
        did = caching.fill(
            store,
            read,
            lambda: materials.teacher,
            batch_tokens=materials.experiment.evaluation.batch_tokens,
            progress=Quiet(),
        )
        info = store.cache.info()
        seconds = _train_on(materials, trained[0], store)
    tokens = int(trained[0].lengths.sum())
    pace = Pace(
        capture=did["seconds"] / max(1, did["tokens"]),
        train=seconds / tokens,
        empty_bytes=empty,
        position_bytes=(info["bytes"] - empty) / max(1, info["positions"]),
    )
    estimate = _reckon(materials, pace, tokens)
    return Check(_room(materials, estimate), estimate)


@dataclass(frozen=True)
class Pace:
    """What the sample showed: seconds of a token, and bytes of the cache, empty and a position."""

    capture: float
    train: float
    empty_bytes: int
    position_bytes: float


def _sample(sets: Sequence[TokenRows], *, taught: bool) -> list[TokenRows]:
    """The first different rows of each set, until they have the sample's size together."""
    found: list[TokenRows] = []
    left = SAMPLE_TOKENS
    for rows in sets:
        first = {rows.key(int(i)): int(i) for i in np.flatnonzero(rows.taught == taught)[::-1]}
        chosen = sorted(first.values())
        many = int(np.searchsorted(np.cumsum(rows.lengths[chosen]), left)) + 1
        if chosen and left > 0:
            found.append(rows.select(chosen[:many]))
            left -= int(found[-1].lengths.sum())
    return found


def _scratch_store(materials: Materials, folder: Path) -> TeacherCache:
    """A cache of the experiment's kind and codec, away from the real one."""
    cache = materials.experiment.cache
    return open_cache(
        type(cache)(kind=cache.kind, codec=cache.codec),
        {"sample": "yes"},
        materials.teacher_shape,
        folder,
    )


def _train_on(materials: Materials, sample: TokenRows, store: TeacherCache) -> float:
    """Seconds of the student's forward and backward passes over the sample, by micro-batches."""
    experiment = materials.experiment
    student = materials.new_student()
    halves = Halves(models.causal_lm(student))
    module = StudentWithLoss(student, halves, experiment.loss.at(0).build())

    def learn(batch: batching.Batch) -> None:
        one = batching.collate(sample, batch, pad_id=materials.pad_id)
        requests = [sample.request(i) for i in one.rows if sample.taught[i]]
        targets = store.targets(requests, halves.vocab_size)
        inputs = {"input_ids": one.input_ids, "attention_mask": one.attention_mask}
        to = materials.device
        places = (torch.from_numpy(x).to(to) for x in (one.counted, one.labels, one.taught))
        module(
            {name: torch.from_numpy(value).to(to) for name, value in inputs.items()},
            *places,
            None if targets is None else targets.to(to),
        ).total.backward()

    size = experiment.training.batch_size
    order = np.arange(len(sample))
    batches = batching.batches(sample, order, batch_size=size, seed=0, epoch=0)
    learn(batches[0])  # the first pass takes memory that the others find
    began = time.monotonic()
    for batch in batches:
        learn(batch)
    return time.monotonic() - began


def _reckon(materials: Materials, pace: Pace, sample: int) -> Estimate:
    experiment, dataset = materials.experiment, materials.dataset
    sets = [dataset.train, *materials.held_out.values()]
    tokens = int(dataset.train.lengths.sum())
    held = sum(int(rows.lengths.sum()) for rows in sets[1:])
    evaluators = len(experiment.evaluation.evaluators)
    forward = pace.train / 3  # a backward pass costs about two forward passes
    seconds = (
        (tokens + held) * pace.capture
        + _trained_tokens(experiment, dataset.train) * pace.train
        + held * (pace.capture + 2 * evaluators * forward)
    )
    sizes = _sizes(materials, pace, sampling.positions(sampling.taught_rows(sets)))
    return Estimate(
        tokens=tokens,
        sample_tokens=sample,
        cache_bytes=sizes[experiment.cache.codec.kind],
        cache_bytes_by_codec=sizes,
        peak_memory_bytes=_peak_memory(),
        seconds=round(seconds, 1),
    )


def _trained_tokens(experiment: Experiment, rows: TokenRows) -> float:
    """Tokens that the student sees in all its steps."""
    training = experiment.training
    tokens = training.epochs * float((rows.lengths * rows.weights).sum())
    if training.max_steps is None:
        return tokens
    # A packed sequence is taken for a full one.
    row = experiment.data.max_length if experiment.data.packing else float(rows.lengths.mean())
    step = training.batch_size * training.gradient_accumulation_steps * row
    return min(tokens, training.max_steps * step)


def _sizes(materials: Materials, pace: Pace, positions: int) -> dict[str, int]:
    """Cache size with the experiment's codec, and with the defaults of every other one."""
    own, shape = materials.experiment.cache.codec, materials.teacher_shape
    record = own.record_bytes(shape)
    beside = max(0.0, pace.position_bytes - record)  # index and checksums
    codecs: dict[str, Any] = {own.kind: own}
    for kind, found in installed().kinds["codec"].items():
        with contextlib.suppress(ValidationError):  # nobody but the user knows its settings
            codecs.setdefault(kind, found.part())  # type: ignore[call-arg]
    return {
        kind: round(pace.empty_bytes + positions * (codec.record_bytes(shape) + beside))
        for kind, codec in codecs.items()
    }


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
