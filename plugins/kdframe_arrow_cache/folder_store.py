"""A cache in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdframe.api import InputError, durable
from kdframe_arrow_cache.store import map_file, open_file

_LOCK = ".lock"


class FolderStore:
    """Files are written aside, flushed and renamed; what is read is mapped, not copied."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which need not exist.

        Raises:
            InputError: it is a file.
        """
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; a cache needs a folder: name another")
        self.folder = folder
        self.place = str(folder)

    def names(self, under: str = "") -> list[str]:
        """Names in the folder; what is set aside or locks is not among them."""
        folder = self.folder / under
        found = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
        return sorted(name for name in found if name != _LOCK and not _is_aside(name))

    def read(self, parts: Sequence[tuple[str, int | None]]) -> list[bytes | OSError]:
        """For each `(name, n)` the first `n` bytes (None: all), or why they cannot be read."""
        return [self._read(name, count) for name, count in parts]

    def require_space(self, needed: int, what: str) -> None:
        """Refuse to begin what the disk does not hold."""
        durable.require_space(self.folder, needed, what)

    def write(self, name: str, data: memoryview) -> None:
        """Write a file: aside, flushed, renamed."""
        durable.write_bytes(self.folder / name, data)

    def create(self, name: str, data: bytes) -> None:
        """Write a file unless it is there."""
        with durable.lock(self.folder / _LOCK):
            if not (self.folder / name).exists():
                durable.write_bytes(self.folder / name, data)

    def map(self, name: str, size: int) -> NDArray[np.uint8]:
        """A file's bytes `[size]`, mapped; read-only."""
        return map_file(self.folder / name, size)

    def forget(self) -> None:
        """Nothing: there are no copies."""

    def _read(self, name: str, count: int | None) -> bytes | OSError:
        try:
            with open_file(self.folder / name) as file:
                return file.read() if count is None else file.read(count)
        except OSError as error:
            return error


def _is_aside(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")
