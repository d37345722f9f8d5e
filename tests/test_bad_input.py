"""What a user gets wrong: one clear error for every fault, before any model is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli_kit import call, project


@pytest.fixture
def file(tmp_path, monkeypatch, teacher_folder, student_folder, prose) -> Path:
    """An experiment in the working folder, whose models' weights cannot be loaded."""
    monkeypatch.chdir(tmp_path)
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(teacher_folder, teacher)
    shutil.copytree(student_folder, student)
    for model in (teacher, student):
        (model / "model.safetensors").write_bytes(b"not weights")
    return project(tmp_path, teacher, student, prose)


def refused(*words: object) -> str:
    """What `kdframe run` says before it exits with code 2, having loaded no model."""
    ended = call("run", *words)
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert "load teacher" not in ended.err
    assert "cannot be loaded" not in ended.err
    assert not Path("runs/e/student").exists()
    return ended.err


def changed(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def rows(*lines: str) -> None:
    Path("rows.jsonl").write_text("".join(line + "\n" for line in lines))


# ----------------------------------------------------------------------------------- settings
def test_every_fault_of_a_file_is_told_at_once(file):
    changed(file, "alpha: 0.2", "alhpa: 0.2")
    changed(file, "epochs: 1", "epochs: 0")
    changed(file, "[hf]", "[gguff]")
    said = refused(file, "data.max_length=1").splitlines()
    assert len(said) == 4
    text = "\n".join(said)
    assert "e.yaml:4:24 loss.alhpa: there is no such setting; did you mean 'alpha'?" in text
    assert "e.yaml:5:12 training.epochs: Input should be greater than 0 (given: 0)" in text
    assert "e.yaml:6:10 export.0: no exporter of kind 'gguff' is installed (installed: hf" in text
    assert "data.max_length=1: Input should be greater than or equal to 2 (given: 1)" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "e.yaml: an experiment is a mapping of settings"),
        ("", "e.yaml: an experiment is a mapping of settings"),
        ("teacher: [a\n", "e.yaml:2:1: expected"),
        ("teacher: a\nx: \x01\n", "e.yaml: not YAML: unacceptable character"),
        ("teacher: a\n? [b, c]\n: d\n", "e.yaml: a setting's name must be a word"),
        ("teacher: " + "[" * 900, "e.yaml: nested too deeply"),
        ("&all\nteacher: *all\n", "or holds itself through an alias"),
        ("teacher: a\n", "e.yaml: student: is missing; it must be given"),
        ("evaluation: {when_available: [[1]]}\n", "evaluation.when_available.0: "),
        ("evaluation: {evaluators: 3, when_available: [perplexity]}\n", "must be a list (given: 3"),
    ],
)
def test_a_file_that_is_no_experiment_says_where(file, text, message):
    file.write_text(text)
    assert message in refused(file)


def test_bytes_that_are_no_text_are_not_yaml(file):
    file.write_bytes(b"teacher: \xff\n")
    assert "e.yaml: not YAML: " in refused(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.alpha", "an override is written as dotted.path=value"),
        ("=3", "an override is written as dotted.path=value"),
        ("loss.alpha=[", "'loss.alpha=[': the value is not YAML: expected"),
        ("loss.alpha=", "loss.alpha=None: Input should be a valid number"),
        ("data.train.limit=5", "a part of the path is a list; name one of its entries by its n"),
        ("data.train.7.limit=5", "a part of the path is a list"),
        ("cache.codec={kind: topk, k: 0}", "cache.codec.k: Input should be greater than 0"),
        ("loss.kind=rkd", "no loss of kind 'rkd' is installed (installed: adaptive_kl, "),
        ("loss.temperature=9", "codec 'topk' does not serve temperature 9 of loss 'logit_kd'"),
    ],
)
def test_an_override_is_named_as_it_was_typed(file, override, message):
    assert message in refused(file, override)


def test_an_override_reaches_below_what_the_file_writes_short_or_leaves_out(file):
    short = ("data.train.0.limit=5", "cache.codec.k=8", "training.seed=3")
    assert call("check", "--static", file, *short).code == 0


def test_a_python_file_that_fails_is_named_with_its_line(file):
    Path("e.py").write_text("import kdframe\n\nexperiment = 1 / 0\n")
    assert refused("e.py").strip() == "e.py:3: ZeroDivisionError: division by zero"
    Path("e.py").write_text("experiment = (\n")
    assert "e.py:1: SyntaxError: '(' was never closed" in refused("e.py")


# --------------------------------------------------------------------------------------- data
def test_every_missing_file_is_named(file):
    said = refused(file, "data.train=no.jsonl", "teacher=./nobody", "student=./nothing")
    assert "no.jsonl: no such file or folder; mend `path`" in said
    assert "teacher.model: model" in said
    assert "student.model: model" in said


def test_a_missing_column_is_named_beside_those_that_are_there(file):
    rows('{"body": "a text"}')
    assert "rows.jsonl:1: has neither text, nor messages" in refused(file)
    said = refused(file, "data.train={path: rows.jsonl, columns: {text: story}}")
    assert "no column 'story' (there are: body)" in said


def test_a_missing_split_is_named_beside_those_that_are_there(file):
    import datasets

    made = datasets.Dataset.from_list([{"text": "a b c"}])
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk("saved")
    said = refused(file, "data.train={path: saved, split: dev}")
    assert "no split 'dev' (there are: train, test); mend `split`" in said


def test_every_unreadable_row_is_named_by_file_and_line(file):
    rows('{"text": "fine"}', "not JSON", '{"text": 3}')
    said = refused(file)
    assert f"{file.parent / 'rows.jsonl'}:2: " in said
    assert f"{file.parent / 'rows.jsonl'}:3: text is 3; it must be a string" in said


# ------------------------------------------------------------------------------------- models
def other_tokenizer(folder: Path) -> list[int]:
    """Exchange two tokens of a saved tokenizer; their ids."""
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    vocab = whole["model"]["vocab"]
    one, other = list(vocab)[10:12]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(whole))
    return sorted((vocab[one], vocab[other]))


@pytest.mark.parametrize("verb", ["run", "check"])
def test_tokenizers_that_differ_are_refused_with_the_first_ids(file, verb):
    one, other = other_tokenizer(file.parent / "student")
    ended = call(verb, file)
    assert ended.code == 2
    assert f"teacher and student tokenizers differ: id {one} is b" in ended.err
    assert f"; id {other} is b" in ended.err
    assert "load teacher" not in ended.err


def test_a_mended_experiment_takes_the_name_of_one_that_had_done_nothing(
    file, teacher_folder, student_folder
):
    other_tokenizer(file.parent / "student")
    assert call("run", file).code == 2
    again = call("run", file, f"teacher={teacher_folder}", f"student={student_folder}")
    assert again.code == 0, again.err


# --------------------------------------------------------------------------------------- disk
@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_cache_that_does_not_fit_is_refused_before_the_teacher_is_loaded(file, small_disk):
    said = refused(file, "cache.codec.kind=dense", "--caches", small_disk)
    assert "no disk space for the teacher cache: " in said
    figures = re.search(r"([\d,]+) bytes needed, ([\d,]+) free", said)
    assert figures is not None
    needed, free = (int(figure.replace(",", "")) for figure in figures.groups())
    assert needed > 256 * 1024 > free


def test_a_full_disk_is_named_without_a_traceback(file, small_disk):
    (small_disk / "full").write_bytes(bytes(256 * 1024))
    ended = call("run", file, "--caches", small_disk)
    assert ended.code in (2, 3)
    assert "space" in ended.err
    assert "Traceback" not in ended.err
