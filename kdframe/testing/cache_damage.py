"""The contract: a flipped bit, a cut and a lost file are noticed, named, and mended."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdframe.api import Cache, DamagedError, KdframeError
from kdframe.testing.cache_kit import CacheKit
from kdframe.testing.cache_rows import holds, key, rows, write

_ROWS = 12
_CASES = 90
_NOTE = b"what a codec was fitted to"

Hurt = Callable[[Path, random.Random], None]


def flip_a_bit(path: Path, rng: random.Random) -> None:
    """Turn one bit of a file over."""
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """Cut a file at any place."""
    os.truncate(path, rng.randrange(path.stat().st_size))


class Damage(CacheKit):
    """Every file under the folder is damaged, one at a time."""

    def test_a_flipped_bit_is_noticed_or_harmless(self, tmp_path: Path) -> None:
        noticed = sum(self._suffers(folder) for folder in self._hurt(tmp_path, flip_a_bit, _CASES))
        assert noticed >= _CASES // 3

    def test_a_cut_file_is_noticed_or_harmless(self, tmp_path: Path) -> None:
        noticed = sum(self._suffers(folder) for folder in self._hurt(tmp_path, cut, _CASES // 3))
        assert noticed >= _CASES // 9

    def test_damage_is_mended_by_forgetting_and_writing_again(self, tmp_path: Path) -> None:
        for folder in self._hurt(tmp_path, flip_a_bit, _CASES // 3):
            try:
                cache = self.open(folder)
                cache.drop(cache.verify()[1])
            except KdframeError:
                continue  # whose cache it is, and what is kept, cannot be computed again
            write(cache, cache.missing(rows(range(_ROWS))))
            assert cache.verify()[1] == []
            assert all(holds(self.open(folder), i) for i in range(_ROWS))

    def _filled(self, folder: Path) -> Cache:
        cache = self.open(folder)
        for start in range(0, _ROWS, 4):
            write(cache, range(start, start + 4))
        cache.keep("note", _NOTE)
        assert all(holds(cache, i) for i in range(_ROWS))  # what is copied here is damaged too
        return cache

    def _hurt(self, tmp_path: Path, hurt: Hurt, cases: int) -> Iterator[Path]:
        """Copies of a filled cache, a file of each damaged: every file in turn."""
        if not self.damaged_files:
            pytest.skip("the backend keeps no files under the folder")
        filled, rng = tmp_path / "filled", random.Random(7)
        self._filled(filled)
        files = [p.relative_to(filled) for p in sorted(filled.rglob("*")) if p.is_file()]
        files = [name for name in files if (filled / name).stat().st_size]
        assert files, "the cache has no files under its folder; see `damaged_files`"
        for case in range(cases):
            folder = tmp_path / str(case)
            shutil.copytree(filled, folder)
            hurt(folder / files[case % len(files)], rng)
            yield folder
            shutil.rmtree(folder)

    def _suffers(self, folder: Path) -> bool:
        """Use a damaged cache in every way: whether it noticed. A wrong answer fails."""
        try:
            cache = self.open(folder)
        except KdframeError:
            return True
        missing = cache.missing(rows(range(_ROWS)))
        lost = [i for i in set(range(_ROWS)) - set(missing) if not self._reads(cache, i)]
        named = {bad.row for bad in cache.verify()[1]}
        assert "" in named or {key(i).hex() for i in lost} <= named, "verify does not tell of a row"
        return bool(missing or named or not self._has_note(cache))

    def _reads(self, cache: Cache, number: int) -> bool:
        try:
            right = holds(cache, number)
        except DamagedError as error:
            message = str(error)
        else:
            assert right, f"row {number} is silently wrong"
            return True
        assert key(number).hex() in message
        return False

    def _has_note(self, cache: Cache) -> bool:
        try:
            assert cache.kept("note") == _NOTE, "what was kept is silently wrong"
        except DamagedError:
            return False
        return True
