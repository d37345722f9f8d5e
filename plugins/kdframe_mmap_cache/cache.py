"""The cache folder: finds rows by key, adds shards, checks what it reads."""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdframe.api import BadRow, CacheSpec, DamagedError, InputError, RowPositions, durable
from kdframe_mmap_cache import journal, kept, leftovers, manifest
from kdframe_mmap_cache.catalogue import Catalogue
from kdframe_mmap_cache.shard import ALL, KEY_BYTES, index_sum, pack

_REMEDY = "`kdframe cache verify --repair` computes it again"
_DISAGREES = "the checksum disagrees"
_FAULTS_SHOWN = 3
_TRIES = 3


class MmapCacheFolder:
    """A teacher's records in a folder of shards. Any number of processes may read and write.

    A commit writes its shard whole, then announces it in the journal; what was not announced
    does not exist. A row may be stored more than once: any that holds the positions asked serves.

    Attributes:
        folder: where it lives; place: the same as text.
    """

    def __init__(self, folder: Path, spec: CacheSpec) -> None:
        """Open the cache, or begin it.

        Raises:
            InputError: the folder holds another identity (names the parts that differ), a newer
                format, or something else.
            DamagedError: the manifest or the journal is damaged or missing.
        """
        self.folder = folder
        self.place = str(folder)
        self._spec = spec
        manifest.open_folder(folder, spec)
        self._known = Catalogue(folder, spec.record_bytes)
        self.refresh()
        self._clear()

    def refresh(self) -> None:
        """Take in what other processes have written since."""
        self._known.refresh()

    def require_room(self, size: int, what: str) -> None:
        """Refuse what the disk has no room for.

        Raises:
            InputError: fewer than `size` bytes are free.
        """
        durable.require_space(self.folder, size, what)

    def missing(self, rows: Sequence[RowPositions]) -> list[int]:
        """Indices of the rows whose stored positions do not cover what is asked."""
        self.refresh()
        return [i for i, row in enumerate(rows) if not any(True for _ in self._known.covering(row))]

    def write(self, rows: Sequence[RowPositions], records: Sequence[NDArray[np.uint8]]) -> None:
        """Store `records[i]` `[n_i, B]` for `rows[i]` as one shard. Durable on return.

        Rows that are covered already are left out.

        Raises:
            InputError: the disk is full; what was written before is kept.
            ValueError: a key is not 16 bytes, or a shape does not fit.
        """
        size = self._spec.record_bytes
        for row, record in zip(rows, records, strict=True):
            if len(row.key) != KEY_BYTES or record.shape != (len(row.positions), size):
                raise ValueError(f"row {row.key.hex()}: records {record.shape}, of {size} bytes")
        first = {(rows[i].key, rows[i].positions.tobytes()): i for i in self.missing(rows)}
        chosen = sorted(first.values())
        if chosen:
            kept = [rows[i] for i in chosen]
            self._commit(len(kept), pack(kept, [records[i] for i in chosen], size))

    def read(self, rows: Sequence[RowPositions]) -> NDArray[np.uint8]:
        """Records of all rows' positions in their order, `[sum n_i, B]`; read-only where it can.

        Raises:
            DamagedError: a row is absent, does not hold a position, or fails its checksum.
        """
        if len(rows) == 1:
            return self._records(rows[0])
        total = sum(len(row.positions) for row in rows)
        out = np.empty((total, self._spec.record_bytes), np.uint8)
        end = 0
        for row in rows:
            begin, end = end, end + len(row.positions)
            out[begin:end] = self._records(row)
        return out

    def stored(self) -> list[RowPositions]:
        """Every sound row, each once, with the positions that it holds."""
        self.refresh()
        held: dict[bytes, NDArray[np.int32]] = {}
        for shard in self._known.shards:
            for i in shard.live_rows():
                if shard.check(i):
                    key, positions = shard.key(i), shard.positions(i)
                    held[key] = np.union1d(held[key], positions) if key in held else positions
            shard.close()
        return [RowPositions(key, positions.astype(np.int32)) for key, positions in held.items()]

    def places(self, key: bytes) -> list[str]:
        """The shards that hold a row."""
        self.refresh()
        nothing = RowPositions(key, np.empty(0, np.int32))
        return [shard.name for shard, *_ in self._known.covering(nothing)]

    def keep(self, name: str, data: bytes) -> None:
        """Keep something beside the records, durable on return. The first to come stays."""
        with durable.lock(self.folder / manifest.LOCK):
            kept.write(self.folder, name, data)

    def kept(self, name: str) -> bytes | None:
        """What was kept under a name.

        Raises:
            DamagedError: it is not what was kept.
        """
        return kept.read(self.folder, name)

    def kept_names(self) -> list[str]:
        """The names under which something is kept, in order."""
        return kept.names(self.folder)

    def verify(self) -> tuple[int, list[BadRow]]:
        """Check every row against the disk: how many there are, and the bad ones.

        A damaged index (its rows are not known) has an empty `row`; so has a damaged line of the
        journal. Something kept that is damaged is there by its file's name.
        """
        self._known.start_over()  # a shard that is opened anew remembers no check
        self.refresh()
        self._clear()
        bad = [
            BadRow("", journal.NAME, f"line {number} is damaged")
            for number in self._known.journal.damaged
        ]
        bad += [BadRow("", name, reason) for name, reason in self._known.broken.items()]
        bad += [BadRow("", kept.file_name(name), _DISAGREES) for name in kept.damaged(self.folder)]
        count = 0
        for shard in self._known.shards:
            for i in shard.live_rows():
                count += 1
                if not shard.check(i):
                    bad.append(BadRow(shard.key(i).hex(), shard.name, _DISAGREES))
            shard.close()
        return count, bad

    def drop(self, rows: Sequence[BadRow]) -> None:
        """Forget rows, so that they are missing; durable on return.

        With an empty `row` the whole shard is forgotten, or the journal's damaged lines.

        Raises:
            DamagedError: something kept is among them (the rows are forgotten all the same): it
                may be what the records are read with, so it cannot be made anew beside them.
        """
        if any(bad.row and len(bytes.fromhex(bad.row)) != KEY_BYTES for bad in rows):
            raise ValueError("a row is named by its key in hexadecimal")
        names = {bad.shard for bad in rows}
        ours = {journal.NAME, *map(kept.file_name, kept.names(self.folder))}
        pairs = [[bad.row, bad.shard] for bad in rows if bad.shard not in ours]
        with durable.lock(self.folder / manifest.LOCK):
            if journal.NAME in names:
                self._known.journal.mend()
            if pairs:
                self._known.journal.append({"drop": pairs})
        self.refresh()
        for name in kept.names(self.folder):
            if kept.file_name(name) in names:
                kept.read(self.folder, name)

    def info(self) -> dict[str, Any]:
        """Counts and sizes as plain data; `bytes` is that of the files."""
        self.refresh()
        files = [manifest.NAME, journal.NAME]
        size = sum((self.folder / name).stat().st_size for name in files)
        size += sum(shard.size for shard in self._known.shards)
        positions = sum(shard.live_positions() for shard in self._known.shards)
        return {
            "rows": sum(len(shard.live_rows()) for shard in self._known.shards),
            "positions": positions,
            "bytes": size,
            "bytes_per_position": size / positions if positions else 0.0,
            "shards": len(self._known.shards),
            "identity": dict(self._spec.identity),
            "codec": dict(self._spec.codec),
        }

    def _records(self, row: RowPositions) -> NDArray[np.uint8]:
        found = self._known.sound(row)
        if found is None:
            self._known.refresh()  # another process may have written it since
            found = self._known.sound(row)
        if found is None:
            raise self._unsound(row)
        shard, i, chosen = found
        records = shard.records(i)
        return records if chosen is ALL else records[chosen]

    def _unsound(self, row: RowPositions) -> DamagedError:
        name = row.key.hex()
        shard = self._known.damaged(row)
        if shard:
            return DamagedError(f"{self.folder / shard.name}: row {name} is damaged; {_REMEDY}")
        hurt = [f"{shard} {reason}" for shard, reason in self._known.broken.items()]
        return DamagedError(
            f"{self.folder}: row {name} is not there with all positions asked; {_REMEDY}"
            + "".join(f"\n{self.folder}: {fault}" for fault in hurt[:_FAULTS_SHOWN])
        )

    def _commit(self, rows: int, data: bytearray) -> None:
        name = f"shard-{uuid.uuid4().hex[:12]}.bin"
        durable.require_space(self.folder, len(data), f"{rows} rows of the cache")
        entry = {
            "shard": name,
            "rows": rows,
            "bytes": len(data),
            "index": f"{index_sum(data):016x}",
        }
        try:
            if not any(self._announced(name, data, entry) for _ in range(_TRIES)):
                raise DamagedError(f"{self.folder / name} is removed again and again")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise InputError(
                f"{self.folder}: the disk is full; {len(data):,} bytes needed for {rows} rows; "
                "rows written before are kept: free some space and start again"
            ) from error
        self.refresh()

    def _announced(self, name: str, data: bytearray, entry: Mapping[str, Any]) -> bool:
        """Write a shard and announce it; False where it was taken for a leftover meanwhile."""
        path = self.folder / name
        try:
            durable.write_bytes(path, memoryview(data))
        except FileNotFoundError:
            return False
        with durable.lock(self.folder / manifest.LOCK):
            if path.exists():
                self._known.journal.append(entry)
                return True
        return False

    def _clear(self) -> None:
        """Remove what killed writers left, where the journal is whole and the folder writable."""
        known = self._known
        if known.journal.damaged or not leftovers.found(self.folder, known.announced()):
            return
        with contextlib.suppress(OSError), durable.lock(self.folder / manifest.LOCK):
            self.refresh()
            if not (known.journal.damaged or known.strange):
                leftovers.remove(self.folder, known.announced())
