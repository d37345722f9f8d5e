"""The contract: any number of writers and readers, each of which may be killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from kdframe.testing.cache_kit import CacheKit
from kdframe.testing.cache_rows import holds, rows, write

_KILLS = 5
_ROWS = 400  # more than a writer commits before it is killed


class Sharing(CacheKit):
    """Two instances; several processes; a kill."""

    def test_a_reader_sees_what_is_written_after_it_was_opened(self, tmp_path: Path) -> None:
        reader, writer = (self.open(tmp_path / "cache") for _ in range(2))
        for start in (0, 3):
            assert reader.missing(rows([start])) == [0]
            write(writer, range(start, start + 3))
            assert holds(reader, start)  # also if nobody asks what is missing
            assert reader.missing(rows(range(start + 4))) == [start + 3]

    def test_two_that_write_the_same_rows_store_them_once(self, tmp_path: Path) -> None:
        one, other = (self.open(tmp_path / "cache") for _ in range(2))
        write(one, range(4))
        write(other, range(6))
        assert len(one.stored()) == 6
        assert one.verify() == (6, [])
        assert all(holds(store, i) for store in (one, other) for i in range(6))

    @pytest.mark.usefixtures("processes")
    def test_many_processes_write_at_once_and_nothing_is_lost(self, tmp_path: Path) -> None:
        folder = tmp_path / "cache"
        writers = [self.start_writer(folder, first, first + 30, 3) for first in (0, 15, 100)]
        told = [writer.communicate(timeout=120)[0] for writer in writers]
        assert [writer.returncode for writer in writers] == [0, 0, 0]
        assert all(len(lines.splitlines()) == 11 for lines in told)
        cache = self.open(folder)
        every = [*range(45), *range(100, 130)]
        assert cache.missing(rows(every)) == []
        assert all(holds(cache, i) for i in every)
        assert len(cache.stored()) == len(every)
        assert cache.verify()[1] == []

    @pytest.mark.usefixtures("processes")
    def test_a_row_can_be_read_as_soon_as_its_writer_says_so(self, tmp_path: Path) -> None:
        folder = tmp_path / "cache"
        reader = self.open(folder)
        with self.start_writer(folder, 0, 24, 2) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "open\n"
            for line in writer.stdout:
                assert holds(reader, int(line))
                assert holds(reader, int(line) + 1)
        assert writer.returncode == 0

    @pytest.mark.usefixtures("processes")
    def test_a_killed_writer_leaves_all_that_it_told_and_nothing_half(self, tmp_path: Path) -> None:
        rng = random.Random(3)
        folder = tmp_path / "cache"
        told: set[int] = set()
        for first in range(0, _KILLS * _ROWS, _ROWS):
            told |= self._killed(folder, first, after=rng.uniform(0, 0.1))
            cache = self.open(folder)
            every = range(first + _ROWS)
            found = set(every) - set(cache.missing(rows(every)))
            assert told <= found
            assert all(holds(cache, i) for i in found)
        assert self.open(folder).verify() == (len(found), [])
        write(cache, every)
        assert self.open(folder).verify() == (len(every), [])

    def _killed(self, folder: Path, first: int, after: float) -> set[int]:
        """Start a writer and kill it; the rows that it said were written."""
        with self.start_writer(folder, first, first + _ROWS, 2) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "open\n"
            time.sleep(after)
            writer.send_signal(signal.SIGKILL)
            starts = [int(line) for line in writer.stdout.read().splitlines()]
        return {start + i for start in starts for i in range(2)}
