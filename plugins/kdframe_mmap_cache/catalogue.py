"""What a process knows of the cache's rows: where each is, and which shards cannot be read."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from kdframe.api import DamagedError, RowPositions
from kdframe_mmap_cache import journal
from kdframe_mmap_cache.index import KeyIndex
from kdframe_mmap_cache.journal import Journal
from kdframe_mmap_cache.shard import Chosen, Shard, ShardError

_MAPS = 4096  # shards mapped at once; a process may have some 65,000 maps
_OPEN_FILES, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
_MOST = min(_MAPS, max(1, _OPEN_FILES // 2))  # a map keeps its file open

Found = tuple[Shard, int, Chosen]
"""A shard, a row of it, and which of the row's positions."""


class Catalogue:
    """The shards that were announced, and their rows by key.

    Attributes:
        shards: those whose index is sound.
        broken: what is wrong with the others, by name. Their rows are missing.
        strange: whether the journal has entries that are not understood.
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
        before = len(self.shards)
        for entry in entries:
            match entry:
                case {"shard": str(name), "index": str(index)}:
                    self._take_in(name, index)
                case {"drop": list(pairs)}:
                    for row, name in pairs:
                        self._take_out(row, name)
                case _:
                    self.strange = True
        self._index.add([shard.keys for shard in self.shards[before:]])

    def announced(self) -> set[str]:
        """The names of all shards that were announced, but for those that were dropped broken."""
        return {*self._names, *self.broken}

    def covering(self, row: RowPositions) -> Iterator[Found]:
        """Every place that has all positions of a row, in the order in which they were announced.

        Checksums are not looked at.
        """
        for number, i in self._index.find(row.key):
            shard = self.shards[number]
            if not shard.live[i]:
                continue
            if not shard.mapped:
                self._make_room()
            try:
                chosen = shard.chosen(i, row.positions)
            except ShardError:
                continue  # a file that shrank; absent, then
            if chosen is not None:
                yield shard, i, chosen

    def sound(self, row: RowPositions) -> Found | None:
        """The first place that has all positions of a row and passes its check."""
        for found in self.covering(row):
            if found[0].check(found[1]):
                return found
        return None

    def damaged(self, row: RowPositions) -> Shard | None:
        """The first shard in which a row is not what was written, whatever its positions say."""
        for number, i in self._index.find(row.key):
            shard = self.shards[number]
            if shard.live[i] and not shard.check(i):
                return shard
        return None

    def _forget_rows(self) -> None:
        self._index = KeyIndex()
        self.shards: list[Shard] = []
        self._names: dict[str, int] = {}
        self.broken: dict[str, str] = {}
        self.strange = False
        self._maps = 0

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
        self.shards.append(shard)

    def _take_out(self, row: str, name: str) -> None:
        if not row:
            self.broken.pop(name, None)
        if name in self._names:
            shard = self.shards[self._names[name]]
            for i in shard.live_rows():
                if not row or shard.key(i).hex() == row:
                    shard.live[i] = 0

    def _make_room(self) -> None:
        """Before a shard is mapped: let go of the others, if there are too many."""
        self._maps += 1
        if self._maps > _MOST:
            for shard in self.shards:
                shard.close()
            self._maps = 1
