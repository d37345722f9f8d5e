"""Records of drawn ids: two sorted lists in Elias–Fano code, and their weights.

A sorted list of m ids below U takes m * (l + 1) + (U >> l) bits: the l lower bits of each as they
are, the higher ones as the distances between marks in a row of bits (Elias, JACM 21, 1974; Fano,
MIT Project MAC memo 61, 1971). For m of about U / 2**l that is within half a bit an id of what any
code needs for a set without further knowledge.

A record is, little-endian: how many likely ids and how many unlikely ones; the level of either's
weight, one byte each; then bits: the group; the marks of both lists; a flag for each likely id that
is kept for certain; the lower bits of both lists; a level for each certain id. What is left is 0.

Letters: `n` records, `a` likely ids (certain and drawn), `t` unlikely ids, `B` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdframe_codecs.drawn import Prices

GROUPS = 16
_BLOCK = 2048  # records unpacked at once: their parts fit the processor's cache
_GROUP_BITS = 4
_LEVEL_BITS = 7

OWN_GRID = (np.arange(2**_LEVEL_BITS) / (2**_LEVEL_BITS - 1)) ** 2
"""Weights of certain ids: the square spreads the rounding's variance as evenly as p."""
COMMON_GRID = np.append(0.0, GROUPS * 2.0 ** ((np.arange(255) - 254) / 8))
"""Weights of drawn ids: 9 % apart, which adds a thousandth to their variance."""


_OWN32, _COMMON32 = OWN_GRID.astype(np.float32), COMMON_GRID.astype(np.float32)


@dataclass(frozen=True)
class Drawn:
    """What records say. Past a row's own count, ids and levels mean nothing.

    Attributes:
        group: `[n]`, the group of the unlikely ids.
        counts: `[n, 2]`, likely and unlikely ids; weights: `[n, 2]`, levels of `COMMON_GRID`.
        likely: `[n, a]`, ids, ascending; certain: `[n, a]`, which of them are kept for certain;
            own: `[n, a]`, levels of `OWN_GRID`, for these.
        unlikely: `[n, t]`, places in the group (the id is `place * groups + group`), ascending.
    """

    group: NDArray[np.int64]
    counts: NDArray[np.int64]
    weights: NDArray[np.int64]
    likely: NDArray[np.int64]
    certain: NDArray[np.bool_]
    own: NDArray[np.int64]
    unlikely: NDArray[np.int64]


