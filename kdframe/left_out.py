"""Positions at which the teacher gave no numbers, and rows without them.

A cache remembers them beside its records, so that they are asked once and no start trips again.
"""

from __future__ import annotations

import dataclasses
import json
from hashlib import blake2b

import numpy as np

from kdframe.batching import TokenRows
from kdframe.cache_parts import Cache

_PREFIX = "left-out-"


class LeftOut:
    """What a cache remembers to leave out.

    Attributes:
        positions: by row key; None is the whole row.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.positions: dict[bytes, set[int] | None] = {}
        for name in cache.kept_names():
            data = cache.kept(name) if name.startswith(_PREFIX) else None
            if data is not None:
                plain = json.loads(data)
                self._note(bytes.fromhex(plain["row"]), plain["positions"])

    def add(self, key: bytes, positions: list[int] | None) -> None:
        """Leave out positions of a row, or the whole row, from now on; durable on return."""
        data = json.dumps({"row": key.hex(), "positions": positions}).encode()
        self._cache.keep(_PREFIX + blake2b(data, digest_size=16).hexdigest(), data)
        self._note(key, positions)

    def without(self, rows: TokenRows, *, whole: bool = False) -> TokenRows:
        """The rows without what is left out; a row of which nothing is left goes too.

        Args:
            whole: a row goes altogether, where it is to be compared with its text.
        """
        if not self.positions:
            return rows
        counted = rows.counted.copy()
        kept = []
        for i in range(len(rows)):
            out = self.positions.get(rows.key(i), set()) if rows.taught[i] else set()
            if out is None or (out and whole):
                continue
            begin, end = rows.offsets[i : i + 2]
            counted[begin + np.array(sorted(out), dtype=np.int64)] = False
            if not out or counted[begin:end].any():
                kept.append(i)
        return dataclasses.replace(rows, counted=counted).select(kept)

    def _note(self, key: bytes, positions: list[int] | None) -> None:
        before = self.positions.get(key, set())
        whole = positions is None or before is None
        self.positions[key] = None if whole else {*(before or ()), *(positions or ())}
