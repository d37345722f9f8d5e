"""The rows that a teacher reads, and a few of them that stand for all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdframe.batching import TokenRows
from kdframe.cache_parts import RowPositions

FEWEST = 8
"""Rows to draw at least, however long they are: one long row speaks of one thing only."""


@dataclass(frozen=True)
class TaughtRow:
    """A row that the teacher reads: its token ids, and the positions that count."""

    ids: NDArray[np.int32]
    request: RowPositions

    def thinned(self, count: int) -> TaughtRow:
        """The same row with at most `count` of its positions, evenly spaced."""
        positions = self.request.positions
        if len(positions) <= count:
            return self
        at = ((np.arange(count) + 0.5) * len(positions) / count).astype(np.int64)
        return TaughtRow(self.ids, RowPositions(self.request.key, positions[at]))


def taught_rows(sets: Iterable[TokenRows]) -> list[TaughtRow]:
    """Every row that the teacher reads; one that stands in the data twice is there once."""
    found: dict[bytes, TaughtRow] = {}
    for rows in sets:
        for i in np.flatnonzero(rows.taught).tolist():
            key, positions = rows.key(i), rows.positions(i)
            if key in found:
                both = np.union1d(found[key].request.positions, positions)
                positions = both.astype(np.int32)
            found[key] = TaughtRow(rows.row(i), RowPositions(key, positions))
    return list(found.values())


def positions(rows: Iterable[TaughtRow]) -> int:
    """Positions of all rows."""
    return sum(len(row.request.positions) for row in rows)


def draw(rows: Sequence[TaughtRow], count: int) -> list[TaughtRow]:
    """Rows with at least about `count` positions, at equal distances through all positions.

    So every source has its share of them.
    """
    many = max(FEWEST, math.ceil(count * len(rows) / max(1, positions(rows))))
    if len(rows) <= many:
        return list(rows)
    ends = np.cumsum([len(row.request.positions) for row in rows])
    points = (np.arange(many) + 0.5) * ends[-1] / many
    return [rows[i] for i in np.unique(np.searchsorted(ends, points, side="right")).tolist()]


def thin(rows: Sequence[TaughtRow], count: int) -> list[TaughtRow]:
    """The same rows with about `count` of their positions: of a long row only some."""
    return [row.thinned(math.ceil(count / len(rows))) for row in rows]
