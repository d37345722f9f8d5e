"""The commands: what they print, where, how fast, and how they end."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from cli_kit import call, project, spawn, start
from kdframe.api import LossConfig

CPU_SECONDS = 1.0
WRAPPED = """\
import sys
from kdframe.cli import main
try:
    main()
except SystemExit as left:
    print("torch" if "torch" in sys.modules else "light", left.code or 0, file=sys.stderr)
"""


@pytest.fixture
def file(tmp_path, monkeypatch, teacher_folder, student_folder, prose) -> Path:
    """An experiment in the working folder."""
    monkeypatch.chdir(tmp_path)
    return project(tmp_path, teacher_folder, student_folder, prose)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, student_folder, prose) -> Path:
    """A folder in which `e.yaml` was run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    path = project(folder, teacher_folder, student_folder, prose)
    ran = call("run", path, "--runs", folder / "runs", "--caches", folder / "cache", "-q")
    assert ran.code == 0, ran.err
    return folder


@pytest.fixture
def done(finished, monkeypatch) -> Path:
    """The finished folder, as the working folder."""
    monkeypatch.chdir(finished)
    return finished


# ------------------------------------------------------------------------------------- at once
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("plugins list", 0),
        ("plugins show logit_kd", 0),
        ("schema", 0),
        ("check --static e.yaml", 0),
        ("check e.yaml data.train=nothing.jsonl", 2),
        ("plan e.yaml data.train=nothing.jsonl", 2),
        ("run e.yaml loss.alpha=3", 2),
        ("run e.yaml teacher=./nowhere", 2),
        ("train --config e.yaml loss.kind=nope", 2),
        ("cache --teacher ./nowhere --dataset rows.jsonl --output out", 2),
        ("export nowhere", 2),
    ],
)
def test_what_needs_no_model_answers_at_once_without_torch(file, words, code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", WRAPPED, *words.split()],
        check=False,
        cwd=file.parent,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.stderr.splitlines()[-1] == f"light {code}", ended.stderr
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu < CPU_SECONDS


# ------------------------------------------------------------------------------- what is typed
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run", "Missing argument 'experiment'"),
        ("run .", "is a folder; name the experiment's file; did you mean e.yaml?"),
        ("run no.yaml", "no.yaml: no such file"),
        ("run e.yaml --name a/b", "--name 'a/b': letters, digits, '.', '_' and '-'"),
        ("run e.yaml loss.alpha", "'loss.alpha': an override is written as dotted.path="),
        ("run e.yaml alpha=0.3", "alpha=0.3: there is no such setting; did you mean 'loss"),
        ("run e.yaml --runs rows.jsonl", "rows.jsonl is a file; name a folder"),
        ("run e.yaml --caches rows.jsonl", "--caches rows.jsonl: "),
        ("runn e.yaml", "No such command 'runn'"),
        ("train", "train: name an experiment: kdframe train EXPERIMENT"),
        ("evaluate .", ".: is a folder"),
        ("export", "export: name a saved student or a run"),
        ("export nowhere", "export nowhere: no such folder"),
        ("export .", "export .: not a saved model (no config.json)"),
        ("cache --teacher A", "cache: --dataset, --output missing"),
        ("cache e.yaml --teacher A", "an experiment, or --teacher, not both"),
        ("cache verify no.yaml", "no.yaml: no such file"),
        ("plugins show nope", "no part 'nope' is installed; there are: adaptive_kl, agreement"),
    ],
)
def test_a_slip_gets_one_clear_message_and_exit_code_2(file, words, message):
    ended = call(*words.split())
    assert ended.code == 2
    assert message in " ".join(ended.err.split())
    assert ended.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to nope", "export --to nope: no exporter of kind 'nope' is installed (install"),
        ("--quantize int4", "export --quantize int4: "),
        ("--quantize int4 --output f.zip", "no exporter of kind 'zip' is installed"),
        ("--output f.zip", "export --to zip: no exporter of kind 'zip' is installed"),
    ],
)
def test_an_export_that_nothing_can_write_says_what_is_installed(student_folder, words, message):
    ended = call("export", student_folder, *words.split())
    assert ended.code == 2
    assert message in ended.err


def test_the_version_and_the_help_are_results():
    import kdframe

    assert call("--version").out.strip() == kdframe.__version__
    assert "Distil a language model" in call("-h").out
    assert call().code == 2  # no command: the help, and a failure


