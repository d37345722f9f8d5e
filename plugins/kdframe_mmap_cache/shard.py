"""A shard: a file of rows that memory-maps, never changed after it was written.

Layout, little-endian: a header of 64 bytes; for `r` rows their keys `[r, 16]`, where each row's
positions begin `[r + 1]` uint64, their checksums `[r]` uint64; the positions of all rows one after
the other, int32; zeros up to a multiple of 64; the records in the same order.

The header ends with the checksum of itself and of the index arrays. A row's checksum (xxh3, 64
bits) covers its key, its positions and its records.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from kdframe.api import DamagedError, InputError, KdframeError, RowPositions

KEY_BYTES = 16
_MAGIC = b"kdfshard"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQ24xQ")  # magic, version, record bytes, rows, positions, checksum
_POPULATE_READ = 22  # Linux 5.14; the module mmap has no name for it
_COVERED = _HEADER.size - 8
_NOTHING = np.empty((0, 0), np.uint8)
ALL = slice(None)
Chosen = slice | NDArray[np.int64]
"""Which of a row's positions: `ALL`, or their indices."""
_NAME = re.compile(r"shard-[0-9a-f]{12}\.bin")


class ShardError(DamagedError):
    """A shard as a whole is not what was written; `reason` says how."""

    def __init__(self, shard: str, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{shard}: {reason}")


def pack(
    rows: Sequence[RowPositions], records: Sequence[NDArray[np.uint8]], record_bytes: int
) -> bytearray:
    """A shard's bytes."""
    counts = np.array([len(row.positions) for row in rows], np.uint64)
    starts = np.concatenate([np.zeros(1, "<u8"), counts.cumsum(dtype="<u8")]).astype("<u8")
    total = int(starts[-1])
    at = _Layout(len(rows), total, record_bytes)
    data = bytearray(at.end)
    body = np.frombuffer(data, np.uint8)
    positions = body[at.positions : at.positions + 4 * total].view("<i4")
    if total:
        positions[:] = np.concatenate([row.positions for row in rows])
        np.concatenate(records, out=body[at.records :].reshape(total, record_bytes))
    sums = [row_sum(r.key, r.positions, x) for r, x in zip(rows, records, strict=True)]
    data[at.keys : at.starts] = b"".join(row.key for row in rows)
    data[at.starts : at.sums] = starts.tobytes()
    data[at.sums : at.positions] = np.array(sums, "<u8").tobytes()
    fields = (_MAGIC, _VERSION, record_bytes, len(rows), total)
    _HEADER.pack_into(data, 0, *fields, 0)
    _HEADER.pack_into(data, 0, *fields, _index_sum(data[: at.positions]))
    return data


def row_sum(key: bytes, positions: NDArray[np.int32], records: NDArray[np.uint8]) -> int:
    """A row's checksum."""
    state = xxhash.xxh3_64(key)
    state.update(np.ascontiguousarray(positions, "<i4").data)
    state.update(np.ascontiguousarray(records).data)
    return int(state.intdigest())


def index_sum(data: bytes | bytearray) -> int:
    """The checksum that the header of a packed shard carries."""
    return int(_HEADER.unpack_from(data)[-1])


def _index_sum(index: bytes | bytearray) -> int:
    state = xxhash.xxh3_64(index[:_COVERED])
    state.update(memoryview(index)[_HEADER.size :])
    return int(state.intdigest())


class _Layout:
    """Where the arrays begin, in bytes."""

    def __init__(self, rows: int, positions: int, record_bytes: int) -> None:
        self.keys = _HEADER.size
        self.starts = self.keys + KEY_BYTES * rows
        self.sums = self.starts + 8 * (rows + 1)
        self.positions = self.sums + 8 * rows
        self.records = -(-(self.positions + 4 * positions) // 64) * 64
        self.end = self.records + positions * record_bytes


class Shard:
    """A shard on disk. The index is read and checked at once, the rows when they are asked for.

    Attributes:
        name: the file's name.
        rows, size: number of rows; bytes of the file.
        keys: of all rows, one after the other.
        live: for each row 1, or 0 once it was dropped.
        mapped: whether the file is mapped now.
    """

    def __init__(self, folder: Path, name: str, record_bytes: int) -> None:
        """Open `name` in `folder`.

        Raises:
            ShardError: the file is missing, no regular file, or not what was written.
        """
        if not _NAME.fullmatch(name):
            raise ShardError(name, f"{name!r} is no name of a shard in the folder: not opened")
        self.name = name
        self._path = folder / name
        self._record_bytes = record_bytes
        self.mapped = False
        self._map: mmap.mmap | None = None
        self._records: NDArray[np.uint8] = _NOTHING
        with self._opened() as file:
            self.size = os.fstat(file.fileno()).st_size
            index = file.read(_HEADER.size)
            self.rows, total = self._counts(index)
            self._at = _Layout(self.rows, total, record_bytes)
            if self.size != self._at.end:
                raise ShardError(name, f"has {self.size:,} bytes instead of {self._at.end:,}")
            index += file.read(self._at.positions - len(index))
        self.sum = index_sum(index)
        if self.sum != _index_sum(index):
            raise ShardError(name, "the index is damaged")
        # Apart, and no numpy: one value of these is asked for at a time, and they stay in memory.
        at = self._at
        self.keys = index[at.keys : at.starts]
        self._starts = memoryview(index[at.starts : at.sums]).cast("Q")
        self._sums = memoryview(index[at.sums : at.positions]).cast("Q")
        starts = np.frombuffer(self._starts, np.int64)
        if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 0).any():
            raise ShardError(name, "the index is not consistent")
        self.live = bytearray(b"\1") * self.rows
        self._known_good = bytearray(self.rows)

    def key(self, row: int) -> bytes:
        """A row's key."""
        return self.keys[KEY_BYTES * row : KEY_BYTES * (row + 1)]

    def live_rows(self) -> list[int]:
        """The rows that were not dropped."""
        return [row for row, alive in enumerate(self.live) if alive]

    def positions(self, row: int) -> NDArray[np.int32]:
        """The positions that a row holds, `[n]`; to be believed once `check` has passed."""
        first, last = self._starts[row], self._starts[row + 1]
        at = self._at.positions + 4 * first
        return np.frombuffer(self.map(), "<i4", last - first, at)

    def chosen(self, row: int, asked: NDArray[np.int32]) -> Chosen | None:
        """Which of a row's positions are those asked; None where it does not hold them all.

        Raises:
            ShardError: the file is no longer what it was when it was opened.
        """
        begin = self._at.positions
        first, last = self._starts[row], self._starts[row + 1]
        if not self._known_good[row]:
            self._fetch(begin + 4 * first, begin + 4 * last)
        # Comparing bytes is several times faster than numpy on a few hundred numbers.
        if self.map()[begin + 4 * first : begin + 4 * last] == asked.tobytes():
            return ALL
        return _chosen(self.positions(row), asked)

    def records(self, row: int) -> NDArray[np.uint8]:
        """A row's records `[n, B]`: a view of the file."""
        if self._map is None:
            self.map()
        return self._records[self._starts[row] : self._starts[row + 1]]

    def check(self, row: int) -> bool:
        """Whether a row is what was written. A good one is remembered."""
        if not self._known_good[row]:
            try:
                self._known_good[row] = self._sum(row) == self._sums[row]
            except ShardError:
                return False  # the file is no longer what it was
        return bool(self._known_good[row])

    def live_positions(self) -> int:
        """Positions of the rows that were not dropped."""
        return sum(self._starts[row + 1] - self._starts[row] for row in self.live_rows())

    def close(self) -> None:
        """Let go of the map (views that were given out keep it alive)."""
        self.mapped, self._map, self._records = False, None, _NOTHING

    def _sum(self, row: int) -> int:
        first, last = self._starts[row], self._starts[row + 1]
        at, size = self._at, self._record_bytes
        self._fetch(at.positions + 4 * first, at.positions + 4 * last)
        self._fetch(at.records + size * first, at.records + size * last)
        return row_sum(self.key(row), self.positions(row), self.records(row))

    def _fetch(self, begin: int, end: int) -> None:
        """Have bytes of the map read at once, not page by page as they are touched.

        A page that is gone from the disk is an error here; touched, it would kill the process.
        """
        mapped = self.map()
        start = begin - begin % mmap.PAGESIZE
        try:
            mapped.madvise(_POPULATE_READ, start, end - start)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a kernel says that does not know it
                raise ShardError(self.name, f"cannot be read ({error.strerror})") from error

    def _opened(self) -> BinaryIO:
        try:
            return open(self._path, "rb", opener=_open_here)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> KdframeError:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the shard
            return InputError(f"{self._path}: {error.strerror}; raise the limit (`ulimit -n`)")
        if error.errno == errno.ELOOP:
            return ShardError(self.name, "is a link, which may lead out of the folder: not opened")
        return ShardError(self.name, f"cannot be opened ({error.strerror})")

    def _counts(self, header: bytes) -> tuple[int, int]:
        if len(header) < _HEADER.size:
            raise ShardError(self.name, "is shorter than its header")
        magic, version, record_bytes, rows, positions, _ = _HEADER.unpack(header)
        if magic == _MAGIC and version > _VERSION:
            raise ShardError(
                self.name,
                f"was written by a newer kdframe (its version is {version}, this one reads up to "
                f"{_VERSION}), or is damaged: install a newer kdframe",
            )
        if (magic, version, record_bytes) != (_MAGIC, _VERSION, self._record_bytes):
            raise ShardError(self.name, "the header is damaged")
        return rows, positions

    def map(self) -> mmap.mmap:
        """The file's bytes, mapped at the first call.

        Raises:
            ShardError: the file is no longer what it was when it was opened.
        """
        if self._map is None:
            with self._opened() as file:
                # A map that ends beyond its file would kill the process when it is read.
                if os.fstat(file.fileno()).st_size != self.size:
                    raise ShardError(self.name, f"no longer has its {self.size:,} bytes")
                try:
                    self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
                except OSError as error:
                    raise self._unreadable(error) from error
            shape = (self._starts[-1], self._record_bytes)
            self._records = np.ndarray(shape, np.uint8, self._map, self._at.records)
            self.mapped = True
        return self._map


def _chosen(stored: NDArray[np.int32], asked: NDArray[np.int32]) -> NDArray[np.int64] | None:
    if not len(stored):
        return None if len(asked) else np.empty(0, np.int64)
    at = np.searchsorted(stored, asked).clip(max=len(stored) - 1)
    return at if (stored[at] == asked).all() else None


def _open_here(path: str, flags: int) -> int:
    """Open a file, but no link (it may lead out of the folder), nor wait for a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
