"""Files as raw records, each with its place; a record that cannot be read says why.

Readers yield `(place, record)`: the place is `file:line` or `file:row N`, counted from 1; a record
that cannot be read is the ValueError that says why, with its remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

_BOM = b"\xef\xbb\xbf"


def shown(value: object) -> str:
    """A value in at most 60 characters, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def json_lines(path: Path, budget: int | None) -> Iterator[tuple[str, object]]:
    """A JSON value on each line, within the first `budget` bytes."""
    for number, line in _lines(path, budget):
        if isinstance(line, ValueError):
            yield f"{path}:{number}", line
        elif line.strip():
            yield f"{path}:{number}", _parsed(line)


def json_values(path: Path, budget: int | None) -> Iterator[tuple[str, object]]:
    """A list of JSON values, or JSON lines."""
    with open(path, "rb") as file:
        data = file.read(-1 if budget is None else budget).removeprefix(_BOM)
        whole = not file.read(1)
    if not data.lstrip().startswith(b"["):
        yield from json_lines(path, budget)
        return
    # Bad bytes become surrogates, which no text of a row may hold: the row is named.
    text = data.decode(errors="surrogateescape")
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, seen, line = text.index("[") + 1, 0, 1
    while True:
        at = gap.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at) or (at == len(text) and not whole):
            return
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if whole:
                start = shown(text[at : at + 60])
                yield f"{path}:{line}", ValueError(f"{start} is not JSON ({error}); mend the list")
            return
        yield f"{path}:{line}", value


def texts(path: Path, budget: int | None, *, sample_by: str) -> Iterator[tuple[str, object]]:
    """Text cut into `{"text": ...}` by `line`, `paragraph` or `document`."""
    held: list[str] = []
    start = 0
    for number, line in _lines(path, budget):
        if isinstance(line, ValueError):
            yield f"{path}:{number}", line
            continue
        blank = not line.strip()
        if held and (sample_by == "line" or (blank and sample_by == "paragraph")):
            yield f"{path}:{start}", {"text": "\n".join(held)}
            held = []
        if held or not blank:
            start = start if held else number
            held.append(line)
    if held:
        yield f"{path}:{start}", {"text": "\n".join(held).rstrip("\n")}


def parquet(path: Path, budget: int | None, rows: int = 256) -> Iterator[tuple[str, object]]:
    """The rows of a parquet file as dicts; `rows` of them are held at once."""
    import pyarrow.parquet

    number = used = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=rows):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row
            used += batch.nbytes
            if budget is not None and used >= budget:
                return
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        yield f"{path}:row {number + 1}", ValueError(f"not parquet ({reason}); write it again")


def _lines(path: Path, budget: int | None) -> Iterator[tuple[int, str | ValueError]]:
    """Whole lines within the first `budget` bytes, from number 1."""
    used = number = 0
    with open(path, "rb") as file:
        while line := file.readline(-1 if budget is None else budget - used + 1):
            used += len(line)
            if budget is not None and used > budget:
                return
            number += 1
            yield number, _decoded(line.removeprefix(_BOM) if number == 1 else line)


def _decoded(line: bytes) -> str | ValueError:
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return ValueError(f"{byte} is not UTF-8; save the file as UTF-8")


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(
            f"{shown(line.strip())} is not JSON ({error}); write one JSON object on each line"
        )
