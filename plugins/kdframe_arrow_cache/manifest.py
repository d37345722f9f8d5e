"""The cache's `manifest.json`: what it holds, written once."""

from __future__ import annotations

import json

from kdframe.api import CacheSpec, InputError, cache_tools
from kdframe_arrow_cache.store import Store

NAME = "manifest.json"
VERSION = 1


def open_cache(store: Store, spec: CacheSpec) -> None:
    """Check that the store holds what `spec` says, or make it an empty cache that will.

    Raises:
        InputError: it holds another identity, a newer format, or files of something else.
        DamagedError: its manifest is not what was written.
    """
    text = _read(store)
    if text is None:
        if strangers := store.names():
            _require_begun(store, strangers[0])
        made = json.dumps(cache_tools.manifest(spec, VERSION), indent=2) + "\n"
        store.create(NAME, made.encode())
        text = _read(store) or b""  # what is there now may be another's
    cache_tools.check_manifest(
        text, spec, VERSION, cache=f"cache folder {store.place}", path=f"{store.place}/{NAME}"
    )


def _require_begun(store: Store, stranger: str) -> None:
    """Refuse what is no cache; one that another process has begun since is well."""
    if _read(store) is None:
        raise InputError(
            f"cache folder {store.place} holds {stranger!r} but no {NAME}: "
            "it is no cache, or has lost its manifest; name another folder or remove it"
        )


def _read(store: Store) -> bytes | None:
    (text,) = store.read([(NAME, None)])
    if isinstance(text, FileNotFoundError):
        return None
    if isinstance(text, OSError):
        raise InputError(f"{store.place}/{NAME} cannot be read ({text.strerror}); check its rights")
    return text
