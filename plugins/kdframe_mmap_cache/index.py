"""From a key to the places where its row is stored: sorted arrays, 16 bytes a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Run = tuple[NDArray[np.uint64], NDArray[np.uint64]]


class KeyIndex:
    """Finds rows by the first half of their key (a hash); grows by shards."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []  # sorted half keys; shard << 32 | row of each

    def add(self, shard: int, keys: NDArray[np.uint8]) -> None:
        """Add a shard's rows, `keys [r, 16]`."""
        places = np.arange(len(keys), dtype=np.uint64) | np.uint64(shard << 32)
        run = _sorted(np.ascontiguousarray(keys).view("<u8")[:, 0], places)
        # Runs at least halve in size, so that there are few and each row is merged few times.
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            last = self._runs.pop()
            run = _sorted(np.concatenate([last[0], run[0]]), np.concatenate([last[1], run[1]]))
        self._runs.append(run)

    def find(self, keys: Sequence[bytes]) -> list[list[tuple[int, int]]]:
        """For each key of 16 bytes every `(shard, row)` whose key has the same first half."""
        found: list[list[tuple[int, int]]] = [[] for _ in keys]
        halves = np.frombuffer(b"".join(keys), "<u8")[::2].copy()
        for sorted_halves, places in self._runs:
            left = np.searchsorted(sorted_halves, halves, side="left")
            right = np.searchsorted(sorted_halves, halves, side="right")
            for i in np.flatnonzero(right > left).tolist():
                for place in places[left[i] : right[i]].tolist():
                    found[i].append((place >> 32, place & 0xFFFFFFFF))
        return found


def _sorted(halves: NDArray[np.uint64], places: NDArray[np.uint64]) -> _Run:
    order = np.argsort(halves, kind="stable")
    return halves[order], places[order]
