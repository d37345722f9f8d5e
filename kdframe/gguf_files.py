"""Reading a `.gguf` file's weights in a fraction of the time that transformers takes by itself."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator
from typing import Any

_ARRAY, _STRING = 9, 8
_LONG = 4096
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@contextlib.contextmanager
def quick_reader() -> Iterator[None]:
    """While it lasts, transformers does not repeat itself and draws no progress bar.

    Most of its time goes into the vocabulary, which it parses value by value, twice, though only a
    tokenizer needs it (its length is kept: the number of embedding rows can come from it), and
    into a table of names that it builds anew for every module.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    with (
        _swapped(gguf, "GGUFReader", _without_vocabulary(gguf.GGUFReader)),
        _swapped(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        _swapped(loader, "tqdm", lambda steps, **_: steps),
    ):
        yield


def _without_vocabulary(reader: Any) -> type:
    import numpy as np

    class QuickReader(reader):
        def _get_field_parts(self, offset: int, raw_type: int) -> Any:
            if raw_type != _ARRAY or self.byte_order != "I":
                return super()._get_field_parts(offset, raw_type)
            kind, count = struct.unpack_from("<IQ", self.data, offset)
            if count <= _LONG:
                return super()._get_field_parts(offset, raw_type)
            end = _end(self.data, offset + 12, kind, count)
            return end - offset, [np.zeros(1, dtype=np.uint8)], [0] * count, [_ARRAY, kind]

    return QuickReader


def _end(data: Any, at: int, kind: int, count: int) -> int:
    """Where an array that begins `at` ends."""
    if kind != _STRING:
        return at + count * _WIDTHS[kind]
    for _ in range(count):
        at += 8 + struct.unpack_from("<Q", data, at)[0]
    return at


@contextlib.contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)