# ------------------------------------------------------------------------------ guide's flags
def test_the_guides_commands_work_as_they_are_written(file, student_folder):
    teacher = next(line for line in file.read_text().splitlines() if line.startswith("teacher"))
    out = file.parent / "logits"
    filled = call(
        *("cache", "--teacher", teacher.split()[1], "--dataset", "rows.jsonl", "--output", out)
    )
    assert filled.code == 0, filled.err
    assert f"in {out}" in filled.out
    assert (out / "manifest.json").exists()
    trained = call("train", "--config", file, "training.max_steps=2")
    assert trained.code == 0, trained.err
    assert (file.parent / "runs/e/student/model.safetensors").exists()
    exported = call("export", "--model", student_folder, "--output", "shipped")
    assert exported.code == 0, exported.err
    assert "hf: verified" in exported.out
    assert (file.parent / "shipped/hf/model.safetensors").exists()


# -------------------------------------------------------------------------------------- output
def test_a_run_prints_the_figures_and_where_the_student_is(done):
    again = call("run", "e.yaml")
    assert again.code == 0
    for word in ("validation", "perplexity", "student before", "better", "runs/e/student"):
        assert word in again.out
    assert "everything is done" in again.err


def test_a_run_begins_by_saying_what_alpha_weighs(done):
    said = call("run", "e.yaml").err
    assert "alpha 0.2: 20 % hard labels, 80 % the teacher's predictions at temperature 2" in said


def test_a_loss_that_does_not_describe_itself_is_told_by_kind_and_settings():
    class Quadratic(LossConfig):
        """A loss."""

        kind: Literal["quadratic"] = "quadratic"
        scale: float = 2.0

    assert Quadratic().describe() == "quadratic, scale 2.0"


def test_quiet_prints_results_only(done):
    quiet = call("run", "e.yaml", "-q")
    assert quiet.err == ""
    assert "perplexity" in quiet.out


def test_check_prints_the_costs_beside_those_of_the_other_codecs(done):
    checked = call("check", "e.yaml")
    assert checked.code == 0, checked.err
    assert "no faults found" in checked.out
    assert "teacher cache with codec dense: " in checked.out
    topk = next(line for line in checked.out.splitlines() if "codec topk" in line)
    assert topk.endswith("(this experiment)")
    assert "time: about " in checked.out


def test_check_as_json_is_guards_and_estimate(done):
    static = call("check", "--static", "e.yaml", "--json").plain
    assert static == {"guards": [], "estimate": None}
    estimate = call("check", "e.yaml", "--json").plain["estimate"]
    assert {"tokens", "cache_bytes", "peak_memory_bytes", "seconds"} <= estimate.keys()
    faulty = call("check", "e.yaml", "--json", "loss.alpha=3", "training.epochs=0")
    assert faulty.code == 2
    assert [guard["level"] for guard in faulty.plain["guards"]] == ["error", "error"]
    assert faulty.plain["guards"][0].keys() == {"name", "level", "evidence", "remedy"}


def test_figures_as_json(done):
    ran = call("run", "e.yaml", "--json").plain
    assert ran["folder"] == str(done / "runs/e")
    figures = ran["sets"]["validation"]["loss"]
    assert {"teacher", "student_before", "student", "better"} <= figures.keys()
    assert call("evaluate", "e.yaml", "--json").plain["sets"] == ran["sets"]
    (report,) = call("export", "runs/e", "--output", "again", "--json").plain
    assert report["kind"] == "hf"
    assert report["status"] == "verified"
    assert {"files", "bytes", "metrics", "tokens_equal", "types"} <= report.keys()


def test_the_cache_as_json(done):
    info = call("cache", "info", "e.yaml", "--json").plain
    assert info["rows"] > 0
    verified = call("cache", "verify", "e.yaml", "--json").plain
    assert verified["rows"] == info["rows"]
    assert verified["bad"] == []
    assert call("cache", "e.yaml", "--json").plain["computed"]["rows"] == 0


def test_nothing_but_the_json_is_on_standard_output(done):
    Path("loud.py").write_text(
        "import kdframe\nprint('loud')\nexperiment = kdframe.load('e.yaml')\n"
    )
    assert call("run", "loud.py", "--json").plain["folder"] == str(done / "runs/e")


