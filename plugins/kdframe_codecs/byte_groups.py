"""Numbers of falling spread in a fixed count of bytes: each byte is one look-up in a table.

A byte holds one to eight numbers whose counts of levels multiply to 256 at most, so no number
straddles two bytes, and a wide number may share its byte with a narrow one. Levels are those of
the least squared error (Lloyd 1982, Max 1960) for the logistic distribution, whose tails are
about as heavy as those of the decorrelated hidden states of a language model (kurtosis 4.2).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Levels = tuple[int, ...]

KINDS: tuple[Levels, ...] = (
    (256,),
    (64, 4),
    (32, 8),
    (20, 12),
    (16, 16),
    (10, 5, 5),
    (6, 6, 6),
    (4,) * 4,
    (3,) * 5,
    (2,) * 8,
)
_MOST = 8  # numbers in a byte
_GRID = 20_000  # points that stand for the distribution
_ROUNDS = 300


@functools.cache
def levels(count: int) -> tuple[NDArray[np.float32], float]:
    """`count` ascending levels for numbers of variance 1, and the mean squared error they leave."""
    share = (np.arange(_GRID) + 0.5) / _GRID
    points = np.log(share / (1 - share))
    points /= points.std()
    sums = np.concatenate([[0], np.cumsum(points)])
    found = points[((np.arange(count) + 0.5) / count * _GRID).astype(int)]
    for _ in range(_ROUNDS):
        edges = np.searchsorted(points, (found[1:] + found[:-1]) / 2)
        edges = np.concatenate([[0], edges, [_GRID]])
        size = np.diff(edges)
        found = np.where(size > 0, np.diff(sums[edges]) / np.maximum(size, 1), found)
    nearest = found[np.searchsorted((found[1:] + found[:-1]) / 2, points)]
    return found.astype(np.float32), float(np.square(points - nearest).mean())


@dataclass(frozen=True)
class Group:
    """`size` neighbouring bytes of one kind."""

    kind: Levels
    size: int


def allocate(variances: NDArray[np.float64], size: int) -> list[Group]:
    """The groups of `size` bytes that lose least of numbers with these falling variances.

    Reverse water-filling (Cover and Thomas, section 10.3.3) under the constraint of whole bytes:
    an exchange of bytes between two kinds is made while one lowers the squared error.
    """
    sums = np.concatenate([[0.0], np.cumsum(variances)])
    columns = sorted({count for kind in KINDS for count in kind}, reverse=True)
    uses = np.array([[kind.count(count) for count in columns] for kind in KINDS])
    errors = np.array([levels(count)[1] for count in columns])

    def lost(sizes: NDArray[np.int64]) -> float:
        ends = np.minimum(np.cumsum(sizes @ uses), len(variances))
        parts = np.diff(sums[np.concatenate([[0], ends])])
        return float(parts @ errors + sums[-1] - sums[ends[-1]])

    alone = np.eye(len(KINDS), dtype=np.int64) * size
    best = min(alone, key=lost)
    step = size
    while step:
        exchanged = min(_exchanges(best, step), key=lost, default=best)
        if lost(exchanged) < lost(best) * (1 - 1e-9):
            best = exchanged
        else:
            step //= 2
    return [Group(kind, int(n)) for kind, n in zip(KINDS, best, strict=True) if n]


def _exchanges(sizes: NDArray[np.int64], step: int) -> list[NDArray[np.int64]]:
    found = []
    for giver in np.flatnonzero(sizes >= step):
        for taker in range(len(sizes)):
            if taker != giver:
                other = sizes.copy()
                other[giver] -= step
                other[taker] += step
                found.append(other)
    return found


def order(groups: Sequence[Group], count: int) -> NDArray[np.int64]:
    """Which number stands in each place of the bytes, by its rank in spread; -1: none is left.

    The numbers of widest spread get the most levels. Places run through the groups, the bytes of
    a group and the numbers of a byte.
    """
    places = np.concatenate([np.tile(np.array(g.kind), g.size) for g in groups])
    ranks = np.empty(len(places), np.int64)
    ranks[np.argsort(-places, kind="stable")] = np.arange(len(places))
    return np.where(ranks < count, ranks, -1)


class BytePacker:
    """Numbers `[n, places]` of variance 1 to bytes `[n, size]` and back.

    Attributes:
        places: how many numbers; size: how many bytes.
    """

    def __init__(self, groups: Sequence[Group], tables: Mapping[int, NDArray[np.float32]]) -> None:
        """`tables`: the levels, ascending, by their count."""
        self._groups = list(groups)
        self.places = sum(g.size * len(g.kind) for g in groups)
        self.size = sum(g.size for g in groups)
        self._levels = {count: np.asarray(table, np.float32) for count, table in tables.items()}
        self._sections = [_Section(part, self._levels) for part in _by_numbers(self._groups)]

    @classmethod
    def fitted(cls, groups: Sequence[Group]) -> BytePacker:
        """With the levels of this module."""
        counts = {count for group in groups for count in group.kind}
        return cls(groups, {count: levels(count)[0] for count in sorted(counts)})

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, to be kept: what the bytes mean does not depend on this module."""
        rows = [[g.size, *g.kind] + [0] * (_MOST - len(g.kind)) for g in self._groups]
        tables = {f"levels.{c}": torch.from_numpy(table) for c, table in self._levels.items()}
        return {"groups": torch.tensor(rows), **tables}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> BytePacker:
        """What `tensors` gave."""
        groups = [
            Group(tuple(count for count in kind if count), size)
            for size, *kind in tensors["groups"].tolist()
        ]
        counts = {count for group in groups for count in group.kind}
        return cls(groups, {count: tensors[f"levels.{count}"].numpy() for count in counts})

    def pack(self, numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Each number to its nearest level; beyond the outermost it is that one."""
        packed = np.empty((len(numbers), self.size), np.uint8)
        at = place = 0
        for group in self._groups:
            wide = len(group.kind)
            part = numbers[:, place : place + group.size * wide].reshape(-1, group.size, wide)
            whole = np.zeros(part.shape[:2], np.int64)
            for j, count in reversed(list(enumerate(group.kind))):
                table = self._levels[count]
                whole = whole * count + np.searchsorted((table[1:] + table[:-1]) / 2, part[:, :, j])
            packed[:, at : at + group.size] = whole
            at += group.size
            place += group.size * wide
        return packed

    def unpack(self, packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Bytes `[n, size]` to numbers, into `out [n, places]`."""
        at = place = 0
        for section in self._sections:
            numbers = section.size * section.wide
            section.unpack(packed[:, at : at + section.size], out[:, place : place + numbers])
            at += section.size
            place += numbers


class _Section:
    """Neighbouring groups with the same count of numbers in a byte: one look-up serves them."""

    def __init__(self, groups: Sequence[Group], tables: Mapping[int, NDArray[np.float32]]) -> None:
        self.size = sum(g.size for g in groups)
        self.wide = len(groups[0].kind)
        table = np.stack([_table(g.kind, tables) for g in groups]).reshape(-1, self.wide)
        first = np.repeat(256 * np.arange(len(groups)), [g.size for g in groups])
        self._first = first if len(groups) > 1 else None
        # A pair moves as one item of eight bytes, several times faster than a row of two.
        self._table = table.view(np.complex64)[:, 0] if self.wide == 2 else table

    def unpack(self, packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        index = packed.astype(np.intp)
        if self._first is not None:
            index += self._first
        out[:] = self._table.take(index, axis=0).view(np.float32).reshape(out.shape)


def _table(kind: Levels, tables: Mapping[int, NDArray[np.float32]]) -> NDArray[np.float32]:
    """`[256, m]`: the numbers that each byte stands for."""
    byte = np.arange(256)
    found = np.zeros((256, len(kind)), np.float32)
    for j, count in enumerate(kind):
        found[:, j] = tables[count][byte % count]
        byte = byte // count
    return found


def _by_numbers(groups: Sequence[Group]) -> list[list[Group]]:
    found: list[list[Group]] = []
    for group in groups:
        if found and len(found[-1][0].kind) == len(group.kind):
            found[-1].append(group)
        else:
            found.append([group])
    return found
