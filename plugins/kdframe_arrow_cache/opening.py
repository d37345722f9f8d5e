"""From an address to the store that keeps a cache there."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from kdframe.api import InputError
from kdframe_arrow_cache.folder_store import FolderStore
from kdframe_arrow_cache.object_store import ObjectStore
from kdframe_arrow_cache.store import Store


def open_store(url: str, options: Mapping[str, str], default: Path) -> Store:
    """The store at an address.

    Args:
        url: a path, or an address that fsspec knows.
        options: settings of its file system.
        default: a local folder; a store elsewhere keeps its copies beside it.

    Raises:
        InputError: no such file system, or it needs a package or setting that is missing.
    """
    if "://" not in url:
        return FolderStore(Path(url))
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        files, base = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise InputError(f"cache.url {url!r}: {error}") from error
    except Exception as error:  # each file system refuses its settings in its own way
        raise InputError(
            f"cache.url {url!r} cannot be opened with storage_options "
            f"{sorted(options)} ({error}); correct one of them"
        ) from error
    if isinstance(files, LocalFileSystem):
        return FolderStore(Path(base))
    # A folder of its own for each address: copies of one must not pass for those of another.
    mark = blake2b(url.encode(), digest_size=4).hexdigest()
    return ObjectStore(files, base, url, default.with_name(f"{default.name}-{mark}"))
