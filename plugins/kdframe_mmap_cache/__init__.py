"""The built-in cache backend: shards that memory-map, rows addressed by key."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from kdframe.api import Cache, CacheConfig, CacheSpec, CodecSlot, Folder, hookimpl


class MmapCache(CacheConfig):
    """A folder of memory-mapped shards with a checksum for each row."""

    kind: Literal["mmap"] = "mmap"
    folder: Folder | None = None
    """Where it lives; by default `cache/` and the identity's first 12 characters."""
    codec: CodecSlot = Field(default="topk", validate_default=True)
    """How a position's distribution is written."""

    def at(self, folder: Path) -> Self:
        """The same in another folder."""
        return self.model_copy(update={"folder": folder})

    def open(self, spec: CacheSpec) -> Cache:
        """Open the cache, or begin it."""
        from kdframe_mmap_cache.cache import MmapCacheFolder

        return MmapCacheFolder(self.folder or spec.folder, spec)


@hookimpl
def kdframe_caches() -> tuple[type[CacheConfig], ...]:
    """The memory-mapped cache."""
    return (MmapCache,)
