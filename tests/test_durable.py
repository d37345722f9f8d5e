"""Files and folders that appear whole or not at all, whatever kills the process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdframe import durable
from kdframe.errors import InputError

EXCHANGES = """
import sys
from pathlib import Path
from kdframe import durable
target = Path(sys.argv[1])
print("begun", flush=True)
for i in range(10**6):
    with durable.folder(target) as aside:
        for name in "abc":
            (aside / name).write_text(str(i) * 1000)
"""
WRITES = """
import sys
from pathlib import Path
from kdframe import durable
target = Path(sys.argv[1])
print("begun", flush=True)
for i in range(10**6):
    durable.write_text(target, str(i) * 5000)
"""
HOLDS = """
import sys, time
from pathlib import Path
from kdframe import durable
with durable.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def killed(program: str, path: Path, seconds: float) -> None:
    """Run a program until it says that it has begun, and kill it some time after."""
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        time.sleep(seconds)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)


def test_bytes_text_and_json_are_written_whole(tmp_path):
    path = tmp_path / "new" / "file"
    durable.write_bytes(path, b"old")
    durable.write_text(path, "né")
    assert path.read_bytes() == "né".encode()
    durable.write_json(path, {"a": "é"})
    assert path.read_text() == '{\n  "a": "é"\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    durable.write_bytes(path, b"old")
    with pytest.raises(TypeError):
        durable.write_bytes(path, "no bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    durable.write_text(path, "0" * 5000)
    rng = random.Random(1)
    for _ in range(5):
        killed(WRITES, path, rng.uniform(0, 0.1))
        text = path.read_text()
        assert text == text[: len(text) // 5000] * 5000


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "deep" / "folder"
    with durable.folder(path) as aside:
        (aside / "old").touch()
        assert not path.exists()
    with durable.folder(path) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "new").touch(mode=0o600)
    assert [entry.name for entry in path.rglob("*")] == ["sub", "new"]
    assert list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert (path / "sub" / "new").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_that_could_not_be_filled_changes_nothing(tmp_path):
    path = tmp_path / "folder"
    with durable.folder(path) as aside:
        (aside / "old").touch()

    def fill() -> None:
        with durable.folder(path) as aside:
            (aside / "new").touch()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fill()
    assert [entry.name for entry in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_killed_while_it_exchanges_folders_one_of_them_is_there_whole(tmp_path):
    path = tmp_path / "folder"
    with durable.folder(path) as aside:
        for name in "abc":
            (aside / name).write_text("0" * 1000)
    rng = random.Random(2)
    for _ in range(10):
        killed(EXCHANGES, path, rng.uniform(0, 0.1))
        texts = {(path / name).read_text() for name in "abc"}
        assert sorted(entry.name for entry in path.iterdir()) == ["a", "b", "c"]
        assert len(texts) == 1
        assert len(texts.pop()) % 1000 == 0
    durable.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_are_files_and_folders_that_were_set_aside(tmp_path):
    (tmp_path / ".file.0123abcd.tmp").touch()
    (tmp_path / ".folder.0123abcd.tmp" / "deep").mkdir(parents=True)
    for name in (".lock", "file.tmp", "kept"):
        (tmp_path / name).touch()
    durable.remove_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "file.tmp", "kept"]


def test_lines_are_appended(tmp_path):
    path = tmp_path / "lines"
    durable.append_line(path, "one")
    durable.append_line(path, "two")
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_torn_line_is_closed_before_the_next(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntw")
    durable.append_line(path, "three")
    assert path.read_bytes() == b"one\ntw\nthree\n"


def test_a_lock_dies_with_its_holder(tmp_path):
    path = tmp_path / "deep" / ".lock"
    path.parent.mkdir()
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline()
        with pytest.raises(TimeoutError), durable.lock(path, timeout=0.1):
            pass
        holder.kill()
    with durable.lock(path, timeout=5):
        pass


def test_space_is_asked_for_before_the_work(tmp_path):
    path = tmp_path / "not" / "there" / "yet"
    free = durable.free_bytes(path)
    durable.require_space(path, free // 2, "a thing")
    with pytest.raises(InputError, match=r"no disk space for a thing: [\d,]+ bytes needed, [\d,]+"):
        durable.require_space(path, 2 * free, "a thing")
