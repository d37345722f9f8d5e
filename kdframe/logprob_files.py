"""Files of per-token top-k log-probabilities: the shapes in which they are found, as one.

A file is `.jsonl` or `.parquet`; a record of it is one row, in one of these shapes:

- plain: `input_ids`, `top_ids [n, m]`, `top_logprobs [n, m]`; entry t is the prediction of token
  t + 1, or of token `positions[t]` + 1;
- vLLM: `prompt_token_ids` and `prompt_logprobs` (a list of `{id: {"logprob": ...}}`, null first);
- OpenAI chat: `logprobs.content`, a list of `{"token", "bytes", "logprob", "top_logprobs"}`;
- OpenAI completions: `logprobs.tokens`, `.token_logprobs` and `.top_logprobs`.

A response's one entry of `choices` counts as the record's own. Where the ids of tokens are not
given (`token_id:N`, as vLLM writes on demand), they are found by the tokens' bytes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdframe import records, tokenizers
from kdframe.errors import InputError
from kdframe.records import shown

NOTHING = -9999.0
"""What vLLM and OpenAI write for log 0, which JSON does not have."""

_ROWS = 8  # of a parquet file, held at once: a row may have a million numbers
_TOKEN_ID = re.compile(r"token_id:(\d+)")
_ESCAPED = re.compile(r"\\x([0-9a-fA-F]{2})")

Entry = Mapping[int, float]
"""Token ids and their log-probabilities at one position."""


@dataclass(frozen=True)
class PredictedRow:
    """A row with what was predicted at `n` of its positions; nothing is checked yet.

    Attributes:
        ids: `[tokens]`, the row.
        positions: `[n]`; entry i of the others predicts token `positions[i] + 1`.
        top_ids: `[n, m]` int64; log_probs: `[n, m]` float64, `-inf` where there are fewer than m.
        follows: whether the token that came next must be among the ids.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    top_ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    follows: bool


class Vocabulary:
    """A tokenizer, as far as a file's tokens are looked up in it.

    Attributes:
        size: ids are below it.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.size = size
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """A prompt's ids, as a row of text begins."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def find(self, spelled: bytes) -> int:
        """The one id that stands for some bytes.

        Raises:
            ValueError: there is none, or there are several.
        """
        found = self._by_bytes.get(spelled, [])
        if len(found) == 1:
            return found[0]
        many = f"{len(found)} ids ({', '.join(map(str, found[:3]))})" if found else "no id"
        raise ValueError(
            f"the teacher's tokenizer has {many} for the token {spelled!r}, so its id cannot be "
            "told; ask the server for token ids (vLLM: return_tokens_as_token_ids, or "
            "prompt_logprobs)"
        )

    @functools.cached_property
    def _by_bytes(self) -> dict[bytes, list[int]]:
        found: dict[bytes, list[int]] = {}
        for token_id, spelled in tokenizers.token_bytes(self._tokenizer).items():
            found.setdefault(spelled, []).append(token_id)
        return found


def read(path: Path, vocabulary: Vocabulary) -> Iterator[tuple[str, PredictedRow | ValueError]]:
    """The rows of a file with their places; one that cannot be read is why.

    Raises:
        InputError: the file is not there, or of another kind.
    """
    readers: dict[str, Callable[[], Iterator[tuple[str, object]]]] = {
        ".jsonl": lambda: records.json_lines(path, None),
        ".parquet": lambda: records.parquet(path, None, _ROWS),
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unknown ending {path.suffix!r}; give .jsonl or .parquet files")
    if not path.is_file():
        raise InputError(f"{path}: no such file; mend the path")
    for place, record in readers[path.suffix.lower()]():
        try:
            yield place, _row(record, vocabulary)
        except ValueError as fault:
            yield place, fault


def _row(record: object, vocabulary: Vocabulary) -> PredictedRow:
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"{shown(record)} is not an object; write one JSON object for each row")
    whole = _with_choice({name: x for name, x in record.items() if x is not None})
    log_probs = whole.get("logprobs")
    try:
        if "top_ids" in whole:
            return _plain(whole)
        if "prompt_logprobs" in whole:
            return _vllm(whole)
        if isinstance(log_probs, dict) and log_probs.get("content") is not None:
            return _chat(whole, log_probs["content"], vocabulary)
        if isinstance(log_probs, dict) and log_probs.get("tokens") is not None:
            return _completions(whole, log_probs, vocabulary)
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"not as its shape has it ({type(error).__name__}: {error}); see docs/cache.md"
        ) from error
    raise ValueError(
        f"has log-probabilities in no known shape (its keys: {', '.join(map(str, whole))}); give "
        "input_ids with top_ids and top_logprobs, vLLM's prompt_token_ids with prompt_logprobs, "
        "or OpenAI's logprobs"
    )


