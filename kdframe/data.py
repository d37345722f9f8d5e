"""Rows of text to rows of tokens, and which of their tokens count."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdframe import records, sources
from kdframe.batching import TokenRows
from kdframe.errors import InputError
from kdframe.experiment import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Counts", "Dataset", "TokenRows", "check_transforms", "fingerprint", "load"]


def _count(words: str) -> Any:
    return field(default=0, metadata={"words": words})


@dataclass
class Counts:
    """What became of the rows of one set. `examples` has the first 3 places of each drop."""

    read: int = _count("rows read")
    kept: int = _count("kept")
    empty: int = _count("rows left out: fewer than 2 tokens")
    nothing_to_learn: int = _count("rows left out: none of their tokens counts")
    dropped: int = _count("rows left out by a transform")
    held_out: int = _count("rows left out: the validation rows have the same text")
    truncated: int = _count("rows truncated to data.max_length")
    split: int = _count("rows split into windows of data.max_length")
    tokens_cut: int = _count("tokens cut off")
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, why: str, place: str) -> None:
        """Count a row that is not used: `empty`, `nothing_to_learn`, `dropped` or `held_out`."""
        setattr(self, why, getattr(self, why) + 1)
        places = self.examples.setdefault(why, [])
        places.extend([place][: 3 - len(places)])

    def lines(self) -> list[str]:
        """What happened, in words; nothing is said of what did not."""
        lines = []
        for part in fields(self)[:-1]:
            if value := getattr(self, part.name):
                places = ", ".join(self.examples.get(part.name, ()))
                lines.append(f"{value:,} {part.metadata['words']}" + f" ({places})" * bool(places))
        return lines

    def plain(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Dataset:
    """All sets of an experiment; `counts` has `train`, `validation` and `test.NAME`."""

    train: TokenRows
    validation: TokenRows
    test: Mapping[str, TokenRows]
    counts: Mapping[str, Counts]


class _Row(NamedTuple):
    place: str
    row: sources.Row
    source: Source


class _Text(NamedTuple):
    """What is tokenised. Labels that start within `spans` (characters) count; None: all do."""

    text: str
    spans: Sequence[tuple[int, int]] | None
    plain: bool  # the tokenizer adds its own special tokens
    ended: bool = False  # and the end of the text is a label


class _Tokens(NamedTuple):
    """`[tokens]` each: ids, whether a token counts as a label, and the bytes that it spells."""

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    spelled: NDArray[np.int64]


def load(data: Data, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Dataset:
    """Read all sets and tokenise them.

    A share of the training rows for validation is split off by the hash of their text, before
    transforms and windows; of one text alone nothing is split off.

    Args:
        data: the sources, and how they become rows.
        tokenizer: a fast one (it tells where in the text a token stands).
        vocab_size: token ids are below it.

    Raises:
        InputError: a source, a transform, a row or the tokenizer cannot be used, or a set is
            empty; names each with its place.
    """
    maker = _Maker(data, tokenizer, vocab_size)
    sources.refuse(check_transforms(data))
    rows = _read(data)
    counts = {name: Counts() for name in ("train", "validation", *rows)}
    may_be_empty = set()
    if isinstance(data.validation, float):
        rows["train"], rows["validation"] = _parted(rows["train"], data.validation, counts["train"])
        may_be_empty = {"validation"}
    for name, count in counts.items():
        count.read = len(rows[name]) + count.held_out
    rows["train"] = list(_transformed(rows["train"], data.transforms, counts["train"]))
    made = {name: maker.tokenise(rows[name], counts[name]) for name in counts}
    sources.refuse(
        f"data.{name}: no rows are left ({'; '.join(counts[name].lines()) or 'none were read'}); "
        "mend its source or the settings of `data`"
        for name in made
        if not len(made[name]) and name not in may_be_empty
    )
    test = {name: made[f"test.{name}"] for name in data.test}
    return Dataset(made["train"], made["validation"], test, counts)


def check_transforms(data: Data) -> list[str]:
    """A fault for each transform that cannot be imported."""
    faults = []
    for name in data.transforms:
        try:
            _transform(name)
        except Exception as error:  # importing runs anybody's code
            faults.append(
                f"data.transforms: {name!r} cannot be imported ({type(error).__name__}: {error}); "
                "write it as module:function, and put its folder on PYTHONPATH"
            )
    return faults


def fingerprint(data: Data) -> str:
    """Hash of the bytes of all sources and of the transforms' modules, in hexadecimal.

    Raises:
        InputError: a source or a transform is not there.
    """
    sources.refuse(check_transforms(data))
    parts = [sources.content_hash(part) for parts in _sets(data).values() for part in parts]
    for name in data.transforms:
        file = importlib.import_module(name.partition(":")[0]).__file__
        parts.append(hashlib.blake2b(Path(file).read_bytes() if file else b"").hexdigest())
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _sets(data: Data) -> dict[str, Sequence[Source]]:
    sets: dict[str, Sequence[Source]] = {"train": data.train}
    if isinstance(data.validation, Source):
        sets["validation"] = [data.validation]
    return sets | {f"test.{name}": [source] for name, source in data.test.items()}


def _read(data: Data) -> dict[str, list[_Row]]:
    rows: dict[str, list[_Row]] = {}
    faults: list[str] = []
    for name, parts in _sets(data).items():
        rows[name] = []
        for source in parts:
            try:
                rows[name] += [_Row(place, row, source) for place, row in sources.read(source)]
            except InputError as error:
                faults += error.faults
    if faults:
        raise InputError(*faults)
    return rows


def _parted(rows: list[_Row], share: float, counts: Counts) -> tuple[list[_Row], list[_Row]]:
    """Training and validation rows; the hash of a text decides, so copies never part."""
    any_taught = any(row.source.teacher for row in rows)
    keys = [_text_hash(row.row) for row in rows]
    able = [row.source.teacher or not any_taught for row in rows]
    texts = {key for key, may in zip(keys, able, strict=True) if may}
    held = {key for key in texts if key / 2**128 < share}
    if texts and not held:
        held = {min(texts)}
    if held == texts:
        held -= {max(texts, default=0)}
    train, validation = [], []
    for row, key, may in zip(rows, keys, able, strict=True):
        if key not in held:
            train.append(row)
        elif may:
            validation.append(row)
        else:
            counts.drop("held_out", row.place)
    return train, validation


def _text_hash(row: sources.Row) -> int:
    text = {name: row[name] for shape in sources.SHAPES for name in shape if name in row}
    canonical = json.dumps(text, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(canonical, digest_size=16).digest())


def _transform(name: str) -> Callable[[Any], Any]:
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise TypeError(f"{function} is not a function")
    return found  # type: ignore[no-any-return]


def _transformed(rows: Iterable[_Row], names: Sequence[str], counts: Counts) -> Iterator[_Row]:
    transforms = [(name, _transform(name)) for name in names]
    faults: list[str] = []
    for place, row, source in rows:
        try:
            made = [row]
            for name, function in transforms:
                made = [new for old in made for new in _applied(function, name, old)]
            made = [sources.normalise(new, {}) for new in made] if transforms else made
        except ValueError as fault:
            faults.append(f"{place}: {fault}")
            continue
        if not made:
            counts.drop("dropped", place)
        yield from (_Row(place, new, source) for new in made)
    sources.refuse(faults)


def _applied(function: Callable[[Any], Any], name: str, row: sources.Row) -> list[sources.Row]:
    try:
        made = function(row)
    except Exception as error:
        reason = f"raised {type(error).__name__}: {error}"
        raise ValueError(f"transform {name!r} {reason}; mend the function") from error
    rows = made if isinstance(made, list) else [made] * (made is not None)
    strange = [records.shown(new) for new in rows if not isinstance(new, dict)]
    if strange:
        raise ValueError(f"transform {name!r} gave {strange[0]}; return dicts, or None")
    return rows


class _Maker:
    """Makes token rows of rows."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        if not tokenizer.is_fast:
            raise InputError(f"{tokenizer.name_or_path}: a slow tokenizer; add its tokenizer.json")
        self.data, self.tokenizer, self.vocab_size = data, tokenizer, vocab_size
        added = tokenizer.added_tokens_decoder.items()
        self.special = [*tokenizer.all_special_ids, *(i for i, token in added if token.special)]

    def tokenise(self, rows: Iterable[_Row], counts: Counts) -> TokenRows:
        """Token rows of one set, in order."""
        kept: list[tuple[Source, _Tokens]] = []
        faults: list[str] = []
        texts = self._texts(rows, counts, faults)
        for plain, run in groupby(texts, key=lambda item: item[1].plain):
            while chunk := list(islice(run, 256)):  # the tokenizer spreads them over threads
                made = self.tokenizer(
                    [text.text for _, text in chunk],
                    add_special_tokens=plain,
                    return_offsets_mapping=True,
                    verbose=False,
                )
                for i, (row, text) in enumerate(chunk):
                    tokens = self._marked(text, made["input_ids"][i], made["offset_mapping"][i])
                    faults += self._outside(tokens, row.place)
                    windows = self._windows(tokens, row.place, counts)
                    kept += [(row.source, window) for window in windows]
        sources.refuse(faults)
        return TokenRows.join(
            [tokens.ids for _, tokens in kept],
            [np.append(tokens.learnt[1:], False) for _, tokens in kept],
            taught=[source.teacher for source, _ in kept],
            weights=[source.weight for source, _ in kept],
            text_bytes=[tokens.spelled[1:][tokens.learnt[1:]].sum() for _, tokens in kept],
        )

    def _outside(self, tokens: _Tokens, place: str) -> list[str]:
        bad = tokens.ids[(tokens.ids < 0) | (tokens.ids >= self.vocab_size)]
        where = f"outside the model's vocabulary of {self.vocab_size}"
        return [f"{place}: token id {i} is {where}; use the model's tokenizer" for i in bad[:1]]

    def _texts(
        self, rows: Iterable[_Row], counts: Counts, faults: list[str]
    ) -> Iterator[tuple[_Row, _Text]]:
        for row in rows:
            try:
                text = self._text(row.row)
            except (LookupError, ValueError) as fault:
                place = row.source.path if isinstance(fault, LookupError) else row.place
                faults.append(f"{place}: {fault}")
            else:
                if text.text.strip():
                    yield row, text
                else:
                    counts.drop("empty", row.place)

    def _text(self, row: sources.Row) -> _Text:
        if "text" in row:
            return _Text(row["text"], None, plain=True)
        prompt, completion = row.get("prompt", []), row.get("completion", [])
        if isinstance(prompt, str):
            text = prompt + completion
            return _Text(text, [(len(prompt), len(text))], plain=True, ended=True)
        messages = row.get("messages", prompt + completion)
        text = self._rendered(messages) if messages else ""
        if "messages" not in row:
            turns = [slice(len(prompt), len(messages))]
        elif self.data.chat_loss == "all":
            return _Text(text, None, plain=False)
        else:
            roles = [message["role"] for message in messages]
            turns = [slice(i, i + 1) for i, role in enumerate(roles) if role == "assistant"]
        return _Text(text, [self._span(text, messages, turn) for turn in turns], plain=False)

    def _span(self, text: str, messages: list[sources.Row], turn: slice) -> tuple[int, int]:
        """Where a turn stands in the text: what follows the generation prompt."""
        start = self._rendered(messages[: turn.start], prompt=True)
        end = self._rendered(messages[: turn.stop])
        if not (text.startswith(end) and end.startswith(start)):
            raise ValueError(
                "the chat template renders the start of the conversation otherwise alone than in "
                "the whole, so the assistant's tokens cannot be told; write it as `messages` and "
                "set `data.chat_loss: all`"
            )
        return len(start), len(end)

    def _rendered(self, messages: list[sources.Row], *, prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise LookupError(
                "has conversations, and the tokenizer has no chat template; use the tokenizer of a "
                "chat model, or write the rows as text or as prompt and completion"
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                [messages], tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is a program
            raise ValueError(f"chat template: {error}; mend the messages") from error
        return str(rendered[0])

    def _marked(self, text: _Text, ids: list[int], offsets: list[tuple[int, int]]) -> _Tokens:
        places = np.array(offsets, np.int64).reshape(-1, 2)
        learnt = np.full(len(ids), text.spans is None)
        for start, end in text.spans or ():
            learnt |= (places[:, 0] >= start) & (places[:, 0] < end)
        # Tokens may share a character or leave a gap: its bytes go to the first that ends it.
        spelled = np.diff(_bytes_before(text.text)[places[:, 1]], prepend=0)
        spelled[np.isin(ids, self.special)] = 0
        end_id = self.tokenizer.eos_token_id
        if text.ended and end_id is not None:
            # Some tokenizers have put it there themselves.
            size = len(ids) - (ids[-1:] == [end_id])
            ids = [*ids[:size], end_id]
            learnt, spelled = np.append(learnt[:size], True), np.append(spelled[:size], 0)
        return _Tokens(np.array(ids, np.int32), learnt, spelled)

    def _windows(self, tokens: _Tokens, place: str, counts: Counts) -> Iterator[_Tokens]:
        size, longest = len(tokens.ids), self.data.max_length
        if size < 2:
            counts.drop("empty", place)
            return
        windows = [slice(start, start + longest) for start in range(0, size, longest)]
        if size > longest and self.data.long_rows == "truncate":
            counts.truncated += 1
            counts.tokens_cut += size - longest
            right = self.data.truncation_side == "right"
            windows = [slice(longest) if right else slice(size - longest, size)]
        counts.split += len(windows) > 1
        for window in windows:
            cut = _Tokens(tokens.ids[window], tokens.learnt[window], tokens.spelled[window])
            if len(cut.ids) < 2:
                counts.tokens_cut += 1
            elif cut.learnt[1:].any():
                counts.kept += 1
                yield cut
            else:
                counts.drop("nothing_to_learn", place)


def _bytes_before(text: str) -> NDArray[np.int64]:
    """UTF-8 bytes in front of each character and at the end, `[characters + 1]`."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
