"""`metrics.jsonl`: one line for each thing measured, cut back where a run goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdframe import durable


def append(path: Path, line: Mapping[str, float | int | None]) -> None:
    """Add a line and flush it. What is no finite number is written as null."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({key: _plain(value) for key, value in line.items()}) + "\n")


def sync(path: Path) -> None:
    """Bring what was added to the disk: a checkpoint must not outlive its lines."""
    with open(path, "ab") as file:
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # torn by a kill
            continue
    return lines


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`: they will be made again."""
    kept = [line for line in read(path) if line["step"] <= step]
    durable.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def _plain(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None
