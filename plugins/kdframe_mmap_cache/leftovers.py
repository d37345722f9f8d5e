"""What writers that were killed leave in a cache folder: files aside, shards never announced."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Container
from pathlib import Path

_SHARD = r"shard-[0-9a-f]{12}\.bin"
_ASIDE = rf"\.({_SHARD}|shards\.jsonl|manifest\.json|kept-[A-Za-z0-9_-]+\.bin)\.[0-9a-f]{{8}}\.tmp"
_OURS = re.compile(f"{_SHARD}|{_ASIDE}")
_OLD = 3600.0  # seconds; a younger one may have a writer that lives


def found(folder: Path, announced: Container[str]) -> list[Path]:
    """Files of the cache that no reader can know of, untouched for an hour."""
    now = time.time()
    old = []
    for entry in os.scandir(folder):
        if _OURS.fullmatch(entry.name) and entry.name not in announced:
            with contextlib.suppress(FileNotFoundError):  # renamed or removed since
                if now - entry.stat(follow_symlinks=False).st_mtime > _OLD:
                    old.append(Path(entry))
    return old


def remove(folder: Path, announced: Container[str]) -> None:
    """Remove them. The caller holds the lock and knows all that is announced.

    A writer that lives but slept for an hour sees under the lock that its file is gone, and
    writes it again.
    """
    for path in found(folder, announced):
        path.unlink(missing_ok=True)
