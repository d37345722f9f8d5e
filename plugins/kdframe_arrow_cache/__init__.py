"""A cache backend whose shards are Arrow files, in a folder or in an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from kdframe.api import Cache, CacheConfig, CacheSpec, CodecSlot, Folder, hookimpl

_FOLDER: pydantic.TypeAdapter[Folder] = pydantic.TypeAdapter(Folder)


def _address(value: str, info: pydantic.ValidationInfo) -> str:
    """An address with a scheme stays; anything else is a folder, made absolute."""
    if "://" in value:
        return value
    return str(_FOLDER.validate_python(value, context=info.context))


class ArrowCache(CacheConfig):
    """Arrow files with a checksum for each row, wherever fsspec reaches."""

    kind: Literal["arrow"] = "arrow"
    url: Annotated[str, pydantic.AfterValidator(_address)] | None = None
    """Where it lives: a folder, or an address such as `s3://bucket/path`; by default a folder,
    `cache/` and the identity's first 12 characters."""
    storage_options: dict[str, str] = Field(default_factory=dict)
    """Settings of the address's file system, as fsspec names them (`endpoint_url`, `profile`).
    They are written into the run's files: keep secrets in the environment."""
    codec: CodecSlot = Field(default="topk", validate_default=True)
    """How a position's distribution is written."""

    def at(self, folder: Path) -> Self:
        """The same in a folder."""
        return self.model_copy(update={"url": str(folder)})

    def open(self, spec: CacheSpec) -> Cache:
        """Open the cache, or begin it."""
        from kdframe_arrow_cache.cache import ArrowCacheStore
        from kdframe_arrow_cache.opening import open_store

        url = str(spec.folder) if self.url is None else self.url
        return ArrowCacheStore(open_store(url, self.storage_options, spec.folder), spec)


@hookimpl
def kdframe_caches() -> tuple[type[CacheConfig], ...]:
    """The cache of Arrow files."""
    return (ArrowCache,)
