"""Where a cache's files live: what a folder and an object store have in common.

A name is relative to the cache, its parts joined by `/`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray


class Store(Protocol):
    """Files that appear whole or not at all, and are never changed.

    Attributes:
        place: the address, as the user knows it.
        folder: a local folder: the cache itself, or what this machine keeps for it.
    """

    place: str
    folder: Path

    def names(self, under: str = "") -> list[str]:
        """Names of what is in the cache itself, or in one folder of it; in order."""

    def read(self, parts: Sequence[tuple[str, int | None]]) -> list[bytes | OSError]:
        """For each `(name, n)` the first `n` bytes (None: all), or why they cannot be read.

        Raises:
            InputError: the store cannot be reached.
        """

    def require_space(self, needed: int, what: str) -> None:
        """Refuse to begin what does not fit.

        Raises:
            InputError: fewer than `needed` bytes are free.
        """

    def write(self, name: str, data: memoryview) -> None:
        """Write a file; durable on return.

        Raises:
            OSError: the disk is full.
            InputError: the store cannot be reached or written.
        """

    def create(self, name: str, data: bytes) -> None:
        """Write a file unless it is there."""

    def map(self, name: str, size: int) -> NDArray[np.uint8]:
        """A file's bytes `[size]`, mapped into memory; read-only.

        Raises:
            OSError: it cannot be read, or has another size.
        """

    def forget(self) -> None:
        """Forget local copies of what lives elsewhere."""


def open_file(path: Path) -> BinaryIO:
    """Open a file, but no link (it may lead out of the folder), nor wait for a pipe."""
    return open(path, "rb", opener=_open_here)


def map_file(path: Path, size: int) -> NDArray[np.uint8]:
    """Map a file of `size` bytes.

    Raises:
        OSError: it cannot be opened, or has another size.
    """
    with open_file(path) as file:
        found = os.fstat(file.fileno()).st_size
        # A map that ends beyond its file would kill the process when it is read.
        if found != size or not size:
            raise OSError(0, f"has {found:,} bytes instead of {size:,}", str(path))
        return np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)


def _open_here(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
