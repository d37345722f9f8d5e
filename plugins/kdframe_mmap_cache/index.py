"""From a key to the places where its row is stored: an open hash table, 11 to 22 bytes a row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_KEY_BYTES = 16
_SMALLEST = 64  # slots
_FULLEST = 0.75


class KeyIndex:
    """Finds rows by their key, which is a hash already; grows by shards.

    A slot holds a place, `shard << 32 | row`, plus one; 0 is empty. A key's places stand in the
    slots from its first half (modulo the number of slots) on, up to the next empty one. Whether
    they are its own is seen in the shards' keys, which the caller's shards hold in memory anyway.
    """

    def __init__(self) -> None:
        self._keys: list[bytes] = []  # of each shard, one after the other
        self._rows = 0
        self._reserve(_SMALLEST)

    def add(self, keys: bytes) -> None:
        """Add the rows of the next shard (they are numbered from 0), `16 r` bytes."""
        self._keys.append(keys)
        self._rows += len(keys) // _KEY_BYTES
        if self._rows > _FULLEST * len(self._table):
            self._reserve(2 * len(self._table))
            self._insert(0)
        else:
            self._insert(len(self._keys) - 1)

    def find(self, key: bytes) -> list[tuple[int, int]]:
        """Every `(shard, row)` of a key of 16 bytes, in order."""
        found = []
        slots, mask = self._slots, self._mask
        slot = int.from_bytes(key[:8], "little") & mask
        while place := slots[slot]:
            shard, row = (place - 1) >> 32, (place - 1) & 0xFFFFFFFF
            at = row * _KEY_BYTES
            if self._keys[shard][at : at + _KEY_BYTES] == key:
                found.append((shard, row))
            slot = (slot + 1) & mask
        if len(found) > 1:
            found.sort()  # the order of the slots depends on how the table grew
        return found

    def _reserve(self, slots: int) -> None:
        while self._rows > _FULLEST * slots:
            slots *= 2
        self._table = np.zeros(slots, np.uint64)
        self._slots = memoryview(self._table)  # faster than numpy for one slot
        self._mask = slots - 1

    def _insert(self, first: int) -> None:
        """Insert the rows of all shards from the `first` on."""
        some = self._keys[first:]
        halves = np.frombuffer(b"".join(some), "<u8")[::2]
        counts = np.array([len(keys) // _KEY_BYTES for keys in some])
        shards = np.repeat(np.arange(first, len(self._keys)), counts)
        rows = np.arange(len(halves)) - np.repeat(counts.cumsum() - counts, counts)
        self._settle(
            (halves & np.uint64(self._mask)).astype(np.int64),
            (shards << 32 | rows).astype(np.uint64) + np.uint64(1),
        )

    def _settle(self, slots: NDArray[np.int64], places: NDArray[np.uint64]) -> None:
        """Put each place into the first empty slot from its own on."""
        while len(slots):
            empty = self._table[slots] == 0
            self._table[slots[empty]] = places[empty]  # of several, one wins
            others = self._table[slots] != places
            slots, places = (slots[others] + 1) & self._mask, places[others]
