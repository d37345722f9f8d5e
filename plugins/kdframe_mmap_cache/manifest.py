"""A cache folder's `manifest.json`: what the folder holds, written once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kdframe.api import CacheSpec, DamagedError, InputError, durable
from kdframe_mmap_cache import journal

NAME = "manifest.json"
LOCK = ".lock"
FORMAT = "kdframe-cache"
VERSION = 1
_SHOWN = 12


def open_folder(folder: Path, spec: CacheSpec) -> None:
    """Check that `folder` holds what `spec` says, or make it an empty cache that will.

    Raises:
        InputError: it holds another identity, a newer format, or files of something else.
        DamagedError: its manifest is not what was written.
    """
    path = folder / NAME
    if not path.is_file():
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; a cache needs a folder: name another")
        with durable.lock(folder / LOCK):
            if not path.is_file():
                _create(folder, spec)
    _check(path, spec)


def _create(folder: Path, spec: CacheSpec) -> None:
    strangers = [entry.name for entry in folder.iterdir() if not _ours(entry)]
    if strangers:
        raise InputError(
            f"cache folder {folder} holds {min(strangers)!r} but no {NAME}: "
            "it is no cache, or has lost its manifest; name another folder or remove it"
        )
    durable.remove_leftovers(folder)
    durable.write_bytes(folder / journal.NAME, b"")
    identity = dict(spec.identity)
    value = {
        "format": FORMAT,
        "version": VERSION,
        "identity": identity,
        "identity_digest": _digest(identity),
        "codec": dict(spec.codec),
        "record_bytes": spec.record_bytes,
    }
    durable.write_json(folder / NAME, journal.sealed(value))


def _ours(entry: Path) -> bool:
    """Whether a killed process may have left it while it made the folder."""
    name = entry.name
    unwritten = name == journal.NAME and entry.stat().st_size == 0
    return unwritten or name == LOCK or (name.startswith(".") and name.endswith(".tmp"))


def _digest(identity: Mapping[str, str]) -> str:
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=32).hexdigest()


def _check(path: Path, spec: CacheSpec) -> None:
    folder = path.parent
    text = path.read_bytes()
    _check_version(path, text)
    value = journal.opened(text)
    if value is None or value["format"] != FORMAT:
        raise DamagedError(
            f"{path} is damaged; restore it from a copy, or remove the folder to compute it again"
        )
    there = {**value["identity"], "record_bytes": str(value["record_bytes"])}
    wanted = {**spec.identity, "record_bytes": str(spec.record_bytes)}
    faults = [
        f"cache folder {folder} holds another {part} ({_versus(there.get(part), wanted.get(part))})"
        "; name another folder or remove it"
        for part in sorted(there.keys() | wanted.keys())
        if there.get(part) != wanted.get(part)
    ]
    if faults:
        raise InputError(*faults)
    if not (folder / journal.NAME).is_file():
        raise DamagedError(
            f"{folder / journal.NAME} is missing; restore it from a copy, or remove the folder "
            "to compute it again"
        )


def _check_version(path: Path, text: bytes) -> None:
    """Newer formats may be sealed in another way, so this comes before the checksum."""
    try:
        version = json.loads(text)["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return  # damaged: the checksum says so
    if isinstance(version, int) and version > VERSION:
        raise InputError(
            f"{path} has format version {version}, this kdframe reads up to {VERSION}; "
            "install a newer kdframe or name another folder"
        )


def _versus(there: Any, wanted: Any) -> str:
    words = [str(x) if x is not None else "nothing" for x in (there, wanted)]
    if words[0][:_SHOWN] != words[1][:_SHOWN]:
        words = [w if len(w) <= _SHOWN else w[:_SHOWN] + "…" for w in words]
    return f"{words[0]} there, {words[1]} wanted"
