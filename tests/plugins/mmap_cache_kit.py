"""What the cache's tests share. Run as a program it is a writer that can be killed.

A row's key, positions and records follow from its number, so that any process can say what a
number's row must read as.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from kdframe.api import CacheSpec, RowPositions
from kdframe_mmap_cache.cache import MmapCacheFolder

RECORD_BYTES = 12
IDENTITY = {"teacher_weights": "a" * 64, "tokenizer": "b" * 64, "codec": "topk(k=2)"}


def spec(**changes: str) -> CacheSpec:
    identity = {**IDENTITY, **changes}
    return CacheSpec(identity, Path("unused"), RECORD_BYTES, {"kind": "topk", "k": 2})


def open_cache(folder: Path, **changes: str) -> MmapCacheFolder:
    return MmapCacheFolder(folder, spec(**changes))


def row(number: int) -> RowPositions:
    key = hashlib.blake2b(str(number).encode(), digest_size=16).digest()
    rng = np.random.default_rng(number)
    count = int(rng.integers(1, 30))
    return RowPositions(key, np.sort(rng.choice(100, count, replace=False)).astype(np.int32))


def record(number: int) -> np.ndarray:
    rng = np.random.default_rng(number + 10**6)
    return rng.integers(0, 256, (len(row(number).positions), RECORD_BYTES), np.uint8)


def write(cache: MmapCacheFolder, numbers) -> None:
    cache.write([row(i) for i in numbers], [record(i) for i in numbers])


def holds(cache: MmapCacheFolder, number: int) -> bool:
    """Whether the cache reads the row back as it was written."""
    return bool(np.array_equal(cache.read([row(number)]), record(number)))


if __name__ == "__main__":
    target, first, last, size = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    store = open_cache(target)
    print("open", flush=True)
    for start in range(first, last, size):
        write(store, range(start, start + size))
        print(start, flush=True)
