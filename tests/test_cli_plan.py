"""`kdframe plan`: what it prints, and how it ends."""

import os
from pathlib import Path

import pytest

import kdframe
from cli_kit import call, project, spawn
from kdframe import cli_plan
from kdframe_codecs import Sampled
from tests.codec_kit import States

STRANGER = """\
from typing import Literal
from kdframe.api import CodecConfig, hookimpl

class Sized(CodecConfig):
    \"\"\"Its size is for the user to say.\"\"\"
    kind: Literal["sized"] = "sized"
    size: int
    form = "dense"

class Needy(CodecConfig):
    \"\"\"Needs a package.\"\"\"
    kind: Literal["needy"] = "needy"
    form = "dense"
    requires = ("no_such_package",)

@hookimpl
def kdframe_codecs():
    return (Sized, Needy)
"""


@pytest.fixture
def file(tmp_path, monkeypatch, teacher_folder, student_folder, prose) -> Path:
    """An experiment in the working folder."""
    monkeypatch.chdir(tmp_path)
    return project(tmp_path, teacher_folder, student_folder, prose)


def test_a_plan_is_three_tables_and_what_to_do(file):
    planned = call("plan", "e.yaml", "--tokens", "64", "--temperatures", "8", "-q")
    assert planned.code == 0, planned.err
    assert planned.err == ""
    text = " ".join(planned.out.split())
    for words in (
        "positions in all; 64 were measured",
        "read by the loss",
        "topk k=64",
        "gradient error",
        "not usable: topk k=64, topk k=16, topk k=32, topk k=128, topk k=256: codec 'topk' does "
        "not serve temperature 8",
        "a gradient error of at most 0.1 at T = 2",
    ):
        assert words in text
    assert not Path("runs").exists()
    assert not Path("cache").exists()


def test_as_json(file):
    plain = call("plan", "e.yaml", "--tokens", "64", "--tolerance", "1e9", "--json").plain
    assert plain["tolerance"] == 1e9
    assert plain["recommended"]["settings"] == {"k": 16}
    first = plain["rows"][0]
    assert (first["codec"], first["settings"], first["temperature"]) == ("topk", {"k": 64}, 1.0)
    assert first["usable"] is True


def test_what_to_type_is_what_the_command_takes(file):
    advised = call("plan", "e.yaml", "--tokens", "64", "--tolerance", "1e9", "--json").plain
    override = advised["recommended"]["override"].replace("'", "")
    again = call("plan", "e.yaml", override, "--tokens", "64", "--tolerance", "1e9", "-q")
    assert "which the experiment has already" in again.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--temperatures warm", "--temperatures warm: write numbers"),
        ("--temperatures=-1", "temperatures must be above 0"),
        ("--tolerance 0", "must be above 0"),
        ("data.train=nothing.jsonl", "nothing.jsonl"),
        ("teacher=./nowhere", "nowhere"),
        ("loss.temperature=9", "does not serve temperature 9"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(file, words, message):
    refused = call("plan", "e.yaml", *words.split())
    assert refused.code == 2
    assert message in refused.err
    assert "load teacher" not in refused.err
    assert refused.out == ""


def test_a_run_of_that_name_does_not_stand_in_the_way(file):
    Path("runs/e").mkdir(parents=True)
    Path("runs/e/experiment.yaml").write_text("name: e\n")
    assert call("plan", "e.yaml", "--tokens", "16", "-q").code == 0


def test_codecs_that_cannot_be_tried_without_more_words_are_left_out(file, tmp_path):
    (tmp_path / "stranger.py").write_text(STRANGER)
    info = tmp_path / "kdframe_stranger-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kdframe-stranger\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[kdframe]\nstranger = stranger\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    planned = spawn(
        *("plan", "e.yaml", "--tokens", "16", "--json"), folder=tmp_path, PYTHONPATH=path
    )
    assert planned.code == 0, planned.err
    kinds = {row["codec"] for row in planned.plain["rows"]}
    assert kinds >= {"topk", "dense"}
    assert not kinds & {"sized", "needy"}


def test_what_noise_and_fitting_mean_is_told_where_there_are_such_codecs(file, capsys):
    cli_plan.show(kdframe.load(file).plan(tokens=32, codecs=[Sampled(temperature=2.0), States()]))
    text = " ".join(capsys.readouterr().out.split())
    assert "~ draws: their error is noise" in text
    assert "others fitted on" in text
    assert "so they will do better than here" in text
