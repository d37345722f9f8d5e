"""The guide's template: its keys, its faults, and that it runs as it is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_kit import call
from kdframe.template import is_template, translate
from test_reading import TEMPLATE
from tests.conftest import PROSE, make_llama

SMALL = {
    "teacher_model": "a/b",
    "student_model": "a/c",
    "hyperparameters": {"alpha": 0.4},
    "data": {"dataset_path": "rows"},
}


def faults(**changes: object) -> list[str]:
    return translate({"distillation_config": SMALL | changes}, name="e")[2]


def test_the_root_key_makes_a_template():
    assert is_template({"distillation_config": None})
    assert not is_template({"teacher": "a/b"})


def test_sections_may_be_nested_or_stand_flat_and_empty():
    nested = translate({"distillation_config": SMALL}, name="e")
    flat = {"distillation_config": None, "hyperparameters": None, "data": None}
    flat |= {"teacher_model": "a/b", "student_model": "a/c", "alpha": 0.4, "dataset_path": "rows"}
    assert translate(flat, name="e") == nested
    experiment, origin, found = nested
    assert experiment["loss"] == {"kind": "logit_kd", "alpha": 0.4}
    assert experiment["data"] == {"train": "rows"}
    assert origin["loss.alpha"] == "alpha"
    assert found == []


@pytest.mark.parametrize(
    ("fp16", "bf16", "precision"),
    [(True, False, "float16"), (False, True, "bfloat16"), (False, False, "float32")],
)
def test_precision_is_what_the_two_switches_say(fp16, bf16, precision):
    experiment, _, found = translate(SMALL | {"fp16": fp16, "bf16": bf16}, name="e")
    assert experiment["training"]["precision"] == precision
    assert found == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"fp16": True, "bf16": True}, "fp16: fp16 and bf16 are both true"),
        ({"fp16": "yes"}, "fp16: must be true or false, not 'yes'"),
        ({"optimizer": "sgd"}, "optimizer: 'sgd' is not there; kdframe trains with 'adamw_torch'"),
        ({"optimiser": "sgd"}, "optimiser: the distillation_config template has no such key; did"),
        ({"quux": 1}, "quux: the distillation_config template has no such key; it has: alpha, "),
        ({"training": 3}, "training: is a section, not a value (3)"),
        ({"training": {"alpha": 1}}, "alpha: is given twice; keep one"),
        ({"data": None}, "dataset_path: is missing; it must be given"),
    ],
)
def test_each_fault_begins_with_the_templates_own_key(changes, fault):
    (found,) = faults(**changes)
    assert found.startswith(fault)


def test_all_faults_are_told_with_those_of_the_values(tmp_path):
    path = tmp_path / "guide.yaml"
    changed = {"bf16: false": "bf16: true", "alpha: 0.4": "alpha: 4", "scheduler": "schedule"}
    text = TEMPLATE
    for old, new in changed.items():
        text = text.replace(old, new)
    path.write_text(text)
    said = call("run", path)
    assert said.code == 2
    lines = said.err.splitlines()
    assert len(lines) == 3
    assert any(line.startswith(f"{path}:20:1 fp16: ") for line in lines)
    assert any(line.startswith(f"{path}:6:1 alpha: ") for line in lines)
    assert any("schedule: " in line and "did you mean 'scheduler'?" in line for line in lines)


@pytest.fixture(scope="module")
def guide(tmp_path_factory, tokenizer) -> Path:
    """The guide's template, and beside it tiny models and data under the names it uses."""
    import datasets

    folder = tmp_path_factory.mktemp("guide")
    models = folder / "meta-llama"
    make_llama(models / "Meta-Llama-3-70B-Instruct", tokenizer, layers=2, hidden=32, seed=1)
    make_llama(models / "Meta-Llama-3-8B-Instruct", tokenizer, layers=1, hidden=16, seed=2)
    words = PROSE.split()
    rows = [{"text": " ".join(words[i : i + 30])} for i in range(60)]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "path/to/instruction/dataset")
    (folder / "guide.yaml").write_text(TEMPLATE)
    return folder


def test_the_guides_template_runs_as_it_is_printed(guide, monkeypatch):
    monkeypatch.chdir(guide)
    ran = call("run", "guide.yaml")
    assert ran.code == 0, ran.err
    assert "alpha 0.4: 40 % hard labels, 60 % the teacher's predictions at temperature 3" in ran.err
    assert "mmlu_subset: unavailable: " in ran.out
    run = guide / "runs/guide"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["unavailable"].keys() == {"mmlu_subset"}
    assert evaluation["sets"]["validation"]["perplexity"].keys() >= {"teacher", "student"}
    assert (guide / "cache/teacher_logits/manifest.json").exists()
    assert (run / "student/model.safetensors").exists()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] <= 6 for line in lines)


def test_checking_it_prints_the_size_of_the_whole_distribution_beside_topks(guide, monkeypatch):
    monkeypatch.chdir(guide)
    checked = call("check", "guide.yaml", "--runs", "other")
    assert checked.code == 0, checked.err
    assert "warning: evaluation: no evaluator of kind 'mmlu_subset' can run here" in checked.out
    dense = next(line for line in checked.out.splitlines() if "codec dense" in line)
    assert dense.endswith("(this experiment)")
    assert "teacher cache with codec topk: " in checked.out
    sizes = call("check", "guide.yaml", "--runs", "other", "--json").plain["estimate"]
    assert sizes["cache_bytes_by_codec"]["dense"] > sizes["cache_bytes_by_codec"]["topk"]
