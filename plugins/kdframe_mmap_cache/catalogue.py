"""What a process knows of the cache's rows: where each is, and which shards cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdframe.api import DamagedError, RowPositions
from kdframe_mmap_cache import journal
from kdframe_mmap_cache.index import KeyIndex
from kdframe_mmap_cache.journal import Journal
from kdframe_mmap_cache.shard import Shard, ShardError

_MAPS = 4096  # shards mapped at once; a process may have some 65,000 maps

Found = tuple[Shard, int, NDArray[np.int64] | None]
"""A shard, a row of it, and which of the row's positions (None: all)."""


class Catalogue:
    """The shards that were announced, and their rows by key.

    Attributes:
        shards: those whose index is sound.
        broken: what is wrong with the others, by name. Their rows are missing.
        journal: where shards are announced.
    """

    def __init__(self, folder: Path, record_bytes: int) -> None:
        self._folder = folder
        self._record_bytes = record_bytes
        self.start_over()

    def start_over(self) -> None:
        """Forget all that was read, and all checks that passed."""
        self.journal = Journal(self._folder)
        self._forget_rows()

    def refresh(self) -> None:
        """Take in what was written since.

        Raises:
            DamagedError: the journal cannot be read.
        """
        try:
            fresh, entries = self.journal.news()
        except OSError as error:
            path = self._folder / journal.NAME
            raise DamagedError(f"{path} cannot be read ({error.strerror})") from error
        if fresh:
            self._forget_rows()
        for entry in entries:
            match entry:
                case {"shard": str(name), "index": str(index)}:
                    self._take_in(name, index)
                case {"drop": list(pairs)}:
                    for row, name in pairs:
                        self._take_out(row, name)

    def covering(self, rows: Sequence[RowPositions]) -> list[list[Found]]:
        """For each row every place that has all its positions. Checksums are not looked at."""
        places = self._index.find([row.key for row in rows])
        return [self._covering(row, at) for row, at in zip(rows, places, strict=True)]

    def _forget_rows(self) -> None:
        self._index = KeyIndex()
        self.shards: list[Shard] = []
        self._names: dict[str, int] = {}
        self.broken: dict[str, str] = {}
        self._mapped: set[Shard] = set()

    def _take_in(self, name: str, index: str) -> None:
        if name in self._names:
            return
        try:
            shard = Shard(self._folder, name, self._record_bytes)
            if f"{shard.sum:016x}" != index:
                raise ShardError(name, "is not the shard that was announced")
        except ShardError as error:
            self.broken[name] = error.reason  # its rows are missing; `verify` tells of it
            return
        self._names[name] = len(self.shards)
        self._index.add(len(self.shards), shard.keys)
        self.shards.append(shard)

    def _take_out(self, row: str, name: str) -> None:
        if not row:
            self.broken.pop(name, None)
        if name in self._names:
            shard = self.shards[self._names[name]]
            gone = np.frombuffer(bytes.fromhex(row), np.uint8)
            shard.live &= (shard.keys != gone).any(axis=1) if row else False

    def _covering(self, row: RowPositions, places: Sequence[tuple[int, int]]) -> list[Found]:
        """Where a row is stored with all the positions asked. Not checked yet."""
        found: list[Found] = []
        for number, i in places:
            shard = self.shards[number]
            if not shard.live[i] or shard.keys[i].tobytes() != row.key:
                continue
            self._note_map(shard)
            try:
                held, chosen = _choose(shard.positions(i), row.positions)
            except ShardError:
                continue  # a file that shrank; absent, then
            if held:
                found.append((shard, i, chosen))
        return found

    def _note_map(self, shard: Shard) -> None:
        self._mapped.add(shard)
        if len(self._mapped) > _MAPS:
            for mapped in self._mapped:
                mapped.close()
            self._mapped = {shard}


def _choose(
    stored: NDArray[np.int32], asked: NDArray[np.int32]
) -> tuple[bool, NDArray[np.int64] | None]:
    """Whether `stored` holds all of `asked`, and where (None: they are the same)."""
    if len(stored) == len(asked) and (stored == asked).all():
        return True, None
    if not len(stored):
        return not len(asked), np.empty(0, np.int64)
    at = np.searchsorted(stored, asked).clip(max=len(stored) - 1)
    return bool((stored[at] == asked).all()), at
