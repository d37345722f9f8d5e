"""Rows for tests of a cache. Run as a program, it is a writer that can be killed.

A row's key, positions and records follow from its number, so that any process can say what a
number's row must read as.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdframe.api import Cache, CacheSpec, RowPositions

RECORD_BYTES = 12
LENGTH = 100
IDENTITY = {"teacher_weights": "a" * 64, "tokenizer": "b" * 64, "codec": "topk(k=2)"}


def spec(folder: Path, **changes: str) -> CacheSpec:
    """What a cache of these rows must hold; `changes` are to its identity."""
    return CacheSpec({**IDENTITY, **changes}, folder, RECORD_BYTES, {"kind": "topk", "k": 2})


def key(number: int) -> bytes:
    """A row's key."""
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def at(number: int, positions: ArrayLike) -> RowPositions:
    """A row with some of its positions, which lie below `LENGTH`."""
    return RowPositions(key(number), np.asarray(positions, np.int32))


def row(number: int) -> RowPositions:
    """A row with between 1 and 29 positions."""
    rng = np.random.default_rng(number)
    return at(number, np.sort(rng.choice(LENGTH, int(rng.integers(1, 30)), replace=False)))


def rows(numbers: Iterable[int]) -> list[RowPositions]:
    """Many rows."""
    return [row(number) for number in numbers]


def record(number: int, positions: ArrayLike | None = None) -> NDArray[np.uint8]:
    """A row's records `[n, RECORD_BYTES]`, at its own positions or at others."""
    rng = np.random.default_rng(number + 10**6)
    whole = rng.integers(0, 256, (LENGTH, RECORD_BYTES), np.uint8)
    return whole[row(number).positions if positions is None else np.asarray(positions, np.int32)]


def write(cache: Cache, numbers: Iterable[int]) -> None:
    """Write rows in one go."""
    chosen = list(numbers)
    cache.write(rows(chosen), [record(number) for number in chosen])


def holds(cache: Cache, number: int) -> bool:
    """Whether the cache reads the row back as it was written."""
    return bool(np.array_equal(cache.read([row(number)]), record(number)))


def main(plan: str) -> None:
    """Open a cache and write rows, telling of each commit when it is done."""
    order = json.loads(plan)
    module, name = order["config"]
    config = getattr(importlib.import_module(module), name)(**order["settings"])
    cache = config.open(spec(Path(order["folder"])))
    print("open", flush=True)
    for start in range(order["first"], order["last"], order["size"]):
        write(cache, range(start, start + order["size"]))
        print(start, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
