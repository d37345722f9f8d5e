"""What a process knows of the cache's rows: where each is, and which shards cannot be read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdframe.api import RowPositions
from kdframe_arrow_cache import marks, shard
from kdframe_arrow_cache.marks import Announcement, MarkError
from kdframe_arrow_cache.shard import Shard, ShardError
from kdframe_arrow_cache.store import Store

_MAPS = 4096  # shards mapped at once; a process may have some 65,000 maps

Found = tuple[Shard, int, NDArray[np.int64] | None]
"""A shard, a row of it, and which of the row's positions (None: all)."""


class Catalogue:
    """The shards that were announced, and their rows by key.

    Attributes:
        shards: those whose index is sound, by name.
        broken: what is wrong with other shards and with marks, by name. Their rows are missing.
    """

    def __init__(self, store: Store, record_bytes: int) -> None:
        self._store = store
        self._record_bytes = record_bytes
        self.start_over()

    def start_over(self) -> None:
        """Forget all that was read, and all checks that passed."""
        self.shards: dict[str, Shard] = {}
        self.broken: dict[str, str] = {}
        self._seen: set[str] = set()
        self._dropped: dict[str, set[str]] = {}
        self._places: dict[bytes, list[tuple[Shard, int]]] = {}
        self._mapped: set[Shard] = set()

    def refresh(self) -> None:
        """Take in what was written since.

        Raises:
            InputError: the store cannot be reached, or a newer kdframe wrote to it.
        """
        fresh = [name for name in self._store.names(marks.FOLDER) if name not in self._seen]
        texts = self._store.read([(f"{marks.FOLDER}/{name}", None) for name in fresh])
        said: list[Announcement] = []
        dropped: list[tuple[str, str]] = []
        for name, text in zip(fresh, texts, strict=True):
            match self._understood(name, text):
                case Announcement() as announcement:
                    said.append(announcement)
                case list(pairs):
                    dropped += pairs
        self._seen.update(fresh)
        heads = self._store.read([(f"{shard.FOLDER}/{s.shard}", s.columns.records) for s in said])
        for announcement, head in zip(said, heads, strict=True):
            self._take_in(announcement, head)
        for row, name in dropped:
            self._dropped.setdefault(name, set()).add(row)
        for name in {name for _, name in dropped} | {s.shard for s in said}:
            self._take_out(name)

    def add(self, said: Announcement, head: bytes) -> None:
        """Take in a shard that this process has announced."""
        self._seen.add(marks.name_of(said.shard))
        self._take_in(said, head)

    def covering(self, rows: Sequence[RowPositions]) -> list[list[Found]]:
        """For each row every place that has all its positions. Records are not looked at."""
        return [self._covering(row) for row in rows]

    def note_map(self, used: Shard) -> None:
        """Remember that a shard is mapped, and close all maps when there are too many."""
        self._mapped.add(used)
        if len(self._mapped) > _MAPS:
            for mapped in self._mapped - {used}:
                mapped.close()
            self._mapped = {used}

    def _understood(
        self, name: str, text: bytes | OSError
    ) -> Announcement | list[tuple[str, str]] | None:
        if isinstance(text, OSError):
            self.broken[name] = f"cannot be read ({text.strerror or type(text).__name__})"
            return None
        try:
            return marks.read(self._store.place, name, text)
        except MarkError as error:
            self.broken[name] = str(error)  # its rows are missing; `verify` tells of it
            return None

    def _take_in(self, said: Announcement, head: bytes | OSError) -> None:
        try:
            taken = Shard(self._store, said, head, self._record_bytes)
        except ShardError as error:
            self.broken[said.shard] = str(error)
            return
        self.shards[taken.name] = taken
        for i, key in enumerate(taken.keys):
            self._places.setdefault(key, []).append((taken, i))

    def _take_out(self, name: str) -> None:
        rows = self._dropped.get(name, set())
        if "" in rows:
            self.broken.pop(name, None)
        if found := self.shards.get(name):
            gone = [not ({"", key.hex()} & rows) for key in found.keys]
            found.live &= np.array(gone, bool)

    def _covering(self, row: RowPositions) -> list[Found]:
        found: list[Found] = []
        for stored, i in self._places.get(row.key, ()):
            if stored.live[i]:
                held, chosen = _choose(stored.positions(i), row.positions)
                if held:
                    found.append((stored, i, chosen))
        return found


def _choose(
    stored: NDArray[np.int32], asked: NDArray[np.int32]
) -> tuple[bool, NDArray[np.int64] | None]:
    """Whether `stored` holds all of `asked`, and where (None: they are the same)."""
    if np.array_equal(stored, asked):
        return True, None
    if not len(stored):
        return not len(asked), np.empty(0, np.int64)
    at = np.searchsorted(stored, asked).clip(max=len(stored) - 1)
    return bool((stored[at] == asked).all()), at
