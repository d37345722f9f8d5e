"""Marks: small sealed objects that announce a shard, or say which rows are dropped.

A shard without its mark does not exist. Marks are only ever added, and their order means nothing:
a shard's name is never used twice, so a row that was dropped from it stays dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from kdframe.api import DamagedError, cache_tools

FOLDER = "marks"
VERSION = 1


class MarkError(DamagedError):
    """A mark is not what was written."""


class Columns(pydantic.BaseModel):
    """Where a shard's buffers begin, in bytes from the file's begin."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    key: pydantic.NonNegativeInt
    starts: pydantic.NonNegativeInt
    positions: pydantic.NonNegativeInt
    checksum: pydantic.NonNegativeInt
    records: pydantic.NonNegativeInt


class Announcement(pydantic.BaseModel):
    """A shard that is there.

    Attributes:
        shard: its file's name.
        rows, positions: how many it holds; size: of the file, in bytes.
        columns: where the buffers begin; the records' is the last.
        index: xxh3 of all bytes before the records, in hexadecimal.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    # No other character may stand in a name: it would lead out of the folder.
    shard: str = pydantic.Field(pattern=r"\Ashard-[0-9a-f]{12}\.arrow\z")
    rows: pydantic.NonNegativeInt
    positions: pydantic.NonNegativeInt
    size: pydantic.NonNegativeInt
    columns: Columns
    index: str


def name_of(shard: str) -> str:
    """The name of the mark that announces a shard."""
    return shard.removesuffix(".arrow") + ".json"


def written(content: Mapping[str, Any]) -> bytes:
    """A mark's bytes."""
    return json.dumps(cache_tools.sealed({"version": VERSION, **content})).encode()


def dropping(pairs: Sequence[tuple[str, str]]) -> bytes:
    """The bytes of a mark that drops `(row, shard)` pairs; an empty row drops the whole shard."""
    return written({"drop": [list(pair) for pair in pairs]})


def read(place: str, name: str, text: bytes) -> Announcement | list[tuple[str, str]]:
    """What a mark says: a shard, or the pairs that are dropped.

    Raises:
        InputError: a newer kdframe wrote it.
        MarkError: it is not what was written, or names something outside the cache.
    """
    value = cache_tools.opened(text)
    if value is None:
        raise MarkError("the mark is damaged")
    if (version := value.pop("version", None)) != VERSION:
        if isinstance(version, int) and version > VERSION:
            raise cache_tools.newer(f"{place}/{FOLDER}/{name}", version, VERSION)
        raise MarkError("the mark has no version")
    try:
        if "drop" in value:
            return [(str(row), str(shard)) for row, shard in value["drop"]]
        found = Announcement.model_validate(value)
    except (ValueError, TypeError) as error:
        raise MarkError("the mark does not say what a mark says") from error
    if name_of(found.shard) != name:
        raise MarkError(f"the mark announces {found.shard}")
    return found
