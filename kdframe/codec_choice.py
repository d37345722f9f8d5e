"""What was measured of the codecs, as rows, and which of them to take.

Letters: `V` the vocabulary.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from kdframe.cache_parts import CodecConfig
from kdframe.codec_trials import Measured, Trial
from kdframe.experiment import Experiment, form_fault
from kdframe.fidelity import Fidelity

FLAT = 0.9
"""Share of log V above which the teacher's entropy leaves little to learn from."""
THIN = 0.3
"""Mass below which the kept ids say little of the teacher."""

NOTHING = 1e-10
"""Squared gradient of a position that is rounding: the student says what the teacher says."""


@dataclass(frozen=True)
class PlanRow:
    """One codec at one temperature. None: not measured, or not a finite number.

    Attributes:
        codec: its kind; settings: those by which it differs from its kind's other rows.
        bytes_per_token: of a counted position; total_bytes: the cache of the whole dataset.
        kl: nats to the true distribution (none for draws).
        gradient_error: relative L2 error of the gradient; gradient_angle_deg, gradient_size:
            between it and the true one.
        seconds_per_token: to capture one: the teacher's forward pass, and from its hidden states
            to a record `codec_seconds_per_token`; read_seconds_per_token: from a record to what
            the loss meets.
        entropy: the teacher's, nats; support: mass that it gives to the kept ids.
        drawn: whether the targets are draws, whose error is noise and no bias.
        usable: whether the experiment's loss could read it; reason: why not.
    """

    codec: str
    settings: Mapping[str, Any]
    temperature: float
    bytes_per_token: int | None
    total_bytes: int | None
    kl: float | None
    gradient_error: float | None
    gradient_angle_deg: float | None
    gradient_size: float | None
    seconds_per_token: float | None
    codec_seconds_per_token: float | None
    read_seconds_per_token: float | None
    entropy: float
    support: float | None
    drawn: bool
    usable: bool
    reason: str


@dataclass(frozen=True)
class TeacherAt:
    """The teacher at a temperature: entropy in nats and as a share of log V; read by the loss."""

    temperature: float
    entropy: float
    share: float
    read: bool


@dataclass(frozen=True)
class Choice:
    """A codec to use: `override` is what to type; `own` if the experiment has it already.

    `gradient_error` is the largest at the loss's temperatures.
    """

    codec: str
    settings: Mapping[str, Any]
    override: str
    bytes_per_token: int
    total_bytes: int
    gradient_error: float
    own: bool


