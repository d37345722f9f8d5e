"""What the tests of a cache's contract share: the backend's settings, and processes that write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from kdframe.api import Cache, CacheConfig
from kdframe.testing.cache_rows import spec


class CacheKit:
    """The base of the contract's parts."""

    shared_between_processes: ClassVar[bool] = True
    damaged_files: ClassVar[bool] = True

    def config(self, folder: Path) -> CacheConfig:
        """The settings of a cache in `folder`, which need not exist; called more than once.

        The class must be importable by name.
        """
        raise NotImplementedError

    def make_newer(self, folder: Path) -> None:
        """Make what is in `folder` look as if a newer version of the backend had written it."""
        pytest.skip("the backend does not say how a newer format looks")

    def shards(self, folder: Path) -> list[str]:
        """The names that `drop` may be told for the cache in `folder`; here all its files."""
        return sorted(path.name for path in folder.rglob("*") if path.is_file())

    def open(self, folder: Path, **changes: str) -> Cache:
        """Open the cache in `folder`; `changes` are to the identity that is asked for."""
        return self.config(folder).open(spec(folder, **changes))

    def start_writer(self, folder: Path, first: int, last: int, size: int) -> subprocess.Popen[str]:
        """A process that writes rows `first` to `last`, `size` at once.

        It prints `open`, and after each commit the first row's number.
        """
        config = self.config(folder)
        plan = {
            "config": [type(config).__module__, type(config).__qualname__],
            "settings": config.model_dump(mode="json"),
            "folder": str(folder),
            "first": first,
            "last": last,
            "size": size,
        }
        command = [sys.executable, "-m", "kdframe.testing.cache_rows", json.dumps(plan)]
        path = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Cache:
        """An empty cache."""
        return self.open(tmp_path / "cache")

    @pytest.fixture
    def processes(self) -> None:
        """Asked for by tests that need a second process."""
        if not self.shared_between_processes:
            pytest.skip("the backend is not shared between processes")
