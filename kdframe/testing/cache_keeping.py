"""The contract: something small is kept beside the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdframe.api import Cache
from kdframe.testing.cache_kit import CacheKit
from kdframe.testing.cache_rows import holds, write

_WHOLE = bytes(range(256)) * 300


class Keeping(CacheKit):
    """Names, and who comes first."""

    def test_what_is_kept_comes_back(self, tmp_path: Path) -> None:
        cache = self.open(tmp_path / "cache")
        assert cache.kept("codec") is None
        for name, data in (("codec", _WHOLE), ("empty", b""), ("A-1_b", b"\0\n")):
            cache.keep(name, data)
            assert cache.kept(name) == data
            assert self.open(tmp_path / "cache").kept(name) == data

    def test_the_first_to_come_stays(self, tmp_path: Path) -> None:
        one, other = (self.open(tmp_path / "cache") for _ in range(2))
        one.keep("codec", b"first")
        other.keep("codec", b"second")
        one.keep("codec", b"third")
        assert [store.kept("codec") for store in (one, other)] == [b"first", b"first"]

    def test_names_are_told_in_order(self, cache: Cache) -> None:
        assert cache.kept_names() == []
        for name in ("b", "a-2", "B", "a_1"):
            cache.keep(name, b"x")
        assert cache.kept_names() == sorted(["b", "a-2", "B", "a_1"])

    @pytest.mark.parametrize("name", ["", "..", "a/b", "../a", "a.b", "a b", "ä", "a\n", "/a"])
    def test_a_name_has_letters_digits_dash_and_underscore(self, cache: Cache, name: str) -> None:
        with pytest.raises(ValueError, match="name"):
            cache.keep(name, b"x")
        assert cache.kept_names() == []

    def test_it_is_no_row(self, cache: Cache) -> None:
        cache.keep("codec", _WHOLE)
        assert cache.info()["rows"] == 0
        write(cache, range(2))
        assert cache.verify() == (2, [])
        assert holds(cache, 1)
