"""The built-in cache backends keep the contract that any backend keeps."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest

from kdframe.testing.caches import CacheContract
from kdframe_arrow_cache import ArrowCache
from kdframe_mmap_cache import MmapCache


def raise_version(manifest: bytes) -> bytes:
    return json.dumps({**json.loads(manifest), "version": 2}).encode()


def in_memory(folder: Path) -> str:
    """An address that nobody else has in this process."""
    return f"memory:/{folder}"


class TestMmapCache(CacheContract):
    def config(self, folder):
        return MmapCache(folder=folder)

    def make_newer(self, folder):
        path = folder / "manifest.json"
        path.write_bytes(raise_version(path.read_bytes()))


class TestArrowCacheInAFolder(CacheContract):
    def config(self, folder):
        return ArrowCache(url=str(folder))

    def make_newer(self, folder):
        path = folder / "manifest.json"
        path.write_bytes(raise_version(path.read_bytes()))


class TestArrowCacheElsewhere(CacheContract):
    """An address that is no folder; it dies with this process."""

    shared_between_processes = False
    damaged_files = False

    @pytest.fixture(autouse=True)
    def _clean(self):
        yield
        fsspec.filesystem("memory").store.clear()

    def config(self, folder):
        return ArrowCache(url=in_memory(folder))

    def make_newer(self, folder):
        files = fsspec.filesystem("memory")
        path = f"{folder}/manifest.json"
        files.pipe_file(path, raise_version(files.cat_file(path)))

    def shards(self, folder):
        return [Path(path).name for path in fsspec.filesystem("memory").find(f"{folder}/shards")]
