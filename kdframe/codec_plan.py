"""Which codec: what each installed one would keep of this teacher for this student, and cost.

Measured on a few of the experiment's own positions; nothing is left on the disk.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from kdframe import checks, codec_choice, codec_trials, sampling
from kdframe.cache_parts import CacheConfig, CacheSpec, CodecConfig
from kdframe.codec_choice import CodecPlan
from kdframe.codec_trials import Readings, Trial
from kdframe.errors import InputError
from kdframe.experiment import Experiment
from kdframe.materials import Materials
from kdframe.plugins import installed
from kdframe.progress import Progress, Quiet
from kdframe.sampling import TaughtRow

TOKENS = 512
TOLERANCE = 0.1
TEMPERATURES = (1.0, 2.0, 4.0)


def plan(
    experiment: Experiment,
    *,
    tokens: int = TOKENS,
    temperatures: Sequence[float] = (),
    tolerance: float = TOLERANCE,
    codecs: Sequence[CodecConfig] | None = None,
    progress: Progress | None = None,
) -> CodecPlan:
    """Try the installed codecs on a few of the experiment's own positions.

    The experiment's codec, then others; at the loss's temperatures, at 1, 2 and 4, and at
    `temperatures`.

    Args:
        tokens: about how many positions are measured.
        tolerance: the largest relative error of the gradient that is recommended.
        codecs: the others; by default every installed kind, with the settings of its `ladder`.

    Raises:
        InputError: the experiment cannot run as it is, or the teacher reads none of its rows.
    """
    if tokens < 1 or not tolerance > 0 or any(not 0 < t < math.inf for t in temperatures):
        raise InputError("plan: tokens, tolerance and temperatures must be above 0")
    checks.refuse(checks.inputs(experiment))
    materials = Materials(experiment, Path("cache"), progress or Quiet())
    materials.require_one_vocabulary()
    asked = experiment.loss.temperatures()
    tried = _different([experiment.cache.codec, *(_installed(asked) if codecs is None else codecs)])
    rows = sampling.taught_rows([materials.dataset.train, *materials.held_out.values()])
    measured, fitted = _sample(rows, tokens, fits=any(codec.fits for codec in tried))
    teacher, student = _read(materials, measured, fitted)
    at = sorted({*asked, *TEMPERATURES, *temperatures})
    found = codec_trials.measure(
        tried,
        at,
        teacher=teacher,
        student=student,
        shape=materials.teacher_shape,
        progress=materials.progress,
    )
    return codec_choice.judge(
        experiment,
        found,
        _sizes(experiment.cache, rows, found.trials),
        codec_choice.Basis(
            tolerance=tolerance,
            forward_seconds=teacher.seconds,
            vocab_size=min(teacher.vocab_size, student.vocab_size),
            fitted=len(teacher.fit),
            positions=sampling.positions(rows),
        ),
    )


def _installed(temperatures: Sequence[float]) -> list[CodecConfig]:
    """Every kind that can run here, with the settings of its ladder."""
    found: list[CodecConfig] = []
    for kind in installed().kinds["codec"].values():
        if kind.unavailable:
            continue
        try:
            found += kind.part.ladder(temperatures)  # type: ignore[attr-defined]
        except ValidationError:  # nobody but the user knows its settings
            continue
    return found


def _different(codecs: Sequence[CodecConfig]) -> list[CodecConfig]:
    plain = [codec.model_dump() for codec in codecs]
    return [codec for i, codec in enumerate(codecs) if plain[i] not in plain[:i]]


def _sample(
    rows: Sequence[TaughtRow], tokens: int, *, fits: bool
) -> tuple[list[TaughtRow], list[TaughtRow]]:
    """Rows to measure on, and others to fit on: of these all positions."""
    rows = [row for row in rows if len(row.request.positions)]
    if not rows:
        raise InputError("plan: the teacher reads no row of `data`; give a source with teacher")
    if not fits or len(rows) == 1:
        return sampling.thin(sampling.draw(rows, tokens), tokens), []
    # Neighbours come of the same source, so both halves speak of the same texts.
    measured, others = (sampling.draw(half, tokens) for half in (rows[::2], rows[1::2]))
    return sampling.thin(measured, tokens), others


def _read(
    materials: Materials, measured: Sequence[TaughtRow], fitted: Sequence[TaughtRow]
) -> tuple[Readings, Readings]:
    """Teacher and student over the sample, one after the other."""
    size = materials.experiment.evaluation.batch_tokens
    teacher = codec_trials.read(materials.teacher, measured, fitted, batch_tokens=size)
    if materials.experiment.student.from_teacher is None:
        materials.forget_teacher()
    student = materials.new_student()
    materials.forget_teacher()
    return teacher, codec_trials.read(student, measured, (), batch_tokens=size)


def _sizes(
    cache: CacheConfig, rows: Sequence[TaughtRow], trials: Sequence[Trial]
) -> list[int | None]:
    """Bytes of the whole dataset's cache with each codec."""
    count = sampling.positions(rows)
    empty, beside = _overhead(cache, sampling.draw(rows, TOKENS))
    return [
        None
        if trial.record_bytes is None
        else round(empty + count * (trial.record_bytes + beside)) + trial.kept_bytes
        for trial in trials
    ]


def _overhead(cache: CacheConfig, rows: Sequence[TaughtRow]) -> tuple[float, float]:
    """Bytes of a cache of the backend's kind without rows, and beside the record of a position."""
    with tempfile.TemporaryDirectory(prefix="kdframe-") as scratch:
        spec = CacheSpec({"sample": "yes"}, Path(scratch, "cache"), record_bytes=1, codec={})
        opened = type(cache)(kind=cache.kind, codec=cache.codec).open(spec)
        empty = opened.info()["bytes"]
        requests = [row.request for row in rows]
        opened.write(requests, [np.zeros((len(r.positions), 1), np.uint8) for r in requests])
        written = opened.info()["bytes"] - empty
    return empty, max(0.0, written / sampling.positions(rows) - 1)
