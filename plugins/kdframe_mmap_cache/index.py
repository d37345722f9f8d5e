"""From a key to the places where its row is stored: an open hash table, 11 to 22 bytes a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_KEY_BYTES = 16
_SMALLEST = 64  # slots
_FULLEST = 0.75
_BITS = 26
_LOW = (1 << _BITS) - 1
_MORE = 1 << 2 * _BITS
_TAG = 2 * _BITS + 1


class KeyIndex:
    """Finds rows by their key, which is a hash already; grows by shards.

    A slot is 64 bits: 11 of the key, whether the key may be stored once more, 26 for the shard
    (from 1; a slot of 0 is empty), 26 for the row. A key is looked for from the slot that its
    first half names, up to the next empty one. That a place is the key's own is seen in the
    shard's keys, which whoever reads the shard holds in memory anyway.
    """

    def __init__(self) -> None:
        self._keys: list[bytes] = []  # of each shard, one after the other
        self._rows = 0
        self._reserve(_SMALLEST)

    def add(self, shards: Sequence[bytes]) -> None:
        """Add the next shards, numbered from 0: the keys of each, one after the other."""
        first = len(self._keys)
        self._keys += shards
        self._rows += sum(len(keys) // _KEY_BYTES for keys in shards)
        if self._rows > _FULLEST * len(self._table):
            self._reserve(len(self._table))
            first = 0
        if first < len(self._keys):
            self._insert(first)

    def find(self, key: bytes) -> list[tuple[int, int]]:
        """Every `(shard, row)` of a key of 16 bytes, in order."""
        found = []
        slots, mask = self._slots, self._mask
        half = int.from_bytes(key[:8], "little")
        tag, slot = half >> _TAG, half & mask
        while place := slots[slot]:
            if place >> _TAG == tag:
                shard, row = (place >> _BITS & _LOW) - 1, place & _LOW
                if self._keys[shard].startswith(key, row * _KEY_BYTES):
                    found.append((shard, row))
                    if not place & _MORE:
                        break
            slot = (slot + 1) & mask
        if len(found) > 1:
            found.sort()  # the order of the slots depends on how the table grew
        return found

    def _reserve(self, slots: int) -> None:
        while self._rows > _FULLEST * slots:
            slots *= 2
        self._table = np.zeros(slots, np.uint64)
        self._slots = self._table.data  # faster than numpy for one slot
        self._mask = slots - 1

    def _insert(self, first: int) -> None:
        """Insert the rows of all shards from the `first` on."""
        some = self._keys[first:]
        halves = np.frombuffer(b"".join(some), "<u8")[::2]
        counts = np.array([len(keys) // _KEY_BYTES for keys in some])
        places = np.arange(len(halves)) - np.repeat(counts.cumsum() - counts, counts)
        places |= np.repeat(np.arange(first, len(self._keys)) + 1, counts) << _BITS
        tags = halves >> np.uint64(_TAG) << np.uint64(_TAG)
        slots = (halves & np.uint64(self._mask)).view(np.int64)
        self._settle(slots, tags | places.view(np.uint64))

    def _settle(self, slots: NDArray[np.int64], places: NDArray[np.uint64]) -> None:
        """Put each place into the first empty slot from its own on."""
        table = self._table
        while len(slots):
            empty = table[slots] == 0
            table[slots[empty]] = places[empty]  # of several, one wins
            there = table[slots]
            left = there != places
            slots, places, there = slots[left], places[left], there[left]
            alike = slots[(there ^ places) >> np.uint64(_TAG) == 0]
            table[alike] |= np.uint64(_MORE)
            slots = (slots + 1) & self._mask
