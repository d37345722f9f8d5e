"""Where work keeps its files, and how it talks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kdframe.progress import Progress, Quiet


@dataclass(frozen=True)
class Where:
    """Where a command or a run keeps its files, and how it talks.

    Attributes:
        runs: the folder of all runs; caches: the folder of all teacher caches.
        stop: asked after every step; true leaves after a checkpoint.
    """

    runs: Path = Path("runs")
    caches: Path = Path("cache")
    progress: Progress = field(default_factory=Quiet)
    stop: Callable[[], bool] = lambda: False
