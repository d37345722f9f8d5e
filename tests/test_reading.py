"""Reading an experiment: every fault at its line, paths relative to the file."""

from pathlib import Path

import pytest

from kdframe import reading
from kdframe.errors import InputError

GOOD = """\
teacher: some/teacher
student: {from_teacher: {layers: 2}}
data:
  train: rows.jsonl
loss: {kind: logit_kd, alpha: 0.3}
training: {learning_rate: 1e-5}
"""

TEMPLATE = """\
distillation_config:
teacher_model: "meta-llama/Meta-Llama-3-70B-Instruct"
student_model: "meta-llama/Meta-Llama-3-8B-Instruct"
hyperparameters:
temperature: 3.0
alpha: 0.4
epochs: 3
learning_rate: 2.0e-5
batch_size: 4
gradient_accumulation_steps: 8
data:
dataset_path: "path/to/instruction/dataset"
max_length: 2048
cache_dir: "./cache/teacher_logits"
cache_precision: "float16"
training:
optimizer: "adamw_torch"
scheduler: "cosine"
warmup_ratio: 0.05
fp16: true
bf16: false
evaluation:
metrics: ["perplexity", "mmlu_subset"]
eval_steps: 100
early_stopping_patience: 3
"""


def write(folder: Path, text: str, name: str = "e.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        reading.load(path, overrides)
    return list(caught.value.faults)


def test_a_number_with_an_exponent_is_a_number_and_the_name_is_the_file(tmp_path):
    experiment = reading.load(write(tmp_path, GOOD))
    assert experiment.training.learning_rate == 1e-5
    assert experiment.name == "e"
    assert experiment.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert experiment.teacher.model == "some/teacher"


def test_every_fault_is_told_at_once_with_line_column_and_a_guess(tmp_path):
    path = write(
        tmp_path,
        """\
teacher: some/teacher
student: {from_teacher: {layers: 2}}
data:
  train: rows.jsonl
  max_len: 5
loss: {kind: logit_kd, temprature: 3, alpha: 1.5}
training: {epochs: three}
evaluation:
  evaluators: [perplexity, mmlu]
""",
    )
    found = faults(path)
    assert len(found) == 5
    text = "\n".join(found)
    assert f"{path}:5:3 data.max_len: there is no such setting; did you mean 'max_length'?" in text
    assert f"{path}:6:24 loss.temprature: there is no such setting; did you mean" in text
    assert f"{path}:6:39 loss.alpha: " in text
    assert "(given: 1.5)" in text
    assert f"{path}:7:12 training.epochs: " in text
    assert f"{path}:9:28 evaluation.evaluators.1: no evaluator of kind 'mmlu' is installed" in text
    assert "(installed: agreement, perplexity)" in text


def test_a_duplicate_key_is_refused_at_its_line(tmp_path):
    (fault,) = faults(write(tmp_path, GOOD + "teacher: another\n"))
    assert "e.yaml:7:1" in fault
    assert "duplicate" in fault


def test_a_tag_runs_nothing_and_an_alias_bomb_is_refused(tmp_path):
    marker = tmp_path / "ran"
    tag = f"teacher: !!python/object/apply:os.system ['touch {marker}']\n"
    faults(write(tmp_path, tag))
    assert not marker.exists()
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    (fault,) = faults(write(tmp_path, bomb))
    assert "aliases" in fault


def test_overrides_are_validated_like_the_file(tmp_path):
    path = write(tmp_path, GOOD)
    experiment = reading.load(path, ["loss.temperature=2.5", "data.max_length=64"])
    assert experiment.loss.model_dump()["temperature"] == 2.5
    assert experiment.data.max_length == 64
    assert faults(path, "loss.alpha=2")[0].startswith("loss.alpha=2: ")
    assert "did you mean 'alpha'" in faults(path, "loss.alhpa=0.2")[0]
    assert "dotted.path=value" in faults(path, "loss.alpha")[0]


def test_a_new_kind_drops_the_old_kinds_settings(tmp_path):
    experiment = reading.load(
        write(tmp_path, GOOD + "cache: {kind: mmap, codec: {kind: topk, k: 8}}\n"),
        ["cache.codec.kind=dense"],
    )
    assert experiment.cache.codec.model_dump() == {"kind": "dense", "precision": "float16"}


def test_the_resolved_file_gives_the_same_experiment(tmp_path):
    experiment = reading.load(write(tmp_path, GOOD))
    again = reading.load(write(tmp_path, reading.dump(experiment), "resolved.yaml"))
    assert again == experiment


def test_a_python_file_defines_experiment(tmp_path):
    path = write(
        tmp_path,
        "from kdframe import Experiment, Data\n"
        "experiment = Experiment(name='p', teacher='a/b', student='a/c', "
        "data=Data(train='rows.jsonl'))\n",
        "e.py",
    )
    assert reading.load(path, ["training.epochs=2"]).training.epochs == 2
    bad = write(tmp_path, "experiment = 3\n", "bad.py")
    assert "must define `experiment`" in faults(bad)[0]


def test_the_guides_template_is_read_as_it_is_printed(tmp_path):
    experiment = reading.load(write(tmp_path, TEMPLATE, "guide.yaml"))
    assert experiment.teacher.model == "meta-llama/Meta-Llama-3-70B-Instruct"
    assert experiment.student.model == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert experiment.loss.model_dump() == {"kind": "logit_kd", "alpha": 0.4, "temperature": 3.0}
    assert experiment.cache.codec.model_dump() == {"kind": "dense", "precision": "float16"}
    assert experiment.cache.model_dump()["folder"] == tmp_path / "cache/teacher_logits"
    assert experiment.training.precision == "float16"
    assert experiment.training.gradient_accumulation_steps == 8
    assert experiment.training.early_stopping_patience == 3
    assert [e.kind for e in experiment.evaluation.evaluators] == ["perplexity"]
    assert experiment.evaluation.when_available == ("mmlu_subset",)
    root, *lines = TEMPLATE.splitlines()
    inside = 0
    nested = [root]
    for line in lines:
        section = line.endswith(":")
        inside = inside or section
        nested.append(("    " if inside and not section else "  ") + line)
    again = reading.load(write(tmp_path, "\n".join(nested), "guide.yaml"))
    assert again == experiment


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bf16: false", "bf16: true", ":20:1 fp16: fp16 and bf16 are both true"),
        ("alpha: 0.4", "alpha: 1.4", ":6:1 alpha: "),
        ("alpha: 0.4", "alhpa: 0.4", ":6:1 alhpa: the distillation_config template has no such"),
        ("adamw_torch", "sgd", ":17:1 optimizer: 'sgd' is not there"),
        ("float16", "int3", ":15:1 cache_precision: "),
    ],
)
def test_a_fault_of_the_template_is_told_by_the_templates_own_key(tmp_path, old, new, message):
    found = "\n".join(faults(write(tmp_path, TEMPLATE.replace(old, new))))
    assert message in found


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "no.yaml") in faults(tmp_path / "no.yaml")[0]