class Layout:
    """Sizes of a record's parts, and the way there and back.

    Attributes:
        groups: how many groups the vocabulary is cut into: 1 where it is small.
        members: ids of a group; record_bytes: `B`; prices: in bits.
    """

    def __init__(self, vocab_size: int, entries: int) -> None:
        self.groups = GROUPS if vocab_size >= 4 * GROUPS * entries else 1
        self.members = -(-vocab_size // self.groups)
        self._low = (_low_bits(vocab_size, entries / 2), _low_bits(self.members, entries))
        self._spans = ((vocab_size - 1) >> self._low[0], (self.members - 1) >> self._low[1])
        likely, unlikely = self._low[0] + 2, self._low[1] + 1
        # Room for the least that a record without bias needs: one entry of each kind.
        room = max(entries * likely, 2 * likely + unlikely + _LEVEL_BITS)
        fixed = _GROUP_BITS + sum(self._spans)
        self._body = -(-(fixed + room) // 8)
        room = self._body * 8 - fixed
        self.prices = Prices(room, likely + _LEVEL_BITS, likely, unlikely)
        self._count_type = np.dtype("<u1" if room // unlikely < 256 else "<u2")
        self._head = 2 * self._count_type.itemsize + 2
        self.record_bytes = self._head + self._body

    def pack(self, drawn: Drawn) -> NDArray[np.uint8]:
        """Records `[n, B]`."""
        n = len(drawn.group)
        a, t = drawn.counts[:, :1], drawn.counts[:, 1:]
        bits = np.zeros((n, 8 * self._body), np.uint8)
        _put(bits, np.zeros((n, 1), np.int64), drawn.group[:, None], _GROUP_BITS)
        i, j = np.arange(drawn.likely.shape[1]), np.arange(drawn.unlikely.shape[1])
        is_likely, is_unlikely = i < a, j < t
        marks = (drawn.likely >> self._low[0]) + i + _GROUP_BITS
        _put(bits, marks, np.ones_like(marks), 1, is_likely)
        marks = (drawn.unlikely >> self._low[1]) + j + _GROUP_BITS + a + self._spans[0]
        _put(bits, marks, np.ones_like(marks), 1, is_unlikely)
        flags = a + t + _GROUP_BITS + sum(self._spans)
        _put(bits, flags + i, drawn.certain, 1, is_likely)
        lower = flags + a
        _put(bits, lower + i * self._low[0], drawn.likely, self._low[0], is_likely)
        lower = lower + a * self._low[0]
        _put(bits, lower + j * self._low[1], drawn.unlikely, self._low[1], is_unlikely)
        kept = drawn.certain & is_likely
        levels = lower + t * self._low[1] + _LEVEL_BITS * (kept.cumsum(-1) - 1)
        _put(bits, levels, drawn.own, _LEVEL_BITS, kept)
        records = np.empty((n, self.record_bytes), np.uint8)
        records[:, : self._head - 2] = drawn.counts.astype(self._count_type).view(np.uint8)
        records[:, self._head - 2 : self._head] = drawn.weights
        records[:, self._head :] = np.packbits(bits, axis=1, bitorder="little")
        return records

    def unpack(self, records: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and weights, `[n, k]` each; 0 past a row's own number of entries."""
        n = len(records)
        counts = np.ascontiguousarray(records[:, : self._head - 2]).view(self._count_type)
        both = counts.sum(-1, keepdims=True, dtype=np.int32)
        shape = (n, int(both.max(initial=0)))
        ids, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        present = np.arange(shape[1], dtype=np.int32) < both
        for i in range(0, n, _BLOCK):
            part = slice(i, i + _BLOCK)
            found = self._entries(records[part], counts[part].astype(np.int32))
            ids[part][present[part]], weights[part][present[part]] = found
        return ids, weights

    def _entries(
        self, records: NDArray[np.uint8], counts: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and weights of all rows, one row's likely and then its unlikely ones."""
        body, lists = _Bits(records[:, self._head :]), _Lists(counts)
        a, t = counts[:, :1], counts[:, 1:]
        end = _GROUP_BITS + sum(self._spans) + a + t
        lower = body.rows + end + a + np.append(np.zeros_like(a), a * self._low[0], axis=1)
        weights = lists.repeat(_COMMON32[records[:, self._head - 2 : self._head]])

        likely = _Lists(a)
        flags = body.take(likely.repeat(body.rows + end - likely.first) + likely.order, 1)
        certain = np.flatnonzero(flags)
        its_row = likely.repeat(np.arange(len(a))[:, None])[certain]
        own = _Lists(np.bincount(its_row, minlength=len(a)).astype(np.int32)[:, None])
        start = own.repeat(lower[:, 1:] + t * self._low[1] - own.first * _LEVEL_BITS)
        levels = body.take(start + own.order * _LEVEL_BITS, 2**_LEVEL_BITS - 1)
        weights[own.repeat(lists.first[:, :1] - likely.first) + certain] = _OWN32[levels]
        return self._ids(body, lists, end, lower), weights

    def _ids(
        self, body: _Bits, lists: _Lists, end: NDArray[np.int32], lower: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        low = np.array(self._low, np.int32)
        marks, row = body.marks(_GROUP_BITS, end)
        # The i-th mark of a row stands behind its id's higher bits and i other marks.
        behind = row + _GROUP_BITS - lists.first[:, :1] + np.array([0, self._spans[0]], np.int32)
        higher = marks - lists.repeat(behind) - lists.order
        width = lists.repeat(low)
        start = lists.repeat(lower - lists.first * low) + lists.order * width
        higher <<= width
        higher |= body.take(start, lists.repeat((1 << low) - 1))
        group = body.take(body.rows, 2**_GROUP_BITS - 1)
        higher *= lists.repeat(np.array([1, self.groups], np.int32))
        higher += lists.repeat(group * np.array([0, 1], np.int32))
        ids: NDArray[np.int32] = higher
        return ids


class _Lists:
    """Lists of different lengths, one after the other.

    Attributes:
        first: of each list, how many entries stand before it, in the shape of the counts.
        order: 0, 1, ... over all entries.
    """

    def __init__(self, counts: NDArray[np.int32]) -> None:
        self._counts = counts.reshape(-1).astype(np.intp)
        end = np.cumsum(self._counts)
        self.first = (end - self._counts).astype(np.int32).reshape(counts.shape)
        self.order = np.arange(self._counts.sum(), dtype=np.int32)

    def repeat(self, values: NDArray[Any]) -> NDArray[Any]:
        """A list's value for each of its entries."""
        whole = np.broadcast_to(values, self.first.shape).reshape(-1)
        repeated: NDArray[Any] = np.repeat(whole, self._counts)
        return repeated


class _Bits:
    """Fields of up to 25 bits at any place of rows of bytes, which stand one after the other.

    Attributes:
        rows: `[n, 1]`, the place of each row's first bit.
    """

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        n, width = rows.shape
        whole = np.zeros(n * width + 4, np.uint8)
        self._bytes = whole[:-4].reshape(n, width)
        self._bytes[:] = rows
        # Copied: where words overlap, reading them is several times slower.
        self._words = np.array(np.ndarray(n * width + 1, "<i4", whole, strides=(1,)))
        self.rows = np.arange(n, dtype=np.int32)[:, None] * np.int32(8 * width)

    def take(self, start: NDArray[np.int32], mask: NDArray[np.int32] | int) -> NDArray[np.int32]:
        """The fields that begin at `start`; a mask has their bits set."""
        word: NDArray[np.int32] = self._words.take(start >> 3)
        word >>= start & 7
        word &= mask
        return word

    def marks(
        self, first: int, end: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The bits that are set from each row's bit `first` to before its bit `end [n, 1]`.

        Returns:
            their places, and `[n, 1]` the place at which each row begins.
        """
        size = -(-int(end.max(initial=0)) // 8)
        bits = np.unpackbits(self._bytes[:, :size], axis=1, bitorder="little").view(np.bool_)
        bits &= np.arange(8 * size, dtype=np.int32) < end
        bits[:, :first] = False
        rows = np.arange(len(end), dtype=np.int32)[:, None] * np.int32(8 * size)
        return np.flatnonzero(bits).astype(np.int32), rows


def _put(
    bits: NDArray[np.uint8],
    start: NDArray[np.int64],
    values: NDArray[np.int64] | NDArray[np.bool_],
    width: int,
    which: NDArray[np.bool_] | None = None,
) -> None:
    """Write `width` bits of the values at their places; `which [n, m]` of them."""
    row, column = np.nonzero(np.ones(start.shape, bool) if which is None else which)
    place = start[row, column, None] + np.arange(width)
    bits[row[:, None], place] = (values[row, column, None] >> np.arange(width)) & 1


def _low_bits(universe: int, count: float) -> int:
    return max(0, int(np.log2(max(1.0, universe / max(1.0, count)))))
