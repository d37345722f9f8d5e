"""The cache: finds rows by key, adds shards, checks what it reads."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdframe.api import BadRow, CacheSpec, DamagedError, InputError, RowPositions
from kdframe_arrow_cache import kept, manifest, marks, shard
from kdframe_arrow_cache.catalogue import Catalogue, Found
from kdframe_arrow_cache.shard import KEY_BYTES, pack
from kdframe_arrow_cache.store import Store

_REMEDY = "`kdframe cache verify --repair` computes it again"


class ArrowCacheStore:
    """A teacher's records in Arrow files. Any number of processes, on any machine, may use it.

    A commit writes its shard whole, then a mark that announces it; what was not announced does not
    exist. Nothing is ever appended to or written again, so nobody locks. A row may be stored more
    than once: any that holds the positions asked serves. The index is held in memory: 4 bytes a
    position and some 250 a row.

    Attributes:
        folder: the cache's folder, or the local one beside a cache that lives elsewhere.
        place: its address.
    """

    def __init__(self, store: Store, spec: CacheSpec) -> None:
        """Open the cache, or begin it.

        Raises:
            InputError: it holds another identity (names the parts that differ), a newer format,
                or something else; or the store cannot be reached.
            DamagedError: the manifest is damaged or missing.
        """
        self.folder, self.place = store.folder, store.place
        self._store, self._spec = store, spec
        manifest.open_cache(store, spec)
        self._known = Catalogue(store, spec.record_bytes)
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have written since."""
        self._known.refresh()

    def require_room(self, size: int, what: str) -> None:
        """Refuse what the disk has no room for; an object store is not asked.

        Raises:
            InputError: fewer than `size` bytes are free.
        """
        self._store.require_space(size, what)

    def missing(self, rows: Sequence[RowPositions]) -> list[int]:
        """Indices of the rows whose stored positions do not cover what is asked."""
        self.refresh()
        return [i for i, found in enumerate(self._known.covering(rows)) if not found]

    def write(self, rows: Sequence[RowPositions], records: Sequence[NDArray[np.uint8]]) -> None:
        """Store `records[i]` `[n_i, B]` for `rows[i]` as one shard. Durable on return.

        Rows that are covered already are left out.

        Raises:
            InputError: the disk is full, or the store cannot be written; what was written before
                is kept.
            ValueError: a key is not 16 bytes, or a shape does not fit.
        """
        size = self._spec.record_bytes
        for row, record in zip(rows, records, strict=True):
            if len(row.key) != KEY_BYTES or record.shape != (len(row.positions), size):
                raise ValueError(f"row {row.key.hex()}: records {record.shape}, of {size} bytes")
        first = {(rows[i].key, rows[i].positions.tobytes()): i for i in self.missing(rows)}
        if chosen := sorted(first.values()):
            self._commit([rows[i] for i in chosen], [records[i] for i in chosen])

    def read(self, rows: Sequence[RowPositions]) -> NDArray[np.uint8]:
        """Records of all rows' positions in their order, `[sum n_i, B]`.

        A single row with all its positions is a read-only view of the file.

        Raises:
            DamagedError: a row is absent, does not hold a position, or fails its checksum.
        """
        places = self._known.covering(rows)
        found = [self._good(row, at) for row, at in zip(rows, places, strict=True)]
        if len(found) == 1 and found[0][2] is None:
            return found[0][0].records(found[0][1])
        total = sum(len(row.positions) for row in rows)
        out = np.empty((total, self._spec.record_bytes), np.uint8)
        end = 0
        for row, (stored, i, chosen) in zip(rows, found, strict=True):
            begin, end = end, end + len(row.positions)
            records = stored.records(i)
            out[begin:end] = records if chosen is None else records[chosen]
        return out

    def stored(self) -> list[RowPositions]:
        """Every row that is there, each once, with the positions that it holds."""
        self.refresh()
        held: dict[bytes, NDArray[np.int32]] = {}
        for stored in self._known.shards.values():
            for i in np.flatnonzero(stored.live).tolist():
                key, positions = stored.keys[i], stored.positions(i)
                held[key] = np.union1d(held[key], positions) if key in held else positions
        return [RowPositions(key, positions.astype(np.int32)) for key, positions in held.items()]

    def places(self, key: bytes) -> list[str]:
        """The shards that hold a row."""
        self.refresh()
        nothing = RowPositions(key, np.empty(0, np.int32))
        return [stored.name for stored, *_ in self._known.covering([nothing])[0]]

    def keep(self, name: str, data: bytes) -> None:
        """Keep something beside the records, durable on return. The first to come stays."""
        kept.write(self._store, name, data)

    def kept(self, name: str) -> bytes | None:
        """What was kept under a name.

        Raises:
            DamagedError: it is not what was kept.
        """
        return kept.read(self._store, name)

    def kept_names(self) -> list[str]:
        """The names under which something is kept, in order."""
        return kept.names(self._store)

    def verify(self) -> tuple[int, list[BadRow]]:
        """Check every row where it lives: how many there are, and the bad ones.

        A shard whose index is damaged (its rows are not known) has an empty `row`; so has a
        damaged mark. A cache that lives elsewhere is copied here anew.
        """
        self._store.forget()
        self._known.start_over()  # a shard that is opened anew remembers no check
        self.refresh()
        bad = [BadRow("", name, reason) for name, reason in self._known.broken.items()]
        count = 0
        for stored in self._known.shards.values():
            for i in np.flatnonzero(stored.live).tolist():
                count += 1
                if reason := stored.fault(i):
                    bad.append(BadRow(stored.keys[i].hex(), stored.name, reason))
            stored.close()
        return count, bad

    def drop(self, rows: Sequence[BadRow]) -> None:
        """Forget rows, so that they are missing; durable on return.

        With an empty `row` the whole shard, or the damaged mark, is forgotten.
        """
        if any(bad.row and len(bytes.fromhex(bad.row)) != KEY_BYTES for bad in rows):
            raise ValueError("a row is named by its key in hexadecimal")
        if rows:
            mark = marks.dropping([(bad.row.lower(), bad.shard) for bad in rows])
            name = f"drop-{uuid.uuid4().hex[:12]}.json"
            self._store.write(f"{marks.FOLDER}/{name}", memoryview(mark))
        self.refresh()

    def info(self) -> dict[str, Any]:
        """Counts and sizes as plain data; `bytes` is that of the shards."""
        self.refresh()
        shards = self._known.shards.values()
        size = sum(stored.size for stored in shards)
        positions = sum(stored.live_positions() for stored in shards)
        return {
            "rows": sum(int(stored.live.sum()) for stored in shards),
            "positions": positions,
            "bytes": size,
            "bytes_per_position": size / positions if positions else 0.0,
            "shards": len(shards),
            "identity": dict(self._spec.identity),
            "codec": dict(self._spec.codec),
        }

    def _good(self, row: RowPositions, found: Sequence[Found]) -> Found:
        if not found:
            self.refresh()
            found = self._known.covering([row])[0]
        name, reason = row.key.hex(), ""
        for stored, i, chosen in found:
            self._known.note_map(stored)
            reason = stored.fault(i)
            if not reason:
                return stored, i, chosen
        if found:
            path = f"{self.place}/{shard.FOLDER}/{found[-1][0].name}"
            raise DamagedError(f"{path}: row {name} is damaged: {reason}; {_REMEDY}")
        raise DamagedError(
            f"{self.place}: row {name} is not there with all positions asked; {_REMEDY}"
        )

    def _commit(self, rows: Sequence[RowPositions], records: Sequence[NDArray[np.uint8]]) -> None:
        name = f"shard-{uuid.uuid4().hex[:12]}.arrow"
        data, said = pack(name, rows, records, self._spec.record_bytes)
        view = memoryview(data)
        self._store.require_space(len(view), f"{len(rows)} rows of the cache")
        mark = marks.written(said.model_dump())
        try:
            self._store.write(f"{shard.FOLDER}/{name}", view)
            self._store.write(f"{marks.FOLDER}/{marks.name_of(name)}", memoryview(mark))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise InputError(
                f"{self.place}: the disk is full; {len(view):,} bytes needed for {len(rows)} rows; "
                "rows written before are kept: free some space and start again"
            ) from error
        self._known.add(said, bytes(view[: said.columns.records]))