def _with_choice(record: dict[str, Any]) -> dict[str, Any]:
    choices = record.get("choices")
    if choices is None:
        return record
    if not isinstance(choices, list) or len(choices) != 1:
        raise ValueError("`choices` must have one entry; ask the server for n = 1")
    return {**record, **{name: x for name, x in choices[0].items() if x is not None}}


# ------------------------------------------------------------------------------------ the shapes
def _plain(record: Mapping[str, Any]) -> PredictedRow:
    ids = _ids(record["input_ids"])
    top_ids, top = record["top_ids"], record["top_logprobs"]
    _same_length("top_ids", top_ids, "top_logprobs", top)
    positions = record.get("positions")
    if positions is None:
        if len(top) not in (len(ids) - 1, len(ids)):
            raise ValueError(
                f"{len(ids)} input_ids and {len(top)} entries of top_logprobs; give one entry for "
                "each token but the last, or `positions`"
            )
        positions = list(range(len(ids) - 1))  # the last token's prediction is of nothing here
    else:
        _same_length("positions", positions, "top_logprobs", top)
    for t, (some, values) in enumerate(zip(top_ids, top, strict=True)):
        _same_length(f"top_ids[{t}]", some, f"top_logprobs[{t}]", values)
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(top_ids, top, strict=True)]
    return _made(ids, positions, pairs[: len(positions)], follows=False)


def _vllm(record: Mapping[str, Any]) -> PredictedRow:
    if "prompt_token_ids" not in record:
        raise ValueError("prompt_logprobs without prompt_token_ids; keep the ids of the prompt")
    ids, entries = _ids(record["prompt_token_ids"]), _parsed(record["prompt_logprobs"])
    _same_length("prompt_token_ids", ids, "prompt_logprobs", entries)
    return _rowed(ids, 0, [entry and _pairs(entry) for entry in entries])


def _chat(
    record: Mapping[str, Any], content: Sequence[Mapping[str, Any]], vocabulary: Vocabulary
) -> PredictedRow:
    def known(token: Mapping[str, Any]) -> int:
        spelled = token.get("bytes")
        text = token["token"]
        return _labelled(text, text.encode() if spelled is None else bytes(spelled), vocabulary)

    ids = [known(token) for token in content]
    entries = []
    for token_id, token in zip(ids, content, strict=True):
        pairs = [(known(other), other["logprob"]) for other in token["top_logprobs"]]
        entries.append(_with_own(pairs, token_id, token["logprob"]))
    whole, start = _placed(record, ids, vocabulary)
    return _rowed(whole, start, entries)


def _completions(
    record: Mapping[str, Any], log_probs: Mapping[str, Any], vocabulary: Vocabulary
) -> PredictedRow:
    def known(text: str) -> int:
        inside = text.removeprefix("bytes:")
        escaped = inside != text and _ESCAPED.sub("", inside) == ""
        spelled = bytes.fromhex("".join(_ESCAPED.findall(inside))) if escaped else text.encode()
        return _labelled(text, spelled, vocabulary)

    tokens, own = log_probs["tokens"], log_probs["token_logprobs"]
    top = log_probs["top_logprobs"]
    _same_length("logprobs.tokens", tokens, "logprobs.token_logprobs", own)
    _same_length("logprobs.tokens", tokens, "logprobs.top_logprobs", top)
    ids = [known(text) for text in tokens]
    entries: list[list[tuple[int, Any]] | None] = []
    for token_id, value, others in zip(ids, own, top, strict=True):
        pairs = [(known(text), x) for text, x in (others or {}).items() if x is not None]
        entries.append(None if value is None else _with_own(pairs, token_id, value))
    echoed = not entries or entries[0] is None
    whole, start = (ids, 0) if echoed else _placed(record, ids, vocabulary)
    return _rowed(whole, start, entries)


