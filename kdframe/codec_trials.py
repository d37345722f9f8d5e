"""Codecs tried on some positions, beside the truth: what each keeps, and what it costs.

Only hidden states of the two models are kept; logits `[n, V]` exist for one chunk at a time.
Letters: `n` positions, `H` hidden width, `V` the student's vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kdframe import batching, live_teacher
from kdframe.cache_parts import Codec, CodecConfig, TeacherShape
from kdframe.errors import InputError
from kdframe.fidelity import Fidelity, compare
from kdframe.heads import OutputHead, TeacherOutputs
from kdframe.models import causal_lm
from kdframe.output_layer import Halves, OutputLayer
from kdframe.progress import Progress
from kdframe.sampling import TaughtRow
from kdframe.targets import DenseTargets, met, resized

WARM_UP = 8
"""Positions that a codec codes before it is timed."""
PARTS = 8
"""A comparison holds many chunks at once, so they are smaller than elsewhere by this factor."""


@dataclass(frozen=True)
class Readings:
    """A model at the sample's positions, so that the model itself can go.

    Attributes:
        states: `[n, H]` at the measured positions; fit: `[m, H]` at those that codecs are
            fitted on. For a model taken whole both hold logits.
        head: states to logits; plain: the same as tensors, None where it is more than that.
        whole: whether the model has no halves; chunk: positions of one chunk of logits.
        seconds: of a token, without the output layer (with it, for a model taken whole).
    """

    states: Tensor
    fit: Tensor
    head: Callable[[Tensor], Tensor]
    plain: OutputHead | None
    whole: bool
    chunk: int
    vocab_size: int
    seconds: float


@torch.no_grad()
def read(
    model: torch.nn.Module,
    measured: Sequence[TaughtRow],
    fitted: Sequence[TaughtRow],
    *,
    batch_tokens: int,
) -> Readings:
    """One forward pass of a model over the sample's rows."""
    halves = Halves(causal_lm(model.eval()))
    began = time.perf_counter()
    states = _states(halves, measured, batch_tokens)
    fit = _states(halves, fitted, batch_tokens)
    fit = fit[torch.isfinite(fit).all(-1)]
    _wait(states)
    tokens = sum(len(row.ids) for row in (*measured, *fitted))
    seconds = (time.perf_counter() - began) / max(1, tokens)
    plain = None
    if not halves.whole:
        try:
            plain = OutputLayer(halves.model).plain()
        except InputError:  # more than a matrix and a bias
            plain = None
    return Readings(
        states, fit, halves.head, plain, halves.whole, halves.chunk(), halves.vocab_size, seconds
    )


def _states(halves: Halves, rows: Sequence[TaughtRow], batch_tokens: int) -> Tensor:
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    if not len(rows):
        return torch.zeros(0, 1)
    found = []
    for batch in batching.planned(lengths, np.arange(len(rows)), tokens=batch_tokens):
        some = [rows[i] for i in batch]
        found.append(
            live_teacher.states(halves, [row.ids for row in some], [row.request for row in some])
        )
    return torch.cat(found)


@dataclass
class Trial:
    """What one codec kept.

    Attributes:
        reason: why it could not be tried; empty if it was.
        record_bytes: bytes of a position; kept_bytes: what is kept once, beside the records.
        writing: seconds of a position in each chunk, from the teacher's hidden states to
            records; reading: from records to what the loss meets.
        found: the sums at every temperature that it serves.
    """

    codec: CodecConfig
    reason: str = ""
    record_bytes: int | None = None
    kept_bytes: int = 0
    writing: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)
    found: dict[float, Fidelity] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """It could not be tried to the end."""
        self.reason = reason
        for sums in (self.writing, self.reading, self.found):
            sums.clear()


@dataclass(frozen=True)
class Measured:
    """All trials, and the same sums for the truth itself.

    Attributes:
        positions: how many were measured; left_out: how many were not, since one of the models
            gave no numbers there.
    """

    trials: Sequence[Trial]
    truth: dict[float, Fidelity]
    positions: int
    left_out: int


