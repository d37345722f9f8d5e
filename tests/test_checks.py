"""Static checks: every fault at once, and nothing is loaded."""

from __future__ import annotations

import shutil

import pytest

from kdframe import checks
from kdframe.checks import Guard
from kdframe.errors import InputError
from kdframe.experiment import Data, Experiment
from kdframe.runs import RunFolder


@pytest.fixture
def experiment(tmp_path, teacher_folder, student_folder) -> Experiment:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a b c"}\n')
    return Experiment(
        name="e",
        teacher=str(teacher_folder),
        student=str(student_folder),
        data=Data(train=str(rows)),
    )


def evidence(guards: list[Guard], level: str) -> str:
    return "\n".join(guard.evidence for guard in guards if guard.level == level)


def test_a_sound_experiment_has_no_guards(experiment, tmp_path):
    assert checks.static(experiment, tmp_path / "runs") == []
    checks.require_static(experiment, tmp_path / "runs")


def test_faults_of_data_models_and_run_are_told_together(experiment, tmp_path):
    RunFolder(experiment, tmp_path / "runs").finish("cache", {}, 0)
    broken = experiment.with_(
        {
            "data.train.0.path": "/no/rows.jsonl",
            "data.test": {"far": {"path": "/no/far.jsonl"}},
            "teacher.model": "/no/teacher",
            "data.transforms": ["no_such_module:change"],
        }
    )
    guards = checks.static(broken, tmp_path / "runs")
    errors = evidence(guards, "error")
    for begins in ("data.train.0: ", "data.test.far: ", "teacher.model: ", "no_such_module"):
        assert begins in errors
    assert "belongs to an experiment with other settings" in errors
    with pytest.raises(InputError) as caught:
        checks.require_static(broken, tmp_path / "runs")
    assert len(caught.value.faults) == len(guards)


def test_an_evaluator_that_is_wished_for_and_absent_is_a_warning(experiment, tmp_path):
    wishing = experiment.with_({"evaluation.when_available": ["mmlu_subset"]})
    (guard,) = checks.static(wishing, tmp_path / "runs")
    assert guard.level == "warning"
    assert "'mmlu_subset'" in guard.evidence
    assert "pip install" in guard.remedy
    checks.require_static(wishing, tmp_path / "runs")


def test_folders_that_cannot_be_written_are_named_by_their_option(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    (guard,) = checks.folders(caches=taken, runs=tmp_path)
    assert guard.evidence.startswith(f"--caches {taken}: ")


def test_warnings_are_not_refused():
    checks.refuse([Guard("x", "warning", "careful")])
    with pytest.raises(InputError, match="wrong"):
        checks.refuse([Guard("x", "warning", "careful"), Guard("y", "error", "wrong")])


def test_the_weights_of_a_teacher_whose_predictions_are_imported_are_not_missed(
    experiment, tmp_path
):
    """Unless the student is cut from them."""
    bare = tmp_path / "bare"
    shutil.copytree(experiment.teacher.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    without = experiment.with_({"teacher.model": str(bare)})
    assert "holds no weights" in evidence(checks.inputs(without), "error")
    imported = without.with_({"cache.imported": "served"})
    assert checks.inputs(imported) == []
    cut = {"student": {"from_teacher": {"layers": 1}}}
    assert "holds no weights" in evidence(checks.inputs(imported.with_(cut)), "error")