# --------------------------------------------------------------------------------------- helpers
def _rowed(
    ids: Sequence[int], start: int, entries: Sequence[list[tuple[int, Any]] | None]
) -> PredictedRow:
    """A row whose token `start + i` is predicted by entry i; nothing predicts its first token."""
    begin = 1 if start == 0 else 0
    if begin and entries and entries[0]:
        raise ValueError("the first token has log-probabilities, but nothing came before it")
    empty = [i for i, entry in enumerate(entries) if i >= begin and not entry]
    if empty:
        raise ValueError(f"token {start + empty[0]} has no log-probabilities; ask for them again")
    positions = range(start + begin - 1, start + len(entries) - 1)
    return _made(ids, positions, [entry or [] for entry in entries[begin:]], follows=True)


def _made(
    ids: Sequence[int],
    positions: Sequence[int],
    entries: Sequence[Sequence[tuple[int, Any]]],
    *,
    follows: bool,
) -> PredictedRow:
    sizes = np.array([len(entry) for entry in entries], np.int64)
    there = np.arange(max(1, sizes.max(initial=0))) < sizes[:, None]
    flat_ids = _ids(token_id for entry in entries for token_id, _ in entry)
    values = [value for entry in entries for _, value in entry]
    strange = [i for i, value in enumerate(values) if type(value) not in (float, int)]
    if strange:
        at = positions[int(np.searchsorted(sizes.cumsum(), strange[0], side="right"))]
        raise ValueError(f"position {at}: {shown(values[strange[0]])} is no log-probability")
    top_ids = np.zeros(there.shape, np.int64)
    log_probs = np.full(there.shape, -np.inf)
    top_ids[there], log_probs[there] = flat_ids, values
    log_probs[log_probs <= NOTHING] = -np.inf
    return PredictedRow(
        np.array(ids, np.int64), np.array(_ids(positions), np.int64), top_ids, log_probs, follows
    )


def _pairs(entry: Any) -> list[tuple[int, Any]]:
    """vLLM's `{id: Logprob}`: a JSON object, or Arrow's struct or map."""
    items = entry.items() if isinstance(entry, dict) else entry
    return [
        (int(token_id), found["logprob"] if isinstance(found, dict) else found)
        for token_id, found in items
        if found is not None  # Arrow fills a struct's other keys with nulls
    ]


def _parsed(value: Any) -> Any:
    """A column of JSON text, as parquet files have it, or the value itself."""
    return json.loads(value) if isinstance(value, str) else value


def _with_own(pairs: list[tuple[int, Any]], token_id: int, log_prob: Any) -> list[tuple[int, Any]]:
    """The token that came next, among the likeliest or beside them."""
    return pairs if token_id in dict(pairs) else [*pairs, (token_id, log_prob)]


def _labelled(text: str, spelled: bytes, vocabulary: Vocabulary) -> int:
    found = _TOKEN_ID.fullmatch(text)
    return int(found[1]) if found else vocabulary.find(spelled)


def _placed(
    record: Mapping[str, Any], ids: list[int], vocabulary: Vocabulary
) -> tuple[list[int], int]:
    """The whole row of a completion, and where the completion stands in it."""
    if "prompt_token_ids" in record:
        prompt = _ids(record["prompt_token_ids"])
        return prompt + ids, len(prompt)
    if "input_ids" in record:
        whole = _ids(record["input_ids"])
        last = len(whole) - len(ids)
        starts = [i for i in range(last + 1) if whole[i : i + len(ids)] == ids]
        if len(starts) != 1:
            many = "nowhere" if not starts else f"at {len(starts)} places"
            raise ValueError(f"its tokens stand {many} in input_ids; give prompt_token_ids")
        return whole, starts[0]
    if isinstance(record.get("prompt"), str):
        prompt = vocabulary.encode(record["prompt"])
        return prompt + ids, len(prompt)
    raise ValueError(
        "has the log-probabilities of a completion, but not what came before it; add "
        "prompt_token_ids, the whole row as input_ids, or the text as prompt"
    )


def _ids(values: Iterable[Any]) -> list[int]:
    ids = list(values)
    strange = [value for value in ids if type(value) is not int]  # True is no number
    if strange:
        raise ValueError(f"{shown(strange[0])} is no token id or position; write whole numbers")
    return ids


def _same_length(name: str, one: Any, other_name: str, other: Any) -> None:
    if len(one) != len(other):
        raise ValueError(
            f"{len(one)} entries of {name} and {len(other)} of {other_name}; give as many of each"
        )
