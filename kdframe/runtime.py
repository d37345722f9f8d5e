"""What carries the training loop: this process, or a cluster's worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Line = Mapping[str, Any]
"""One line of metrics."""


class Runtime(Protocol):
    """What a carrier (this process, a cluster's worker) gives to the loop."""

    rank: int
    world: int

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all workers."""

    def report(self, step: int, line: Line) -> None:
        """A line of metrics was written."""

    def checkpointed(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""

    def should_stop(self) -> bool:
        """Whether to leave after this step (Ctrl-C, a scheduler)."""


@dataclass
class InProcess:
    """The carrier of a run in this process."""

    rank: int = 0
    world: int = 1
    on_report: Callable[[int, Line], None] = lambda step, line: None
    on_checkpoint: Callable[[int, Path], None] = lambda step, folder: None
    stop: Callable[[], bool] = lambda: False

    def sum(self, values: Tensor) -> Tensor:
        """There is one worker."""
        return values

    def report(self, step: int, line: Line) -> None:
        """Tell the observers."""
        self.on_report(step, line)

    def checkpointed(self, step: int, folder: Path) -> None:
        """Tell the observers."""
        self.on_checkpoint(step, folder)

    def should_stop(self) -> bool:
        """Ask whoever started the run."""
        return self.stop()
