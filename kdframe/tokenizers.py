"""Tokenizers: loading, the bytes that each token stands for, and whether two are the same."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdframe.errors import InputError
from kdframe.locating import Located, explained, locate
from kdframe.plugins import installed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

# Values of `tokenizer.ggml.pre` whose rules transformers drops when it reads a `.gguf` file.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
_NFC = frozenset({"qwen2", "qwen35"})
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def load(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of a model (see `locate`).

    From a `.gguf` file come its vocabulary, special tokens, chat template, context length, and the
    rules for digits and Unicode that transformers leaves out.

    Raises:
        InputError: it cannot be found or loaded; names the model and the remedy.
    """
    found = locate(model)
    with explained("tokenizer of model", model):
        if found.kind == "gguf":
            return _from_gguf(Path(found.path, found.file or ""))
        tokenizer = _from_pretrained(found, revision, trust_remote_code)
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer of model {model!r} runs in Python only; save it with a tokenizer.json"
        )
    return tokenizer


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """The bytes that each id stands for, by id.

    Byte-level alphabets are decoded, SentencePiece's low line is a space, `<0x..>` is that byte,
    special and added tokens are their text in UTF-8. Ids without a token are left out.
    """
    added = tokenizer.added_tokens_decoder
    special = special_ids(tokenizer)
    rules = _rules(tokenizer)
    decode = _byte_level if "ByteLevel" in rules else _sentencepiece if "▁" in rules else _plain
    # SentencePiece lists runs of spaces as added tokens in its own spelling.
    verbatim = special if decode is _sentencepiece else special | added.keys()
    return {
        token_id: text.encode() if token_id in verbatim else decode(text)
        for text, token_id in tokenizer.get_vocab().items()
    }


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that mark structure rather than spell text."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def byte_lengths(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> NDArray[np.int64]:
    """How many bytes of text each id spells, `[vocab_size]`; 0 for specials and unused ids."""
    import numpy as np

    lengths = np.zeros(vocab_size, dtype=np.int64)
    special = special_ids(tokenizer)
    for token_id, spelled in token_bytes(tokenizer).items():
        if token_id < vocab_size and token_id not in special:
            lengths[token_id] = len(spelled)
    return lengths


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of the map from ids to bytes, and of which ids are special."""
    digest = hashlib.blake2b(digest_size=16)
    special = special_ids(tokenizer)
    for token_id, spelled in sorted(token_bytes(tokenizer).items()):
        digest.update(b"%d %d %d " % (token_id, token_id in special, len(spelled)))
        digest.update(spelled)
    return digest.hexdigest()


def template_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of the chat template (of its absence, where there is none)."""
    text = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(
    teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast, limit: int = 5
) -> list[tuple[int, bytes | None, bytes | None]]:
    """The first ids that stand for other bytes: `(id, teacher's, student's)`; None: no token."""
    ours, theirs = token_bytes(teacher), token_bytes(student)
    differ = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    return [(i, ours.get(i), theirs.get(i)) for i in differ[:limit]]


def require_same(
    teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast, bridged: bool
) -> None:
    """Refuse a student whose ids mean something else, unless a projection bridges the two.

    Chat templates may differ, and so may the rows of the embeddings.

    Raises:
        InputError: names the first ids that differ and the projections that are installed.
    """
    if bridged or not (found := differences(teacher, student)):
        return
    each = "; ".join(
        f"id {i} is {_shown(a)} for the teacher and {_shown(b)} for the student"
        for i, a, b in found
    )
    names = ", ".join(sorted(installed().kinds.get("projection", {}))) or "none"
    raise InputError(
        f"teacher and student tokenizers differ: {each}; "
        f"a vocabulary `projection` bridges them (installed: {names})"
    )


def _shown(spelled: bytes | None) -> str:
    return "absent" if spelled is None else repr(spelled)


def _from_pretrained(
    found: Located, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(found.path, **options)
    if trust_remote_code or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    # A named class builds its own rules, whatever the file says; the file is what a model learned.
    name = "tokenizer.json"
    if not cached_file(
        found.path, name, revision=revision, _raise_exceptions_for_missing_entries=False
    ):
        return tokenizer
    saved = PreTrainedTokenizerFast.from_pretrained(found.path, **options)
    return tokenizer if _rules(tokenizer) == _rules(saved) else saved


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    """Read the vocabulary alone: AutoTokenizer parses the file's tensors first, in seconds."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import (
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
        read_gguf_metadata,
    )

    architecture, described, settings = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(architecture, described)
    _mend(backend, described.get("pre_tokenizer_type"))
    metadata, _ = read_gguf_metadata(str(path))
    context = metadata.get(f"{architecture}.context_length")
    if context is not None:
        settings["model_max_length"] = context
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def _mend(backend: Any, rules: str | None) -> None:
    """Put back the rules that transformers drops."""
    from tokenizers import normalizers, pre_tokenizers

    if rules in _SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if rules in _NFC and backend.normalizer is None:
        backend.normalizer = normalizers.NFC()


def _rules(tokenizer: PreTrainedTokenizerFast) -> str:
    """How text is cut up and put together again, as JSON, without the vocabulary."""
    backend = tokenizer.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    return " ".join(
        json.dumps(json.loads(part.__getstate__()), ensure_ascii=False) for part in parts if part
    )


@functools.cache
def _alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones are themselves, others follow 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    return dict(zip(characters, printable + others, strict=True))


def _byte_level(text: str) -> bytes:
    alphabet = _alphabet()
    try:
        return bytes([alphabet[character] for character in text])
    except KeyError:  # an entry that was never spelled in the alphabet
        return text.encode()


def _sentencepiece(text: str) -> bytes:
    if fallback := _BYTE_FALLBACK.fullmatch(text):
        return bytes.fromhex(fallback[1])
    return text.replace("▁", " ").encode()


def _plain(text: str) -> bytes:
    return text.encode()
