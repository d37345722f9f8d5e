"""What the commands share: their options, progress, signals, and how results are printed.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kdframe.checks import Guard
from kdframe.experiment import Experiment
from kdframe.progress import Log, Progress, Quiet, Terminal

if TYPE_CHECKING:
    from kdframe.planning import Estimate
    from kdframe.where import Where

File = Annotated[
    Path, typer.Argument(help="An experiment: .yaml, or .py that defines `experiment`.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changed settings, such as loss.alpha=0.3.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="The folder of all runs.")]
CachesOption = Annotated[Path, typer.Option("--caches", help="The folder of all teacher caches.")]
NameOption = Annotated[str | None, typer.Option("--name", help="Another name for the run.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

ROLES = {
    "teacher": "teacher",
    "student_before": "student before",
    "control": "control",
    "student": "student",
}
_SHOW_CURSOR = "\x1b[?25h"


# ------------------------------------------------------------------------------------ printing
def out(text: str) -> None:
    """A line of the result."""
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def err(text: str) -> None:
    """A line beside the result."""
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


def print_json(value: Any) -> None:
    """The result as JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def table(names: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> None:
    """A table; the columns named in `right` hold numbers."""
    numbers = set(right)
    shown = Table()
    for name in names:
        justify = "right" if name in numbers else "left"
        shown.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        shown.add_row(*row)
    # No markup: a name in square brackets is a name.
    Console(markup=False, highlight=False).print(shown)


def size(number: float) -> str:
    """Bytes in a unit that a person reads."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def duration(seconds: float) -> str:
    """Seconds in units that a person reads."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def show_guards(guards: Sequence[Guard]) -> None:
    """What the checks found, a line each."""
    for guard in guards:
        remedy = f" ({guard.remedy})" if guard.remedy else ""
        out(f"{guard.level}: {guard.evidence}{remedy}")
    if not any(guard.level == "error" for guard in guards):
        out("no faults found")


def show_estimate(experiment: Experiment, estimate: Estimate) -> None:
    """What a run would cost."""
    out(f"training rows: {estimate.tokens:,} tokens ({estimate.sample_tokens:,} were measured)")
    for kind, number in estimate.cache_bytes_by_codec.items():
        mark = " (this experiment)" if kind == experiment.cache.codec.kind else ""
        out(f"teacher cache with codec {kind}: {size(number)}{mark}")
    out(f"memory at its peak: {size(estimate.peak_memory_bytes)}")
    out(f"time: about {duration(estimate.seconds)}")


def show_evaluation(whole: Mapping[str, Any]) -> None:
    """The figures of all models as a table, and what could not be measured."""
    entries = [
        (name, metric, entry)
        for name, metrics in whole["sets"].items()
        for metric, entry in metrics.items()
    ]
    roles = [role for role in ROLES if any(role in entry for *_, entry in entries)]
    titles = [ROLES[role] for role in roles]
    rows = [
        (name, metric, *(_figure(entry.get(role)) for role in roles), entry["better"])
        for name, metric, entry in entries
    ]
    table(("set", "metric", *titles, "better"), rows, right=titles)
    if verdict := whole.get("verdict"):
        out(str(verdict["text"]))
    for kind, reason in whole.get("unavailable", {}).items():
        out(f"{kind}: unavailable: {reason}")


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4f}"


# ------------------------------------------------------------------------------------- working
def progress(quiet: bool = False) -> Progress:
    """Bars on a terminal, lines in a log, or nothing."""
    if quiet:
        return Quiet()
    console = Console(stderr=True)
    return Terminal(console) if console.is_terminal else Log()


@contextlib.contextmanager
def where(runs: Path, caches: Path, quiet: bool = False) -> Iterator[Where]:
    """Where a command works.

    Ctrl-C and SIGTERM end the work at the next step, a second one at once. What libraries print
    meanwhile goes to standard error.
    """
    from kdframe.where import Where

    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            _leave()
        asked.append(number)
        os.write(2, b"\nstopping at the next step; once more stops at once (a run goes on later)\n")

    with _handled(ask), contextlib.redirect_stdout(sys.stderr):
        yield Where(runs, caches, progress(quiet), lambda: bool(asked))


def _leave() -> None:
    """End the process without another word; everything on the disk is whole at any moment."""
    if sys.stderr.isatty():
        os.write(2, _SHOW_CURSOR.encode())
    os._exit(130)


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