@dataclass(frozen=True)
class CodecPlan:
    """What was found.

    Attributes:
        recommended: the smallest cache within the tolerance; None: there is none.
        nearest: the smallest error of all that could be used.
        tokens: positions that were measured; fitted: others on which codecs were fitted;
            positions: those that a cache of the whole dataset holds.
        warnings: in words.
    """

    rows: Sequence[PlanRow]
    teacher: Sequence[TeacherAt]
    recommended: Choice | None
    nearest: Choice | None
    tolerance: float
    tokens: int
    fitted: int
    positions: int
    warnings: Sequence[str]

    def plain(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {**asdict(self), "advice": self.advice}

    @property
    def advice(self) -> str:
        """The recommendation in words."""
        at = " and ".join(f"{t.temperature:g}" for t in self.teacher if t.read)
        asked = f"a gradient error of at most {self.tolerance:g} at T = {at}"
        if self.recommended is None:
            return f"no codec reaches {asked}; {self._nearest()}"
        found = self.recommended
        said = f"recommended, as the smallest with {asked}: {label(found.codec, found.settings)}"
        if found.own:
            return f"{said} ({found.gradient_error:.2g}), which the experiment has already"
        return f"{said} ({found.gradient_error:.2g}). To use it: {found.override}"

    def _nearest(self) -> str:
        if self.nearest is None:
            return "none of those that the loss accepts could be measured"
        found = self.nearest
        name = label(found.codec, found.settings)
        return f"nearest is {name} with {found.gradient_error:.2g}: {found.override}"


def label(kind: str, settings: Mapping[str, Any]) -> str:
    """A codec in a few words: `topk k=64`."""
    return " ".join([kind, *(f"{name}={json.dumps(value)}" for name, value in settings.items())])


@dataclass(frozen=True)
class Basis:
    """What figures are reckoned from, beside the trials.

    Attributes:
        forward_seconds: of a token through the teacher.
        vocab_size: ids that both models have.
        fitted: positions that codecs were fitted on; positions: those of the whole dataset.
    """

    tolerance: float
    forward_seconds: float
    vocab_size: int
    fitted: int
    positions: int


def judge(
    experiment: Experiment, measured: Measured, sizes: Sequence[int | None], basis: Basis
) -> CodecPlan:
    """Rows, warnings and the recommendation.

    Args:
        sizes: bytes of the whole dataset's cache, for each trial.
    """
    shown = _settings([trial.codec for trial in measured.trials])
    teacher = _teacher(measured, experiment.loss.temperatures(), basis.vocab_size)
    rows, choices = [], []
    for i, (trial, settings, size) in enumerate(zip(measured.trials, shown, sizes, strict=True)):
        costs = _costs(trial, basis.forward_seconds)
        own = [
            _row(experiment, trial, at, settings=settings, total_bytes=size, **costs)
            for at in teacher
        ]
        rows += own
        read = [row for row, at in zip(own, teacher, strict=True) if at.read]
        if (choice := _choice(read, own=i == 0)) is not None:
            choices.append(choice)
    good = [choice for choice in choices if choice.gradient_error <= basis.tolerance]
    return CodecPlan(
        rows=rows,
        teacher=teacher,
        recommended=min(good, key=lambda choice: choice.total_bytes, default=None),
        nearest=min(choices, key=lambda choice: choice.gradient_error, default=None),
        tolerance=basis.tolerance,
        tokens=measured.positions,
        fitted=basis.fitted,
        positions=basis.positions,
        warnings=_warnings(teacher, rows, measured),
    )


def _teacher(measured: Measured, read: Sequence[float], vocab_size: int) -> list[TeacherAt]:
    found = []
    for temperature, sums in measured.truth.items():
        entropy = sums.entropy / sums.positions
        share = entropy / math.log(max(2, vocab_size))
        found.append(TeacherAt(temperature, entropy, share, temperature in read))
    return found


def _settings(codecs: Sequence[CodecConfig]) -> list[dict[str, Any]]:
    """For each codec the settings that are not the defaults, or differ among its kind."""
    found = []
    for codec in codecs:
        plain = codec.model_dump(mode="json")
        others = [c.model_dump(mode="json") for c in codecs if c.kind == codec.kind]
        told = codec.model_dump(mode="json", exclude_defaults=True)
        found.append(
            {
                name: value
                for name, value in plain.items()
                if name != "kind" and (name in told or any(o[name] != value for o in others))
            }
        )
    return found


def _row(experiment: Experiment, trial: Trial, at: TeacherAt, **known: Any) -> PlanRow:
    """One row; `known` are the fields that do not depend on the temperature."""
    codec = trial.codec
    reason = trial.reason or form_fault(experiment.loss, codec)
    if not codec.serves(at.temperature):
        reason = reason or f"codec {codec.kind!r} does not serve temperature {at.temperature:g}"
    return PlanRow(
        codec=codec.kind,
        temperature=at.temperature,
        bytes_per_token=trial.record_bytes,
        **known,
        **_figures(trial.found.get(at.temperature)),
        entropy=at.entropy,
        drawn=codec.form == "weighted",
        usable=not reason,
        reason=reason,
    )


def _costs(trial: Trial, forward: float) -> dict[str, float | None]:
    """Seconds of a position, to capture and to read."""
    # The median: what else runs on the machine disturbs a chunk or two.
    own = median(trial.writing) if trial.writing else None
    return {
        "seconds_per_token": None if own is None else forward + own,
        "codec_seconds_per_token": own,
        "read_seconds_per_token": median(trial.reading) if trial.reading else None,
    }


def _figures(sums: Fidelity | None) -> dict[str, Any]:
    """The figures of one codec at one temperature."""
    names = ("kl", "gradient_error", "gradient_angle_deg", "gradient_size", "support")
    found: dict[str, Any] = dict.fromkeys(names)
    if sums is None:
        return found
    found["kl"] = sums.mean_kl if math.isfinite(sums.mean_kl) else None
    found["support"] = sums.support / sums.positions
    if sums.true > NOTHING * sums.positions:
        found["gradient_error"] = sums.gradient_error
        found["gradient_size"] = sums.gradient_size
        if sums.decoded > 0:
            found["gradient_angle_deg"] = sums.gradient_angle
    return found


def _choice(rows: Sequence[PlanRow], *, own: bool) -> Choice | None:
    """A codec as a candidate, by its rows at the loss's temperatures."""
    errors = [row.gradient_error for row in rows if row.usable and not row.drawn]
    known = [error for error in errors if error is not None]
    first = rows[0]
    if len(known) < len(rows) or first.bytes_per_token is None or first.total_bytes is None:
        return None
    fields = ", ".join(f"{name}: {json.dumps(value)}" for name, value in first.settings.items())
    whole = f"{{kind: {first.codec}{', ' * bool(fields)}{fields}}}"
    return Choice(
        codec=first.codec,
        settings=first.settings,
        override=f"cache.codec={shlex.quote(whole)}",
        bytes_per_token=first.bytes_per_token,
        total_bytes=first.total_bytes,
        gradient_error=max(known),
        own=own,
    )


def _warnings(
    teacher: Sequence[TeacherAt], rows: Sequence[PlanRow], measured: Measured
) -> list[str]:
    said = [
        f"at T = {at.temperature:g} the teacher is nearly flat: its entropy is {at.share:.0%} of "
        "that of an even guess, so there is little to learn from it; use a lower temperature"
        for at in teacher
        if at.share > FLAT
    ]
    for at in teacher:
        thin = [
            label(row.codec, row.settings)
            for row in rows
            if row.temperature == at.temperature
            and row.usable
            and row.support is not None
            and row.support < THIN
        ]
        if thin:
            said.append(
                f"at T = {at.temperature:g} less than {THIN:.0%} of the teacher's mass is on the "
                f"ids that are kept by {', '.join(thin)}: of most of it only the sum is known"
            )
    if any(sums.true <= NOTHING * sums.positions for sums in measured.truth.values()):
        said.append("the student says what the teacher says, so there is no gradient to compare")
    if measured.left_out:
        said.append(f"at {measured.left_out} positions a model gives no numbers; they are left out")
    return said
