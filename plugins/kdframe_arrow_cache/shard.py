"""A shard: an Arrow IPC file with one batch, a row of it for each row of the cache.

Columns: `key` (16 bytes), `positions` (list of int32), `checksum` (uint64) and `records` (list of
B bytes), the records last. The mark that announces a shard says where each column's buffer begins,
so that all but the records is one range to read, is checked before anything believes it, and no
damaged file ever meets Arrow's parser. A row's checksum (xxh3, 64 bits) covers its key, its
positions and its records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kdframe.api import DamagedError, RowPositions
from kdframe_arrow_cache.marks import Announcement
from kdframe_arrow_cache.store import Store

FOLDER = "shards"
KEY_BYTES = 16


class ShardError(DamagedError):
    """A shard as a whole is not what was announced."""


def pack(
    name: str, rows: Sequence[RowPositions], records: Sequence[NDArray[np.uint8]], record_bytes: int
) -> tuple[Any, Announcement]:
    """A shard's bytes, as a buffer, and its announcement."""
    import pyarrow as pa

    counts = np.array([len(row.positions) for row in rows], np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    positions = np.concatenate([row.positions for row in rows]).astype("<i4")
    sums = [row_sum(row.key, row.positions, x) for row, x in zip(rows, records, strict=True)]
    keys = np.frombuffer(b"".join(row.key for row in rows), np.uint8).reshape(-1, KEY_BYTES)
    batch = pa.RecordBatch.from_pydict(
        {
            "key": _cells(keys),
            "positions": pa.LargeListArray.from_arrays(starts, positions),
            "checksum": pa.array(sums, pa.uint64()),
            "records": pa.LargeListArray.from_arrays(
                starts, _cells(np.concatenate(records).reshape(-1, record_bytes))
            ),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as file:
        file.write_batch(batch)
    data = sink.getvalue()
    columns = _columns(data)
    index = xxhash.xxh3_64_hexdigest(memoryview(data)[: columns["records"]])
    return data, Announcement.model_validate(
        {
            "shard": name,
            "rows": len(rows),
            "positions": len(positions),
            "size": data.size,
            "columns": columns,
            "index": index,
        }
    )


def _cells(values: NDArray[np.uint8]) -> Any:
    """`[n, B]` as `n` values of B bytes, not copied."""
    import pyarrow as pa

    flat = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(values.shape[1]), len(values), [None, flat]
    )


def _columns(data: Any) -> dict[str, int]:
    """Where the buffers of a packed shard begin."""
    import pyarrow as pa

    batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
    lists = {name: batch.column(name) for name in ("positions", "records")}
    buffers = {
        "key": batch.column("key").buffers()[1],
        "starts": lists["positions"].buffers()[1],
        "positions": lists["positions"].buffers()[3],
        "checksum": batch.column("checksum").buffers()[1],
        "records": lists["records"].buffers()[3],
    }
    # An empty buffer is nowhere; the index then reaches to the file's end.
    return {
        name: buffer.address - data.address if buffer.size else data.size
        for name, buffer in buffers.items()
    }


def row_sum(key: bytes, positions: NDArray[np.int32], records: NDArray[np.uint8]) -> int:
    """A row's checksum."""
    state = xxhash.xxh3_64(key)
    state.update(np.ascontiguousarray(positions, "<i4").data)
    state.update(np.ascontiguousarray(records).data)
    return int(state.intdigest())


class Shard:
    """An announced shard. Its index is in memory, its records are mapped when they are asked for.

    Attributes:
        name: the file's name; size: its bytes.
        keys: of its rows, 16 bytes each.
        live: `[rows]` bool, rows that were not dropped.
    """

    def __init__(
        self, store: Store, said: Announcement, head: bytes | OSError, record_bytes: int
    ) -> None:
        """Take in a shard.

        Args:
            head: all that stands before the records, or why it cannot be read.

        Raises:
            ShardError: it is missing, or not what was announced.
        """
        if isinstance(head, OSError):
            raise ShardError(f"cannot be read ({head.strerror or type(head).__name__})")
        if len(head) != said.columns.records or xxhash.xxh3_64_hexdigest(head) != said.index:
            raise ShardError("the index is damaged")
        self.name, self.size = said.shard, said.size
        self._store, self._record_bytes = store, record_bytes
        self._records_at, at = said.columns.records, said.columns
        try:
            keys = np.frombuffer(head, f"S{KEY_BYTES}", said.rows, at.key)
            self._starts = np.frombuffer(head, "<i8", said.rows + 1, at.starts)
            self._positions = np.frombuffer(head, "<i4", said.positions, at.positions)
            self._sums = np.frombuffer(head, "<u8", said.rows, at.checksum)
        except ValueError as error:
            raise ShardError("the index is not consistent") from error
        whole = at.records + said.positions * record_bytes <= said.size
        ends = self._starts[0] == 0 and self._starts[-1] == said.positions
        if not (whole and ends and (np.diff(self._starts) >= 0).all()):
            raise ShardError("the index is not consistent")
        self.keys = [key.ljust(KEY_BYTES, b"\0") for key in keys.tolist()]  # numpy cuts zeros off
        self.live = np.ones(said.rows, bool)
        self._known_good = np.zeros(said.rows, bool)
        self._map: NDArray[np.uint8] | None = None

    def positions(self, row: int) -> NDArray[np.int32]:
        """The positions that a row holds, `[n]`."""
        first, last = self._starts[row : row + 2].tolist()
        return self._positions[first:last]

    def records(self, row: int) -> NDArray[np.uint8]:
        """A row's records `[n, B]`: a view of the file.

        Raises:
            OSError: the file is missing or has another size.
        """
        if self._map is None:
            self._map = self._store.map(f"{FOLDER}/{self.name}", self.size)
        begin, size = self._records_at, self._record_bytes
        first, last = self._starts[row : row + 2].tolist()
        return self._map[begin + first * size : begin + last * size].reshape(last - first, size)

    def fault(self, row: int) -> str:
        """What is wrong with a row; empty for a good one, which is remembered."""
        if self._known_good[row]:
            return ""
        try:
            found = row_sum(self.keys[row], self.positions(row), self.records(row))
        except OSError as error:
            return f"cannot be read ({error.strerror or type(error).__name__})"
        self._known_good[row] = found == self._sums[row]
        return "" if self._known_good[row] else "the checksum disagrees"

    def live_positions(self) -> int:
        """Positions of the rows that were not dropped."""
        return int(np.diff(self._starts)[self.live].sum())

    def close(self) -> None:
        """Let go of the map (views that were given out keep it alive)."""
        self._map = None
