"""Files, saved datasets and hub datasets as rows: plain dicts under our own column names.

A row has one shape: `text`; `messages` (role and content); or `prompt` with `completion`, both
strings or both lists of messages. Other columns stay in it, for transforms.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from kdframe import records
from kdframe.errors import InputError
from kdframe.experiment import Source
from kdframe.records import shown

Row = dict[str, Any]

SHAPES = (("messages",), ("prompt", "completion"), ("text",))
"""The columns that make a row; where a row has several, the first shape is taken."""

_NAMES = frozenset(name for shape in SHAPES for name in shape)
_OTHER_NAMES = {"messages": "conversations", "completion": "response"}
_ROLES = {"human": "user", "gpt": "assistant"}
_ENDINGS = (".jsonl", ".json", ".parquet", ".txt")
_NEVER_HUB = frozenset((*_ENDINGS, ".csv", ".tsv", ".arrow", ".gz", ".zst", ".xz", ".zip"))
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HEAD, _HEAD_ROWS = 4 << 20, 20_000
_NAMED = 20


def refuse(faults: Iterable[str]) -> None:
    """Raise the faults of rows, if there are any: the first 20 in words, the rest counted.

    Raises:
        InputError: there is a fault; the same line twice is one.
    """
    lines = list(dict.fromkeys(faults))
    more = [f"... and {len(lines) - _NAMED:,} more rows that cannot be used"]
    if lines:
        raise InputError(*lines[:_NAMED], *more[: len(lines) > _NAMED])


def read(source: Source) -> Iterator[tuple[str, Row]]:
    """Rows in the order of the files, with the place of each.

    Yields:
        `(place, row)`: the place is `file:line` (JSON; text: where the sample starts) or
        `file:row N`, counted from 1.

    Raises:
        InputError: the source is not there, or, after the last row, some rows cannot be read;
            names 20 of them and how many more there are.
    """
    return _read(source, None)


def check(source: Source) -> list[str]:
    """Faults that show without reading all: what is missing, and the first 4 MB (or 20,000 rows).

    The name of a hub dataset has none.
    """
    try:
        path = _local(source)
        if path is None:
            return []
        saved = _saved_folder(path, source.split)
        if saved is not None:
            _check_columns(saved, source)
            return []
        if not any(file.stat().st_size for file in _files(path)):
            return [f"{path}: is empty; write rows into it, or name another `path`"]
        for _ in _read(source, _HEAD):
            pass
    except InputError as error:
        return list(error.faults)
    return []


def content_hash(source: Source) -> str:
    """Hash of the bytes of a source's files, or of a hub dataset's name, in hexadecimal.

    Raises:
        InputError: the source is not there.
    """
    path = _local(source)
    if path is None:
        return hashlib.blake2b(source.path.encode(), digest_size=16).hexdigest()
    digest = hashlib.blake2b(digest_size=16)
    saved = _saved_folder(path, source.split)
    files = _files(path) if saved is None else sorted(f for f in saved.rglob("*") if f.is_file())
    for name in files:
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def normalise(record: object, columns: Mapping[Any, str]) -> Row:
    """A record as a row of one shape under our names.

    Args:
        record: what was read, or what a transform made.
        columns: our name to the record's name; where given, only shapes with such a name count.

    Raises:
        ValueError: what is wrong with it, and the remedy.
    """
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"{shown(record)} is not an object; write one JSON object for each row")
    row = _picked(record, columns)
    for name in _NAMES & row.keys():
        row[name] = _value(name, row[name])
    if "prompt" in row and type(row["prompt"]) is not type(row["completion"]):
        raise ValueError(
            f"prompt is {shown(row['prompt'])} and completion {shown(row['completion'])}; "
            "make both strings, or both lists of messages"
        )
    return row


def _read(source: Source, budget: int | None) -> Iterator[tuple[str, Row]]:
    faults = []
    limits = (source.limit, None if budget is None else _HEAD_ROWS)
    last = min((limit for limit in limits if limit is not None), default=None)
    for place, record in islice(_records(source, budget), last):
        try:
            row = normalise(record, source.columns)
        except ValueError as fault:
            faults.append(f"{place}: {fault}")
        else:
            yield place, row
    refuse(faults)


def _picked(record: Row, columns: Mapping[Any, str]) -> Row:
    """The columns of the record's shape under our names, and every foreign column."""
    there = ", ".join(map(str, record)) or "none"
    missing = [name for name in columns.values() if name not in record]
    if missing:
        raise ValueError(f"no column {missing[0]!r} (there are: {there}); mend `columns`")
    used = {name: columns.get(name) or _natural(name, record) for name in _NAMES}
    found = {ours: theirs for ours, theirs in used.items() if record.get(theirs) is not None}
    for shape in SHAPES:
        if found.keys() >= set(shape) and (not columns or columns.keys() & set(shape)):
            ours = {name: record[found[name]] for name in shape}
            taken = _NAMES | set(found.values())
            return {name: value for name, value in record.items() if name not in taken} | ours
    raise ValueError(
        f"has neither text, nor messages, nor prompt and completion (its columns: {there}; those "
        "that are null do not count); name them in `columns`"
    )


