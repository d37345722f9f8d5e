"""Joining caches of one identity: rows that another machine filled, copied into this one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdframe.cache_parts import BadRow, Cache, CacheConfig, CacheSpec, RowPositions
from kdframe.errors import DamagedError, InputError
from kdframe.progress import Progress

PIECE_BYTES = 32 * 2**20
"""Records that are held at once."""


@dataclass(frozen=True)
class Merged:
    """What became of one folder's rows.

    Attributes:
        copied, already: rows that are new in the target, and rows that it held.
        damaged: rows of the folder that were left where they are.
    """

    folder: str
    copied: int
    already: int
    damaged: list[BadRow]


def merge(
    target: Cache,
    settings: CacheConfig,
    spec: CacheSpec,
    folders: Sequence[Path],
    progress: Progress,
) -> list[Merged]:
    """Copy the rows that `target` lacks from other caches of its identity.

    Args:
        settings: how `target` was opened; the folders are opened as the same kind.
        spec: what `target` holds.

    Raises:
        InputError: a folder is no cache of this kind, is the target, holds another identity, or
            its codec was fitted to something else; nothing is copied.
    """
    sources = [_opened(target, settings, spec, folder) for folder in folders]
    _join_kept(target, sources)
    return [_copy(target, source, spec.record_bytes, progress) for source in sources]


def _opened(target: Cache, settings: CacheConfig, spec: CacheSpec, folder: Path) -> Cache:
    # An absent or empty folder would become a cache by being opened.
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(f"{folder}: no cache is there; mend the path")
    if folder.resolve() == target.folder.resolve():
        raise InputError(f"{folder} is the experiment's own cache; name another folder")
    folder = folder.resolve()
    return settings.at(folder).open(replace(spec, folder=folder))


def _join_kept(target: Cache, sources: Sequence[Cache]) -> None:
    """Bring what is kept beside the records, once it is seen that nothing disagrees."""
    kept: dict[str, tuple[str, bytes]] = {}
    for cache in (target, *sources):
        for name in cache.kept_names():
            data = cache.kept(name)
            if data is None:
                continue
            place, known = kept.setdefault(name, (cache.place, data))
            if known != data:
                raise InputError(
                    f"{cache.place}: what is kept as {name!r} is not what {place} keeps, so the "
                    "records of one cannot be read with the other; keep one of the two, and have "
                    "the other's rows computed into it with `kdframe cache`"
                )
    for name, (_, data) in kept.items():
        target.keep(name, data)


def _copy(target: Cache, source: Cache, record_bytes: int, progress: Progress) -> Merged:
    _, damaged = source.verify()
    rows = source.stored()
    copied = already = 0
    with progress.stage(f"merge {source.place}", len(rows), "rows") as bar:
        for piece in _pieces(rows, record_bytes):
            lacking = [piece[i] for i in target.missing(piece)]
            sound, records, bad = _read(source, lacking)
            target.write(sound, records)
            known = {one.row for one in damaged}
            damaged += [one for one in bad if one.row not in known]
            copied += len(sound)
            already += len(piece) - len(lacking)
            bar.advance(len(piece))
    return Merged(source.place, copied, already, damaged)


def _read(
    source: Cache, rows: Sequence[RowPositions]
) -> tuple[list[RowPositions], list[NDArray[np.uint8]], list[BadRow]]:
    """The rows that can be read with their records, and the others."""
    try:
        ends = np.cumsum([len(row.positions) for row in rows])[:-1]
        return list(rows), np.split(source.read(rows), ends) if rows else [], []
    except DamagedError as error:
        if len(rows) == 1:
            row, places = rows[0].key, source.places(rows[0].key)
            return [], [], [BadRow(row.hex(), place, str(error)) for place in places]
    parts = [_read(source, [row]) for row in rows]
    sound, records, bad = (list(itertools.chain(*column)) for column in zip(*parts, strict=True))
    return sound, records, bad


def _pieces(rows: Sequence[RowPositions], record_bytes: int) -> Iterator[list[RowPositions]]:
    """Rows in order, as many at once as `PIECE_BYTES` hold."""
    piece: list[RowPositions] = []
    size = 0
    for row in rows:
        piece.append(row)
        size += len(row.positions) * record_bytes
        if size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
