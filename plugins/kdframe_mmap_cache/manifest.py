"""A cache folder's `manifest.json`: what the folder holds, written once."""

from __future__ import annotations

from pathlib import Path

from kdframe.api import CacheSpec, DamagedError, InputError, cache_tools, durable
from kdframe_mmap_cache import journal

NAME = "manifest.json"
LOCK = ".lock"
VERSION = 1


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
    durable.write_json(folder / NAME, cache_tools.manifest(spec, VERSION))


def _ours(entry: Path) -> bool:
    """Whether a killed process may have left it while it made the folder."""
    name = entry.name
    unwritten = name == journal.NAME and entry.stat().st_size == 0
    return unwritten or name == LOCK or (name.startswith(".") and name.endswith(".tmp"))


def _check(path: Path, spec: CacheSpec) -> None:
    folder = path.parent
    cache_tools.check_manifest(
        path.read_bytes(), spec, VERSION, cache=f"cache folder {folder}", path=str(path)
    )
    if not (folder / journal.NAME).is_file():
        raise DamagedError(
            f"{folder / journal.NAME} is missing; restore it from a copy, or remove the folder "
            "to compute it again"
        )