def _natural(name: str, record: Row) -> str:
    return name if record.get(name) is not None else _OTHER_NAMES.get(name, name)


def _value(name: str, value: object) -> str | list[Row]:
    if name == "messages" or (name != "text" and not isinstance(value, str)):
        return _messages(name, value)
    if _is_text(value):
        return str(value)
    raise ValueError(f"{name} is {shown(value)}; it must be a string of valid Unicode")


def _is_text(value: object) -> bool:
    """Whether it is a string that can be encoded, and so tokenised."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def _messages(name: str, value: object) -> list[Row]:
    """Messages as role and content; ShareGPT's `from` and `value` are renamed."""
    messages = []
    for message in value if isinstance(value, list) else [value]:
        fault = f"{name} has {shown(message)}; write a list of objects with role and content"
        if not isinstance(message, dict):
            raise ValueError(fault)
        # Arrow fills the keys that other messages have with nulls; templates ask what is defined.
        made = {key: entry for key, entry in message.items() if entry is not None}
        if "from" in made and "value" in made:
            sender, made["content"] = made.pop("from"), made.pop("value")
            made["role"] = _ROLES.get(sender, sender) if isinstance(sender, str) else sender
        if not _is_text(made.get("role")) or not _is_text(made.get("content")):
            raise ValueError(fault)
        messages.append(made)
    return messages


def _local(source: Source) -> Path | None:
    """The path of a source, or None where it is the name of a hub dataset."""
    path = Path(source.path).expanduser()
    named = _HUB_NAME.fullmatch(source.path) and path.suffix.lower() not in _NEVER_HUB
    return None if named and not path.exists() else path


def _saved_folder(path: Path, split: str) -> Path | None:
    """The folder of a dataset saved by `datasets`, or None where `path` is no such thing."""
    listing = path / "dataset_dict.json"
    if listing.is_file():
        splits = _json_value(listing).get("splits", [])
        if split not in splits:
            raise InputError(
                f"{path}: no split {split!r} (there are: {', '.join(splits)}); mend `split`"
            )
        return path / split
    saved = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return path if saved else None


def _json_value(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); save the dataset again") from error


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _ENDINGS)
        if not files:
            raise InputError(f"{path}: holds no {', '.join(_ENDINGS)} file; mend `path`")
        return files
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; mend `path`")
    if path.suffix.lower() not in _ENDINGS:
        raise InputError(
            f"{path}: unknown ending {path.suffix!r}; give a {', '.join(_ENDINGS)} file"
        )
    return [path]


def _check_columns(saved: Path, source: Source) -> None:
    features = _json_value(saved / "dataset_info.json").get("features") or {}
    try:
        _picked(dict.fromkeys(features, ""), source.columns)
    except ValueError as fault:
        raise InputError(f"{saved}: {fault}") from fault


def _records(source: Source, budget: int | None) -> Iterator[tuple[str, object]]:
    """Places and raw records; a record that cannot be read is the ValueError that says why."""
    path = _local(source)
    if path is None:
        yield from _hub(source)
        return
    saved = _saved_folder(path, source.split)
    if saved is not None:
        yield from _saved(saved)
        return
    files = _files(path)
    readers = {
        ".jsonl": records.json_lines,
        ".json": records.json_values,
        ".parquet": records.parquet,
    }
    texts = partial(records.texts, sample_by=source.sample_by)
    for file in files:
        reader = readers.get(file.suffix.lower(), texts)
        yield from reader(file, None if budget is None else budget // len(files))


def _saved(folder: Path) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: cannot be read ({error}); save the dataset again") from error
    return _numbered(str(folder), rows.with_format(None))


def _hub(source: Source) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source.path}: no such path, and not a dataset that can be loaded from the hub "
            f"(split {source.split!r}: {reason}); mend `path` or `split`"
        ) from error
    return _numbered(source.path, rows)


def _numbered(name: str, rows: Iterable[Row]) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(rows, 1):
        yield f"{name}:row {number}", row
