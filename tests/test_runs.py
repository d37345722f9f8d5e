"""A run's folder: who owns it, and what it was made with."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kdframe import runs
from kdframe.errors import DamagedError, InputError, Interrupted
from kdframe.experiment import Data, Experiment
from kdframe.runs import RunFolder, refuse_other


@pytest.fixture
def experiment() -> Experiment:
    return Experiment(name="e", teacher="a/b", student="a/c", data=Data(train="/rows.jsonl"))


@pytest.fixture
def begun(experiment, tmp_path) -> RunFolder:
    """A run that has finished a stage."""
    folder = RunFolder(experiment, tmp_path)
    folder.finish("cache", {"rows": 3}, 0.5)
    return folder


def refusal(experiment: Experiment, folder: Path, **more: str) -> str:
    with pytest.raises(InputError) as caught:
        refuse_other(experiment, folder, **more)
    return str(caught.value)


def test_what_is_done_is_known_after_a_restart(begun, experiment, tmp_path):
    again = RunFolder(experiment, tmp_path)
    assert again.done("cache") == {"rows": 3}
    assert again.done("train") is None
    assert again.manifest["seconds"] == {"cache": 0.5}


def test_the_manifest_tells_what_the_run_was_made_with(begun):
    manifest = begun.manifest
    assert manifest["versions"].keys() >= {"kdframe", "torch", "transformers"}
    assert "logit_kd" in {plugin["name"] for plugin in manifest["plugins"]}
    assert manifest["hardware"]["cpus"] >= 1
    assert manifest["seed"] == 0


def test_other_settings_are_refused_by_name_with_a_command_that_works(begun, experiment, tmp_path):
    other = experiment.with_({"loss.alpha": 0.3, "data.train.0.limit": 5})
    said = refusal(other, tmp_path, command="kdframe run e.yaml loss.alpha=0.3")
    assert "loss.alpha was 0.5, now 0.3" in said
    assert "data.train.0.limit was None, now 5" in said
    assert said.endswith("kdframe run e.yaml loss.alpha=0.3 --name e-2")
    (tmp_path / "e-2").mkdir()
    assert refusal(other, tmp_path).endswith("--name e-3")


def test_where_a_run_runs_is_no_other_setting(begun, experiment, tmp_path):
    refuse_other(experiment.with_({"runtime.threads": 1}), tmp_path)


def test_settings_that_came_later_have_their_defaults_in_an_old_run(begun, experiment, tmp_path):
    path = begun.path / "experiment.yaml"
    lines = [line for line in path.read_text().splitlines() if "weight_decay" not in line]
    path.write_text("\n".join(lines))
    refuse_other(experiment, tmp_path)
    other = experiment.with_({"training.weight_decay": 0.1})
    assert "training.weight_decay was 0.0, now 0.1" in refusal(other, tmp_path)


def test_a_run_that_did_nothing_gives_way_to_other_settings(experiment, tmp_path):
    RunFolder(experiment, tmp_path).note(data="old")
    other = RunFolder(experiment.with_({"loss.alpha": 0.3}), tmp_path)
    assert "data" not in other.manifest
    assert "alpha: 0.3" in (other.path / "experiment.yaml").read_text()


def test_a_folder_that_is_no_run_is_left_alone(experiment, tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e/thesis.txt").write_text("years of work")
    assert "not empty, and not a run" in refusal(experiment, tmp_path)
    assert (tmp_path / "e/thesis.txt").exists()


def test_the_folder_of_runs_may_move(begun, experiment, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    begun.path.rename(moved / "e")
    assert RunFolder(experiment, moved).done("cache") == {"rows": 3}


@pytest.mark.parametrize("name", ["manifest.json", "experiment.yaml"])
@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_damaged_file_is_named(begun, experiment, tmp_path, name, text):
    (begun.path / name).write_text(text)
    with pytest.raises(DamagedError, match=f"{name}: damaged"):
        refuse_other(experiment, tmp_path)


def test_a_file_in_the_place_of_the_folder_is_named(experiment, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "--runs" in refusal(experiment, tmp_path / "taken/runs")


def test_a_run_that_another_process_holds_is_waited_for_and_that_is_said(experiment, tmp_path):
    said: list[str] = []
    held = runs.lock(experiment, tmp_path)
    held.acquire()
    waiter = threading.Thread(
        target=runs.wait_for_others, args=(experiment, tmp_path, said.append, lambda: False)
    )
    waiter.start()
    waiter.join(timeout=0.3)
    assert waiter.is_alive()
    assert said == [f"another process works on {tmp_path / 'e'}; waiting until it ends"]
    held.release()
    waiter.join(timeout=10)
    assert not waiter.is_alive()
    assert len(said) == 1


def test_waiting_ends_when_asked(experiment, tmp_path):
    with (
        runs.lock(experiment, tmp_path),
        pytest.raises(Interrupted, match="nothing was begun"),
    ):
        runs.wait_for_others(experiment, tmp_path, lambda line: None, lambda: True)


def test_a_free_run_is_not_waited_for(experiment, tmp_path):
    said: list[str] = []
    runs.wait_for_others(experiment, tmp_path, said.append, lambda: False)
    assert said == []