@torch.no_grad()
def measure(
    codecs: Iterable[CodecConfig],
    temperatures: Sequence[float],
    *,
    teacher: Readings,
    student: Readings,
    shape: TeacherShape,
    progress: Progress,
) -> Measured:
    """Try every codec at every temperature that it serves.

    Args:
        teacher, student: at the same positions.
        shape: the teacher's, as a cache is told it.

    Raises:
        InputError: the models gave numbers at none of the positions.
    """
    running = [_Running(codec, teacher, shape) for codec in codecs]
    truth = {temperature: Fidelity() for temperature in temperatures}
    step = max(1, min(teacher.chunk, student.chunk) // PARTS)
    n = len(teacher.states)
    seen = 0
    with progress.stage("try codecs", n, "positions") as bar:
        for start in range(0, n, step):
            part = slice(start, start + step)
            chunk = _Chunk.of(teacher, student, part)
            seen += len(chunk.hidden)
            for temperature in temperatures:
                whole = DenseTargets(chunk.teacher)
                truth[temperature] += compare(whole, chunk.teacher, chunk.student, temperature)
            for one in running:
                one.meet(chunk, temperatures)
            bar.advance(len(teacher.states[part]))
    if not seen:
        raise InputError("plan: a model gives no numbers at any position of the sample")
    return Measured([one.trial for one in running], truth, seen, n - seen)


@dataclass(frozen=True)
class _Chunk:
    """Both models at some positions, where both give numbers.

    Attributes:
        hidden: `[n, H]`, the teacher's; logits: `[n, V_teacher]`, and the seconds they took.
        teacher, student: `[n, V]`, logits over the student's vocabulary.
    """

    hidden: Tensor
    logits: Tensor
    head_seconds: float
    teacher: Tensor
    student: Tensor

    @classmethod
    def of(cls, teacher: Readings, student: Readings, part: slice) -> _Chunk:
        hidden = teacher.states[part]
        began = time.perf_counter()
        logits = teacher.head(hidden)
        _wait(logits)
        seconds = time.perf_counter() - began
        other = student.head(student.states[part])
        good = torch.isfinite(logits.amax(-1)) & torch.isfinite(other.amax(-1))
        if not bool(good.all()):
            hidden, logits, other = hidden[good], logits[good], other[good]
        same = met(resized(DenseTargets.from_logits(logits), student.vocab_size))
        assert isinstance(same, DenseTargets)
        return cls(hidden, logits, seconds, same.log_probs, other)

    def outputs(self) -> tuple[TeacherOutputs, list[bool]]:
        """What a codec is given; the list fills when it asks for logits."""
        asked: list[bool] = []

        def head(hidden: Tensor) -> Tensor:
            asked.append(True)
            return self.logits

        return TeacherOutputs(self.hidden, head), asked


class _Running:
    """A codec at work. What it raises ends its own trial alone."""

    def __init__(self, config: CodecConfig, teacher: Readings, shape: TeacherShape) -> None:
        self.trial = Trial(config)
        self._codec: Codec | None = None
        self._guarded(lambda: self._size(config, shape))
        self.trial.reason = self.trial.reason or _hindrance(config, teacher)
        self._guarded(lambda: self._begin(config, teacher, shape))

    def meet(self, chunk: _Chunk, temperatures: Sequence[float]) -> None:
        """Code a chunk, and compare."""
        self._guarded(lambda: self._meet(chunk, temperatures))

    def _guarded(self, work: Callable[[], None]) -> None:
        if self.trial.reason:
            return
        try:
            work()
        except Exception as error:  # anybody's code
            told = isinstance(error, InputError)
            self.trial.fail(str(error) if told else f"{type(error).__name__}: {error}")

    def _size(self, config: CodecConfig, shape: TeacherShape) -> None:
        self.trial.record_bytes = config.record_bytes(shape)

    def _begin(self, config: CodecConfig, teacher: Readings, shape: TeacherShape) -> None:
        head = teacher.head if teacher.plain is None else teacher.plain
        fitted = None
        if config.fits:
            fitted = config.fit(TeacherOutputs(teacher.fit, head))
            self.trial.kept_bytes = sum(t.numel() * t.element_size() for t in fitted.values())
        self._codec = config.build(shape, fitted)
        few = TeacherOutputs(teacher.states[:WARM_UP], teacher.head)
        self._codec.decode(self._codec.encode(few))

    def _meet(self, chunk: _Chunk, temperatures: Sequence[float]) -> None:
        if self._codec is None or not len(chunk.hidden):
            return
        outputs, asked = chunk.outputs()
        began = time.perf_counter()
        records = self._codec.encode(outputs)
        encoded = time.perf_counter()
        decoded = resized(self._codec.decode(records), chunk.student.shape[-1])
        targets = met(decoded.to(chunk.student.device))
        read = time.perf_counter() - encoded
        written = encoded - began + chunk.head_seconds * bool(asked)
        self.trial.writing.append(written / len(records))
        self.trial.reading.append(read / len(records))
        for temperature in temperatures:
            if self.trial.codec.serves(temperature):
                sums = compare(targets, chunk.teacher, chunk.student, temperature)
                before = self.trial.found.get(temperature, Fidelity())
                self.trial.found[temperature] = before + sums


def _hindrance(config: CodecConfig, teacher: Readings) -> str:
    """Why a codec cannot work on this teacher or this sample; empty if it can."""
    if config.reads_hidden and teacher.whole:
        return "the teacher's backbone and output layer do not add up to its logits"
    if (config.reads_hidden or config.fits) and not teacher.whole and teacher.plain is None:
        return "the teacher's output layer is more than a matrix and a bias"
    if config.fits and not len(teacher.fit):
        return "it has to be fitted, and one row is too few: what is measured must be others"
    return ""


def _wait(x: Tensor) -> None:
    """Until a device has computed it."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