# --------------------------------------------------------------------------------- exit codes
def test_a_damaged_row_is_found_and_it_alone_is_computed_again(done, tmp_path):
    caches = tmp_path / "cache"
    shutil.copytree("cache", caches)
    shard = max(caches.glob("*/shard-*.bin"), key=lambda path: path.stat().st_size)
    with open(shard, "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        (last,) = handle.read(1)
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last ^ 1]))
    verify = ("cache", "verify", "e.yaml", "--caches", caches)
    found = call(*verify)
    assert found.code == 3
    assert "1 damaged" in found.out
    assert shard.name in found.out
    (bad,) = call(*verify, "--json").plain["bad"]
    assert bad.keys() == {"row", "shard", "reason"}
    repaired = call(*verify, "--repair")
    assert repaired.code == 0
    assert "(computed again)" in repaired.out
    again = call(*verify)
    assert again.code == 0
    assert "0 damaged" in again.out


def test_an_interrupted_run_goes_on_where_it_stopped(file):
    words = ("run", file, "training.epochs=80", "training.eval_steps=10000")
    running = start(*words, folder=file.parent)
    log = file.parent / "runs/e/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "stopped after step" in err
    step = int(err.split("stopped after step ")[1].split(";")[0])
    ended = call(*words)
    assert ended.code == 0, ended.err
    assert f"going on from step {step}" in ended.err
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_second_process_says_that_it_waits_for_the_first(file):
    import kdframe
    from kdframe import runs

    experiment = kdframe.load(file)
    with runs.lock(experiment, file.parent / "runs"):
        second = start("run", file, folder=file.parent)
        assert second.stderr is not None
        said = iter(second.stderr.readline, "")
        assert any("another process works on runs/e; waiting" in line for line in said)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert "perplexity" in out


def test_the_runs_own_file_repeats_the_run(done):
    again = call("run", "runs/e/experiment.yaml")
    assert again.code == 0
    assert "everything is done" in again.err


# ------------------------------------------------------------------------------------- plugins
def install(folder: Path, name: str, code: str) -> None:
    """A distribution that registers one plugin."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"kdframe_{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kdframe-{name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[kdframe]\n{name} = {name}\n")


NEEDY = """\
from typing import Literal
from kdframe.api import LossConfig, hookimpl

class Needy(LossConfig):
    \"\"\"Needs a package.\"\"\"
    kind: Literal["needy"] = "needy"
    requires = ("no_such_package.inside",)
    install = "pip install 'kdframe[needy]'"

@hookimpl
def kdframe_losses():
    return (Needy,)
"""


def test_broken_and_unavailable_plugins_are_listed_with_what_mends_them(tmp_path, file):
    install(tmp_path, "broken", "import no_such_module\n")
    install(tmp_path, "needy", NEEDY)
    path = {"PYTHONPATH": str(tmp_path)}
    listed = spawn("plugins", "list", "--json", folder=tmp_path, **path)
    rows = {row["kind"]: row for row in listed.plain}
    assert rows["logit_kd"]["available"] is True
    assert rows["broken"]["available"] is False
    assert "No module named 'no_such_module'" in rows["broken"]["reason"]
    assert rows["needy"]["reason"].endswith("pip install 'kdframe[needy]'")
    assert rows["needy"].keys() == {
        *("slot", "kind", "distribution", "version", "available", "reason")
    }
    printed = spawn("plugins", "list", folder=tmp_path, **path).out
    assert "pip install 'kdframe[needy]'" in printed
    assert "kdframe[needy]" in spawn("plugins", "show", "needy", folder=tmp_path, **path).out
    shown = spawn("plugins", "show", "broken", folder=tmp_path, **path)
    assert shown.code == 2
    assert "plugin broken (kdframe-broken 1.2) could not be loaded" in shown.err
    refused = spawn("run", "e.yaml", "loss={kind: needy}", folder=tmp_path, **path)
    assert refused.code == 2
    assert "pip install 'kdframe[needy]'" in refused.err


def test_only_the_plugins_that_are_asked_for_are_loaded(monkeypatch):
    monkeypatch.setenv("KDFRAME_PLUGINS", "codecs")
    listed = call("plugins", "list", "--json").plain
    assert {row["slot"] for row in listed} == {"codec"}
    assert {row["kind"] for row in listed} >= {"dense", "topk"}
    monkeypatch.setenv("KDFRAME_PLUGINS", "")
    assert call("plugins", "list", "--json").plain == []
    monkeypatch.setenv("KDFRAME_PLUGINS", "nobody")
    refused = call("plugins", "list")
    assert refused.code == 2
    assert "nobody: no such plugin; installed: " in refused.err


def test_a_parts_settings_are_shown_with_bounds_and_defaults():
    shown = call("plugins", "show", "logit_kd").out
    assert "number from 0 to 1" in shown
    assert "0.5" in shown
    properties = call("plugins", "show", "logit_kd", "--json").plain["properties"]
    assert properties["alpha"]["anyOf"][0]["maximum"] == 1
