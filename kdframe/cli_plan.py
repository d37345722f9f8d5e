"""`kdframe plan`: which codec."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kdframe import checks, reading
from kdframe.errors import InputError
from kdframe.terminal import (
    File,
    JsonOption,
    Overrides,
    QuietOption,
    out,
    print_json,
    progress,
    size,
    table,
)

if TYPE_CHECKING:
    from kdframe.codec_choice import CodecPlan, PlanRow


def plan(
    experiment: File,
    overrides: Overrides = None,
    *,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="How many positions to measure.")
    ] = 512,
    temperatures: Annotated[
        str, typer.Option("--temperatures", help="More temperatures to try, such as 3,8.")
    ] = "",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest relative error of the gradient.")
    ] = 0.1,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure on some of your own tokens what each codec keeps and costs; recommend one."""
    more = _numbers(temperatures)
    with contextlib.redirect_stdout(sys.stderr):
        loaded = reading.load(experiment, overrides or ())
        checks.refuse(checks.inputs(loaded))  # before torch is imported
        from kdframe import codec_plan

        found = codec_plan.plan(
            loaded,
            tokens=tokens,
            temperatures=more,
            tolerance=tolerance,
            progress=progress(quiet or as_json),
        )
    if as_json:
        print_json(found.plain())
    else:
        show(found)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--temperatures {text}: write numbers, such as 3,8") from None


def show(found: CodecPlan) -> None:
    """Teacher, costs and figures as tables, then the recommendation."""
    out(
        f"{found.positions:,} positions in all; {found.tokens:,} were measured"
        + f", {found.fitted:,} others fitted on" * bool(found.fitted)
    )
    table(
        ("T", "teacher's entropy, nats", "of an even guess", "read by the loss"),
        (
            (f"{at.temperature:g}", f"{at.entropy:.2f}", f"{at.share:.0%}", "yes" * at.read)
            for at in found.teacher
        ),
        right=("T", "teacher's entropy, nats", "of an even guess"),
    )
    _show_costs(found.rows)
    _show_figures(found.rows)
    for note in _notes(found):
        out(note)
    out(found.advice)


def _show_costs(rows: Sequence[PlanRow]) -> None:
    first = {_name(row): row for row in reversed(rows)}
    out("a token takes (µs: millionths of a second):")
    titles = ("bytes", "in all", "µs to capture", "of them the codec", "µs to read")
    table(
        ("codec", *titles),
        (
            (
                name,
                "" if row.bytes_per_token is None else f"{row.bytes_per_token:,}",
                "" if row.total_bytes is None else size(row.total_bytes),
                _micro(row.seconds_per_token),
                _micro(row.codec_seconds_per_token),
                _micro(row.read_seconds_per_token),
            )
            for name, row in reversed(first.items())
        ),
        right=titles,
    )


def _show_figures(rows: Sequence[PlanRow]) -> None:
    titles = ("T", "KL, nats", "gradient error", "angle", "size", "kept mass")
    table(
        ("codec", *titles, "usable"),
        (
            (
                _name(row),
                f"{row.temperature:g}",
                _figure(row.kl),
                _figure(row.gradient_error) + " ~" * row.drawn,
                "" if row.gradient_angle_deg is None else f"{row.gradient_angle_deg:.1f}°",
                "" if row.gradient_size is None else f"{row.gradient_size:.3f}",
                "" if row.support is None else f"{row.support:.0%}",
                "yes" if row.usable else "no",
            )
            for row in rows
        ),
        right=titles,
    )


def _notes(found: CodecPlan) -> list[str]:
    """Why rows cannot be used, each reason once; what figures mean; warnings."""
    reasons: dict[str, list[str]] = {}
    for row in found.rows:
        if not row.usable and _name(row) not in reasons.setdefault(row.reason, []):
            reasons[row.reason].append(_name(row))
    said = [f"not usable: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if any(row.drawn and row.gradient_error is not None for row in found.rows):
        said.append(
            "~ draws: their error is noise, which averages out over the positions of a step, while "
            "that of the others stays; it is not held against the tolerance, and draws are not "
            "recommended by it"
        )
    if found.fitted:
        said.append(
            f"codecs that are fitted were fitted on {found.fitted:,} positions only; a cache fits "
            "them on up to 4,096, so they will do better than here"
        )
    return said + [f"warning: {warning}" for warning in found.warnings]


def _name(row: PlanRow) -> str:
    from kdframe.codec_choice import label

    return label(row.codec, row.settings)


def _micro(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-5 else f"{seconds * 1e6:.1f}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
