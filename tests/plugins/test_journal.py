"""The journal: whole lines only, each under its own checksum."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdframe_mmap_cache import journal
from kdframe_mmap_cache.journal import Journal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / journal.NAME).touch()
    return tmp_path


def test_a_reader_is_told_what_is_new_and_only_that(folder):
    reader, writer = Journal(folder), Journal(folder)
    assert reader.news() == (True, [])
    writer.append({"a": 1})
    writer.append({"a": 2})
    assert reader.news() == (False, [{"a": 1}, {"a": 2}])
    assert reader.news() == (False, [])


def test_a_line_without_its_end_waits(folder):
    line = folder / journal.NAME
    Journal(folder).append({"a": 1})
    whole = line.read_bytes()
    reader = Journal(folder)
    line.write_bytes(whole[:-1])
    assert reader.news() == (True, [])
    line.write_bytes(whole)
    assert reader.news() == (False, [{"a": 1}])


def test_a_torn_end_is_cut_off_by_the_next_line(folder):
    line = folder / journal.NAME
    Journal(folder).append({"a": 1})
    with open(line, "ab") as file:
        file.write(b'{"half')
    Journal(folder).append({"a": 2})
    reader = Journal(folder)
    assert reader.news() == (True, [{"a": 1}, {"a": 2}])
    assert reader.damaged == []


def test_damaged_lines_are_counted_and_mending_tells_readers_to_begin_again(folder):
    path = folder / journal.NAME
    for i in range(3):
        Journal(folder).append({"a": i})
    path.write_bytes(path.read_bytes().replace(b'"a": 1', b'"a": 7'))
    reader = Journal(folder)
    assert reader.news() == (True, [{"a": 0}, {"a": 2}])
    assert reader.damaged == [2]
    Journal(folder).mend()
    assert reader.news() == (True, [{"a": 0}, {"a": 2}])
    assert reader.damaged == []
