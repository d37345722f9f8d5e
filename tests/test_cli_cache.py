"""`kdframe cache`: what its commands print, and how they end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli_kit import call, project
from kdframe import reading
from kdframe.materials import Materials
from kdframe.progress import Quiet
from tests import logprob_kit
from tests.logprob_kit import write_lines
from tests.run_kit import load

IMPORTED = ("cache.imported=served", "cache.codec.kind=topk", "cache.codec.k=8")
AT_ONE = ("cache.codec.temperatures=[1]", "loss.temperature=1")


@pytest.fixture
def file(tmp_path, monkeypatch, teacher_folder, student_folder, prose) -> Path:
    """An experiment in the working folder."""
    monkeypatch.chdir(tmp_path)
    return project(tmp_path, teacher_folder, student_folder, prose)


@pytest.fixture
def filled(file) -> Path:
    """The experiment's cache is there."""
    assert call("cache", "e.yaml", "-q").code == 0
    return next(Path("cache").glob("*/manifest.json")).parent


# --------------------------------------------------------------------------------------- verify
def test_verify_says_how_far_the_teacher_is_from_what_is_stored(filled):
    found = call("cache", "verify", "e.yaml")
    assert found.code == 0, found.err
    assert "24 rows read again: the largest difference is " in found.out
    assert "(noise floor " in found.out
    assert "24 rows, 0 damaged" in found.out
    plain = call("cache", "verify", "e.yaml", "--rows", 5, "--json").plain
    assert plain["rows"] == 24
    assert plain["bad"] == []
    assert plain["recomputed"].keys() == {"rows", "noise", "step", "limit", "largest"}
    assert plain["recomputed"]["rows"] == 5
    assert plain["recomputed"]["largest"]["log_prob"] < plain["recomputed"]["limit"]["log_prob"]


def test_verify_without_rows_needs_no_teacher(filled, teacher_folder):
    """Its checksums are looked at all the same."""
    found = call("cache", "verify", "e.yaml", "--rows", 0)
    assert (found.code, "read again" in found.out) == (0, False)


def test_verify_and_repair_find_a_cache_whose_rows_were_exchanged(filled):
    """Written with right checksums: the teacher alone can tell."""
    experiment = reading.load(Path("e.yaml"), ())
    store = Materials(experiment, Path("cache"), Quiet()).store
    one, other = store.cache.stored()[:2]
    size = min(len(one.positions), len(other.positions))
    records = [store.cache.read([row]).copy() for row in (one, other)]
    first = records[0][:size].copy()
    records[0][:size] = records[1][:size]
    records[1][:size] = first
    shutil.move(filled, "true")
    false = Materials(experiment, Path("cache"), Quiet()).store
    false.cache.write([one, other], records)
    assert call("cache", "merge", "e.yaml", "true", "-q").code == 0
    found = call("cache", "verify", "e.yaml", "--json")
    assert found.code == 3
    assert {bad["row"] for bad in found.plain["bad"]} == {one.key.hex(), other.key.hex()}
    repaired = call("cache", "verify", "e.yaml", "--repair")
    assert repaired.code == 0
    assert "says something else" in repaired.out
    assert "(computed again)" in repaired.out
    assert call("cache", "verify", "e.yaml").code == 0


# ---------------------------------------------------------------------------------------- info
def test_info_says_what_the_cache_is_in_words(filled):
    shown = call("cache", "info", "e.yaml").out
    for words in (
        "codec: topk (k 64, temperatures [1.0, ",
        "teacher weights: ",
        "rows: 24\n",
        "bytes per position: ",
        "bytes: ",
        " kB\n",
    ):
        assert words in shown


# ------------------------------------------------------------------------------ missing, import
def test_what_is_missing_goes_out_and_comes_back_with_predictions(file, teacher_folder):
    settings = (*IMPORTED, *AT_ONE)
    assert call("cache", "missing", "e.yaml", *settings, "--output", "wanted.jsonl").code == 0
    wanted = [json.loads(line) for line in Path("wanted.jsonl").read_text().splitlines()]
    assert len(wanted) == 24
    assert wanted[0].keys() == {"row", "input_ids", "positions"}
    teacher = load(teacher_folder)
    answers = [logprob_kit.vllm(teacher, row["input_ids"], 8) for row in wanted]
    write_lines(Path("some.jsonl"), answers[:10])
    write_lines(Path("rest.jsonl"), answers[10:])
    some = call("cache", "import", "e.yaml", "some.jsonl", *settings)
    assert some.code == 0, some.err
    assert "imported: 10 rows, " in some.out
    assert "still missing: 14" in some.out
    stopped = call("train", "e.yaml", *settings)
    assert stopped.code == 2
    assert "the imported predictions lack 14 rows" in stopped.err
    rest = call("cache", "import", "e.yaml", "rest.jsonl", *settings, "--json").plain
    assert (rest["rows"], rest["missing"]) == (14, 0)
    assert call("cache", "missing", "e.yaml", *settings).out == ""
    trained = call("train", "e.yaml", *settings, "-q")
    assert trained.code == 0, trained.err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("a.jsonl", "cache.imported: name the teacher"),
        ("cache.imported=x", "name a .jsonl or .parquet file"),
        ("a.jsonl cache.imported=x", "set cache.codec.temperatures to [1.0]"),
        ("a.csv cache.imported=x cache.codec.temperatures=[1] loss.temperature=1", "ending '.csv'"),
        ("b.jsonl cache.imported=x cache.codec.temperatures=[1] loss.temperature=1", "b.jsonl: no"),
        ("a.jsonl cache.imported=x cache.codec.temperatures=[1] loss.temperature=1", "a.jsonl:1: "),
    ],
)
def test_what_cannot_be_imported_is_said(file, words, fault):
    Path("a.jsonl").write_text("{}\n")
    refused = call("cache", "import", "e.yaml", *words.split())
    assert refused.code == 2
    assert fault in refused.err


# --------------------------------------------------------------------------------------- merge
def test_merge_says_what_it_did(filled):
    shutil.copytree("cache", "elsewhere")
    (folder,) = Path("elsewhere").iterdir()
    merged = call("cache", "merge", "e.yaml", folder, "--caches", "new")
    assert merged.code == 0, merged.err
    assert f"{folder}: 24 rows copied, 0 already there, 0 damaged" in merged.out
    (again,) = call("cache", "merge", "e.yaml", folder, "--caches", "new", "--json").plain
    assert (again["copied"], again["already"], again["damaged"]) == (0, 24, [])


def test_merge_ends_with_3_where_a_row_is_damaged(filled):
    shard = max(filled.glob("shard-*.bin"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    merged = call("cache", "merge", "e.yaml", filled, "--caches", "new")
    assert merged.code == 3
    assert "23 rows copied, 0 already there, 1 damaged" in merged.out
    assert f"{shard.name}: row " in merged.out
    assert "(not copied)" in merged.out


def test_merge_refuses_another_teachers_cache(filled):
    refused = call("cache", "merge", "e.yaml", filled, "cache.codec.k=8")
    assert refused.code == 2
    assert "holds another codec" in refused.err
