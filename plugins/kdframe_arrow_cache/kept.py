"""What is kept beside the records: `kept/NAME.bin`, a checksum and then the data."""

from __future__ import annotations

import re

import xxhash

from kdframe.api import DamagedError
from kdframe_arrow_cache.store import Store

_FOLDER = "kept"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


def write(store: Store, name: str, data: bytes) -> None:
    """Keep `data`, unless something is kept under the name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of something kept")
    store.create(f"{_FOLDER}/{name}.bin", xxhash.xxh3_64_digest(data) + data)


def read(store: Store, name: str) -> bytes | None:
    """What is kept under a name, or None.

    Raises:
        DamagedError: it is not what was kept.
    """
    if not _NAME.fullmatch(name):
        return None
    (whole,) = store.read([(f"{_FOLDER}/{name}.bin", None)])
    if isinstance(whole, FileNotFoundError):
        return None
    if isinstance(whole, OSError) or whole[:8] != xxhash.xxh3_64_digest(whole[8:]):
        raise DamagedError(
            f"{store.place}/{_FOLDER}/{name}.bin is damaged; restore it from a copy, "
            "or remove the cache to compute it again"
        )
    return whole[8:]


def names(store: Store) -> list[str]:
    """The names under which something is kept, in order."""
    found = (name.removesuffix(".bin") for name in store.names(_FOLDER) if name.endswith(".bin"))
    return sorted(name for name in found if _NAME.fullmatch(name))
