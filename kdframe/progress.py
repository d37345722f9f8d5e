"""Tell a person how far a stage is: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

_LINE_EVERY = 10.0  # seconds between two lines of a log


class Bar(Protocol):
    """One stage under way."""

    def advance(self, amount: float, note: str = "") -> None:
        """`amount` more units are done; `note` is shown beside them."""


class Progress(Protocol):
    """Where stages and messages are shown."""

    def stage(self, name: str, total: float, unit: str) -> contextlib.AbstractContextManager[Bar]:
        """Show a stage of `total` units while the context lasts."""

    def say(self, message: str) -> None:
        """One line."""


class _NoBar:
    def advance(self, amount: float, note: str = "") -> None:
        return


class Quiet:
    """Shows nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Bar]:
        """No bar."""
        yield _NoBar()

    def say(self, message: str) -> None:
        """No line."""


class _LogBar:
    def __init__(self, name: str, total: float, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self.began = self.spoke = time.monotonic()

    def advance(self, amount: float, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.spoke >= _LINE_EVERY:
            self.spoke = now
            rate = self.done / (now - self.began)
            left = (self.total - self.done) / rate if rate else 0
            print(
                f"{self.name}: {self.done:,.0f}/{self.total:,.0f} {self.unit}, "
                f"{rate:,.1f} {self.unit}/s, {left:,.0f} s left {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )


class Log:
    """Plain lines on standard error."""

    @contextlib.contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Bar]:
        """A line every ten seconds, and one at the end."""
        bar = _LogBar(name, total, unit)
        yield bar
        self.say(f"{name}: {bar.done:,.0f} {unit} in {time.monotonic() - bar.began:,.1f} s")

    def say(self, message: str) -> None:
        """One line."""
        print(message, file=sys.stderr, flush=True)


class Terminal:
    """Bars with rate and time left."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Bar]:
        """A bar while the stage lasts."""
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}", markup=False),
        )
        with bars.Progress(*columns, console=self.console) as shown:
            task = shown.add_task(name, total=total, rate="", note="")
            began = time.monotonic()
            done = 0.0

            class TaskBar:
                def advance(self, amount: float, note: str = "") -> None:
                    nonlocal done
                    done += amount
                    rate = done / max(time.monotonic() - began, 1e-9)
                    shown.update(task, advance=amount, rate=f"{rate:,.0f} {unit}/s", note=note)

            yield TaskBar()

    def say(self, message: str) -> None:
        """One line above the bars."""
        self.console.print(message, markup=False, highlight=False)
