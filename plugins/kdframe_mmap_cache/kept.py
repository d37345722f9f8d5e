"""Files that are kept beside the records: `kept-NAME.bin`, a checksum and then the data."""

from __future__ import annotations

import re
from pathlib import Path

import xxhash

from kdframe.api import DamagedError, durable

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_FILE = re.compile(rf"kept-({_NAME.pattern})\.bin")


def write(folder: Path, name: str, data: bytes) -> None:
    """Keep `data`, unless something is kept under the name. The caller holds the lock."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of something kept")
    path = folder / file_name(name)
    if not path.exists():
        durable.write_bytes(path, xxhash.xxh3_64_digest(data) + data)


def read(folder: Path, name: str) -> bytes | None:
    """What is kept under a name, or None.

    Raises:
        DamagedError: it is not what was kept.
    """
    path = folder / file_name(name)
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    data = whole[8:]
    if whole[:8] != xxhash.xxh3_64_digest(data):
        raise DamagedError(
            f"{path} is damaged; restore it from a copy, or remove the folder to compute it again"
        )
    return data


def file_name(name: str) -> str:
    """The file that holds what is kept under a name."""
    return f"kept-{name}.bin"


def damaged(folder: Path) -> list[str]:
    """The names under which something else is there than what was kept."""
    return [name for name in names(folder) if not _sound(folder, name)]


def names(folder: Path) -> list[str]:
    """The names under which something is kept, in order."""
    found = (_FILE.fullmatch(path.name) for path in folder.iterdir())
    return sorted(match[1] for match in found if match)


def _sound(folder: Path, name: str) -> bool:
    try:
        read(folder, name)
    except DamagedError:
        return False
    return True
