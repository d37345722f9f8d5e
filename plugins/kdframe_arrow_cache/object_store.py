"""A cache that lives where fsspec reaches: an object store, a server, the memory of a process.

One PUT writes an object whole or not at all, and no object is ever written again. What is read is
copied to a local folder once and mapped from there: training reads a row in every epoch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdframe.api import InputError, durable
from kdframe_arrow_cache.store import map_file


class ObjectStore:
    """Objects under an address.

    Attributes:
        folder: where this machine keeps its copies, and the engine what it plans.
    """

    def __init__(self, files: Any, base: str, place: str, scratch: Path) -> None:
        """Use the objects under `base` of the fsspec file system `files`."""
        self.folder = scratch
        self.place = place
        self._files = files
        self._base = base.rstrip("/")
        self._copies = scratch / "copies"

    def names(self, under: str = "") -> list[str]:
        """Names of the objects and folders; asked of the store anew."""
        path = f"{self._base}/{under}".rstrip("/")
        with self._reaching():
            self._files.invalidate_cache()
            try:
                found = self._files.ls(path, detail=False)
            except FileNotFoundError:
                found = []
        names = {entry.rstrip("/").rpartition("/")[2] for entry in found}
        return sorted(names - {path.rpartition("/")[2], ""})

    def read(self, parts: Sequence[tuple[str, int | None]]) -> list[bytes | OSError]:
        """For each `(name, n)` the first `n` bytes (None: all); many at once where it can."""
        if not parts:
            return []
        paths = [self._path(name) for name, _ in parts]
        with self._reaching():
            found = self._files.cat_ranges(paths, 0, [n for _, n in parts], on_error="return")
            for data in found:
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise data  # an unreachable store is no damage
        return list(found)

    def require_space(self, needed: int, what: str) -> None:
        """Nothing: the store tells nobody how much it holds."""

    def write(self, name: str, data: memoryview) -> None:
        """Write an object in one PUT."""
        with self._reaching():
            self._files.pipe_file(self._path(name), bytes(data))

    def create(self, name: str, data: bytes) -> None:
        """Write an object unless it is there."""
        with self._reaching(), contextlib.suppress(FileExistsError):
            self._files.pipe_file(self._path(name), data, mode="create")

    def map(self, name: str, size: int) -> NDArray[np.uint8]:
        """An object's bytes `[size]`, mapped from a local copy; read-only."""
        copy = self._copies / name
        try:
            return map_file(copy, size)
        except OSError:  # no copy, or a broken one
            self._fetch(name, size, copy)
            return map_file(copy, size)

    def forget(self) -> None:
        """Remove the local copies (maps that are open keep theirs)."""
        shutil.rmtree(self._copies, ignore_errors=True)

    def _fetch(self, name: str, size: int, copy: Path) -> None:
        durable.require_space(self.folder, size, f"a copy of {self._path(name)}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        aside = copy.with_name(f".{copy.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with self._reaching(FileNotFoundError):
                self._files.get_file(self._path(name), str(aside))
            os.replace(aside, copy)  # a copy that a crash spoils fails its rows' checksums
        finally:
            aside.unlink(missing_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    @contextlib.contextmanager
    def _reaching(self, *passing: type[OSError]) -> Iterator[None]:
        """Say where it was that something failed; `passing` errors are the caller's."""
        try:
            yield
        except passing:
            raise
        except Exception as error:  # each file system has errors of its own
            raise InputError(
                f"{self.place} cannot be used ({type(error).__name__}: {error}); "
                "check the address, the network and your rights, and start again: "
                "what was written is kept"
            ) from error
