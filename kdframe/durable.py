"""Files and folders that appear whole or not at all, whatever kills the process.

Everything kdframe writes goes through here: bytes are written aside, flushed to the disk,
renamed, and the folder that holds the name is flushed too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from kdframe.errors import InputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write `path` whole: aside, fsync, rename, fsync of the folder.

    Raises:
        OSError: the disk is full or the folder cannot be written; an old `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole (see `write_bytes`)."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole (see `write_bytes`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it. A torn last line (from a killed process) is closed first.

    Callers that share `path` hold a `lock`.
    """
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def lock(path: Path, timeout: float = -1) -> FileLock:
    """An exclusive lock that dies with its holder. `path` is the lock's own file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(str(path), timeout=timeout)


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Fill a new folder aside, then put it in the place of `path` in one step.

    An old folder is exchanged and removed, never written over; if the body raises, it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    aside.mkdir()
    try:
        yield aside
        _sync_tree(aside)
        if path.exists():
            _exchange(aside, path)
        else:
            os.rename(aside, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what a killed process left aside in `parent`. Call it under the owner's lock."""
    for left in parent.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Bytes free on the file system that holds `path` (which need not exist yet)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, needed: int, what: str) -> None:
    """Refuse to begin what does not fit.

    Raises:
        InputError: fewer than `needed` bytes are free at `path`; names both figures.
    """
    free = free_bytes(path)
    if free < needed:
        raise InputError(
            f"{path}: no disk space for {what}: {needed:,} bytes needed, {free:,} free; "
            "free some, or name another folder"
        )


def _sync_tree(root: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for entry in sorted(root.rglob("*")):
        if entry.is_dir():
            sync_folder(entry)
        else:
            entry.chmod(0o666 & ~umask)  # safetensors writes 0600 whatever the umask
            handle = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    sync_folder(root)


def _exchange(aside: Path, path: Path) -> None:
    """Swap two folders in one step where the kernel can, else in two renames."""
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        arguments = (_AT_FDCWD, os.fsencode(aside), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE)
        if renameat2(*arguments) == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old.tmp")
    os.rename(path, old)
    os.rename(aside, path)
    shutil.rmtree(old, ignore_errors=True)
