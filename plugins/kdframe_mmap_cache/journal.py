"""The cache's journal, `shards.jsonl`: a line for each shard announced and each row dropped.

A line is a JSON object with its own checksum (`sum`, blake2b of the rest). A line is written
once, under the folder's lock. Readers take whole lines only and never lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdframe.api import cache_tools, durable

NAME = "shards.jsonl"


class Journal:
    """Reads what is new in the journal, and appends to it.

    Attributes:
        damaged: numbers, from 1, of the lines read so far that are not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._file_id: tuple[int, int] | None = None
        self._offset = 0
        self._lines = 0
        self.damaged: list[int] = []

    def news(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the file is another than before (all is read again), and the new entries.

        A last line without its end is one that a writer has not finished: it is left for later.

        Raises:
            OSError: the journal cannot be read.
        """
        with open(self._path, "rb") as file:
            state = os.fstat(file.fileno())
            fresh = (state.st_dev, state.st_ino) != self._file_id or state.st_size < self._offset
            if fresh:
                self._file_id = (state.st_dev, state.st_ino)
                self._offset, self._lines, self.damaged = 0, 0, []
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        entries = []
        for line in data.splitlines():
            self._lines += 1
            entry = cache_tools.opened(line)
            if entry is None:
                self.damaged.append(self._lines)
            else:
                entries.append(entry)
        return fresh, entries

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append one entry; durable on return. The caller holds the folder's lock.

        What a killed writer left of a line is cut off first: nobody was told that it is there.
        """
        with open(self._path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        durable.append_line(self._path, json.dumps(cache_tools.sealed(entry), sort_keys=True))

    def mend(self) -> None:
        """Write the journal anew without its damaged lines. The caller holds the folder's lock."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        good = [
            line for line in lines if line.endswith(b"\n") and cache_tools.opened(line) is not None
        ]
        durable.write_bytes(self._path, b"".join(good))
