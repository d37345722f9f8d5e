"""The contract: what does not fit is refused, and the message says what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from kdframe.api import Cache, InputError, RowPositions
from kdframe.testing.cache_kit import CacheKit
from kdframe.testing.cache_rows import RECORD_BYTES, holds, record, row, spec, write


class Refusing(CacheKit):
    """Another identity, another size, another format."""

    def test_another_identity_is_refused_by_the_name_of_its_parts(self, tmp_path: Path) -> None:
        write(self.open(tmp_path / "cache"), [1])
        with pytest.raises(InputError) as caught:
            self.open(tmp_path / "cache", teacher_weights="c" * 64, extra="new")
        message = str(caught.value)
        assert "teacher_weights" in message
        assert "extra" in message
        assert "tokenizer" not in message
        assert holds(self.open(tmp_path / "cache"), 1)

    def test_another_size_of_records_is_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "cache"
        write(self.open(folder), [1])
        other = dataclasses.replace(spec(folder), record_bytes=RECORD_BYTES + 4)
        with pytest.raises(InputError, match="record"):
            self.config(folder).open(other)

    def test_a_newer_format_is_refused(self, tmp_path: Path) -> None:
        write(self.open(tmp_path / "cache"), [1])
        self.make_newer(tmp_path / "cache")
        with pytest.raises(InputError, match=r"newer|version"):
            self.open(tmp_path / "cache")

    @pytest.mark.parametrize("key", [b"", b"short", bytes(15), bytes(17)])
    def test_a_key_has_sixteen_bytes(self, cache: Cache, key: bytes) -> None:
        bad = RowPositions(key, np.zeros(1, np.int32))
        with pytest.raises(ValueError, match=r".+"):
            cache.write([row(1), bad], [record(1), np.zeros((1, RECORD_BYTES), np.uint8)])
        assert cache.info()["rows"] == 0

    def test_records_have_a_row_for_each_position_and_the_size_that_was_said(
        self, cache: Cache
    ) -> None:
        for wrong in (record(1)[:, :-1], record(1, range(90))):
            with pytest.raises(ValueError, match=r".+"):
                cache.write([row(1)], [wrong])
        with pytest.raises(ValueError, match=r".+"):
            cache.write([row(1), row(2)], [record(1)])
        assert cache.info()["rows"] == 0
