"""How fast the teacher cache reads: rows asked in shuffled order, microseconds for each row.

Every round does every measurement once, in turn, so that a busy machine troubles all alike; the
medians are printed. Warm ones are CPU time, cold ones wall time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from kdframe.api import CacheSpec, RowPositions
from kdframe_mmap_cache.cache import MmapCacheFolder
from kdframe_mmap_cache.shard import row_sum

_SHARD_ROWS = 16


class Bench:
    """A cache of random rows in a folder, and what can be measured on it.

    Attributes:
        rows: the requests, in shuffled order; batches: the same, several at once.
    """

    def __init__(self, folder: Path, rows: int, positions: int, size: int, batch: int) -> None:
        self._spec = CacheSpec({"benchmark": "reads"}, folder, size, {})
        self._folder = folder
        rng = np.random.default_rng(0)
        self.rows = [RowPositions(rng.bytes(16), _ascending(positions)) for _ in range(rows)]
        cache = self.opened()
        for start in range(0, rows, _SHARD_ROWS):
            some = self.rows[start : start + _SHARD_ROWS]
            cache.write(some, [rng.integers(0, 256, (positions, size), np.uint8) for _ in some])
        rng.shuffle(self.rows)
        self.batches = [self.rows[i : i + batch] for i in range(0, rows, batch)]
        self.warm = self.opened()
        self._views = [self.warm.read([row]) for row in self.rows]
        # Another process asks with arrays of its own.
        self._asked = [[RowPositions(r.key, r.positions.copy())] for r in self.rows]
        # Not at the beginning of a page: there memcpy would be slower than `read`.
        self._into = np.zeros(batch * positions * size + 2112, np.uint8)[2112:].reshape(-1, size)

    def opened(self) -> MmapCacheFolder:
        """The cache as a process that has just started sees it."""
        return MmapCacheFolder(self._folder, self._spec)

    def warm_view(self) -> float:
        return _seconds(time.process_time, self._read_all, self.warm, self._asked)

    def warm_copied(self) -> float:
        return _seconds(time.process_time, self._read_all, self.warm, self.batches)

    def memcpy(self) -> float:
        return _seconds(time.process_time, self._copy_all)

    def first_view(self) -> float:
        return _seconds(time.process_time, self._read_all, self.opened(), self._asked)

    def checksum(self) -> float:
        return _seconds(time.process_time, self._sum_all)

    def cold_read(self) -> float:
        cache = self._cold()
        return _seconds(time.perf_counter, self._read_all, cache, self._asked)

    def cold_pread(self) -> float:
        places = self._places()
        self._cold()
        return _seconds(time.perf_counter, self._pread_all, places)

    def resident(self) -> float:
        """The part of the shards that the page cache still holds after it was asked to drop it."""
        self._cold()
        pages = [_resident(path) for path in self._shards()]
        return sum(held for held, _ in pages) / sum(count for _, count in pages)

    def _shards(self) -> list[Path]:
        return sorted(self._folder.glob("shard-*.bin"))

    def _cold(self) -> MmapCacheFolder:
        """A cache that was just opened, its rows in no page of memory."""
        self._views, self.warm = [], self.opened()  # a page that is mapped stays
        cache = self.opened()
        for path in self._shards():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        return cache

    def warm_again(self) -> None:
        """Map and check every row, after a cold measurement."""
        self._views = [self.warm.read(row) for row in self._asked]

    def _places(self) -> list[tuple[int, int, int]]:
        """File handle, offset and length of each row's records."""
        by_data = {}
        for path in self._shards():
            data, handle = path.read_bytes(), os.open(path, os.O_RDONLY)
            for view in self._views:
                if (at := data.find(view[:2].tobytes())) >= 0:
                    by_data[view.ctypes.data] = (handle, at, view.nbytes)
        return [by_data[view.ctypes.data] for view in self._views]

    @staticmethod
    def _read_all(cache: MmapCacheFolder, requests: Sequence[Sequence[RowPositions]]) -> None:
        for rows in requests:
            cache.read(rows)

    def _copy_all(self) -> None:
        step, count = len(self._views[0]), len(self.batches[0])
        for i, view in enumerate(self._views):
            begin = i % count * step
            self._into[begin : begin + step] = view

    def _sum_all(self) -> None:
        for row, view in zip(self.rows, self._views, strict=True):
            row_sum(row.key, row.positions, view)

    @staticmethod
    def _pread_all(places: Sequence[tuple[int, int, int]]) -> None:
        for handle, at, size in places:
            os.pread(handle, size, at)
        for handle in {handle for handle, _, _ in places}:
            os.close(handle)


def _ascending(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def _seconds(clock: Callable[[], float], work: Callable[..., None], *arguments: object) -> float:
    began = clock()
    work(*arguments)
    return clock() - began


def _resident(path: Path) -> tuple[int, int]:
    """Pages of a file that are in the page cache, and all its pages (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    pages = (ctypes.c_ubyte * (-(-len(mapped) // mmap.PAGESIZE)))()
    address = ctypes.c_void_p(mapped.ctypes.data)
    if libc.mincore(address, ctypes.c_size_t(len(mapped)), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages), len(pages)


def measured(bench: Bench, rounds: int, cold_rounds: int) -> dict[str, float]:
    """Median microseconds for each row of every measurement, and the resident part when cold."""
    warm = {
        "warm read, a view": bench.warm_view,
        "warm read, copied into a batch": bench.warm_copied,
        "memcpy of the same bytes": bench.memcpy,
        "first read, a view, checksummed": bench.first_view,
        "the checksum alone": bench.checksum,
    }
    cold = {"cold read, checksummed": bench.cold_read, "cold pread": bench.cold_pread}
    taken: dict[str, list[float]] = {name: [] for name in [*warm, *cold]}
    for _ in range(rounds):
        for name, measure in warm.items():
            taken[name].append(measure())
    for _ in range(cold_rounds):
        for name, measure in cold.items():
            bench.warm_again()
            taken[name].append(measure())
    each = 1e6 / len(bench.rows)
    figures = {name: median(times) * each for name, times in taken.items()}
    return {**figures, "resident when cold": bench.resident()}


def main() -> None:
    """Make a cache, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512, help="rows of the cache")
    parser.add_argument("--positions", type=int, default=512, help="positions of a row")
    parser.add_argument("--record-bytes", type=int, default=256, help="bytes of a position")
    parser.add_argument("--batch", type=int, default=8, help="rows that are copied in one read")
    parser.add_argument("--rounds", type=int, default=31, help="repetitions, warm")
    parser.add_argument("--cold-rounds", type=int, default=7, help="repetitions, cold")
    parser.add_argument("--folder", type=Path, help="where to make the cache (not in memory)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        made = (given.rows, given.positions, given.record_bytes, given.batch)
        figures = measured(Bench(Path(folder) / "cache", *made), given.rounds, given.cold_rounds)
    if given.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{given.positions} positions of {given.record_bytes} bytes a row")
    for name, value in figures.items():
        part = name == "resident when cold"
        print(f"{name:34}{value:10.1%}" if part else f"{name:34}{value:10.2f} µs a row")


if __name__ == "__main__":
    main()
