"""The whole way on tiny models: what it leaves, what is done only once, and how it stops."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdframe import cache_commands, pipeline
from kdframe.errors import InputError, Interrupted
from kdframe.hooks import hookimpl
from kdframe.plugins import installed
from tests.run_kit import Said, experiment, lines, load, same, texts, weights, where, write_rows

PLAIN = {"loss", "perplexity", "bits_per_byte"}
AGREES = {"kl_to_teacher", "top1_agreement"}


@pytest.fixture
def tiny(tmp_path, prose, teacher_folder, student_folder):
    def make(student=student_folder, teacher=teacher_folder, **changes):
        return experiment(tmp_path, prose, teacher, student, **changes)

    return make


def finite(evaluation) -> bool:
    values = [
        entry[role]
        for metrics in evaluation["sets"].values()
        for entry in metrics.values()
        for role in ("teacher", "student_before", "student")
        if role in entry
    ]
    return bool(values) and all(math.isfinite(value) for value in values)


def run(made, tmp_path, **more):
    outcome = pipeline.run(made, where(tmp_path, **more))
    assert finite(outcome.evaluation)
    assert all(line.get("loss", 0.0) is not None for line in lines(outcome.folder))
    return outcome


def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text("utf-8"))


# ----------------------------------------------------------------------------- the whole way
def test_what_a_run_leaves_behind(tiny, tmp_path, tokenizer):
    outcome = run(tiny(export=["hf"]), tmp_path)
    names = {path.name for path in outcome.folder.iterdir()}
    assert names >= {
        "experiment.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "student",
        "evaluation.json", "exports",
    }  # fmt: skip
    assert not [path for path in outcome.folder.rglob("*") if path.name.endswith(".tmp")]
    sets = outcome.evaluation["sets"]
    assert set(sets) == {"validation", "more"}
    for metrics in sets.values():
        assert set(metrics) == PLAIN | AGREES
        assert "teacher" in metrics["loss"]
        assert "teacher" not in metrics["kl_to_teacher"]
        assert metrics["loss"]["student"] < metrics["loss"]["student_before"]
    noted = manifest(outcome.folder)
    assert noted["status"] == "done"
    assert {"cache", "train", "evaluate student", "export hf"} <= set(noted["done"])


def test_the_student_is_plain_and_has_the_figures_that_were_told(tiny, tmp_path, tokenizer):
    """Transformers alone, on the same rows, says the same; so it does of the export."""
    made = tiny(export=["hf"])
    outcome = run(made, tmp_path)
    told = outcome.evaluation["sets"]["more"]["perplexity"]["student"]
    rows = (tmp_path / "more.jsonl").read_text("utf-8").splitlines()
    more = [json.loads(row)["text"] for row in rows]
    for folder in (outcome.folder / "student", outcome.folder / "exports" / "hf"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        own = AutoTokenizer.from_pretrained(folder)
        assert own.chat_template == tokenizer.chat_template
        total = counted = 0
        for text in more:
            ids = own(text, return_tensors="pt")["input_ids"][:, :48]
            with torch.no_grad():
                total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            counted += ids.shape[1] - 1
        assert math.exp(total / counted) == pytest.approx(told, rel=1e-5)
        assert "student before" in (folder / "README.md").read_text("utf-8")
        made_text = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
        assert made_text.shape[1] > 5


def test_a_second_start_does_nothing_again(tiny, tmp_path):
    made = tiny(export=["hf"])
    first = run(made, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*") if p.name[0] != "."}
    said = Said()
    second = run(made, tmp_path, progress=said)
    assert second.evaluation == first.evaluation
    assert "everything is done" in str(said)
    assert not [line for line in said.lines if line.startswith("export")]
    after = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*") if p.name[0] != "."}
    assert {p.name for p in after if after[p] != before[p]} <= {"manifest.json", first.folder.name}


def test_what_was_taken_away_is_made_again_and_nothing_else(tiny, tmp_path):
    import shutil

    made = tiny(export=["hf"])
    first = run(made, tmp_path)
    student = (first.folder / "student" / "model.safetensors").read_bytes()
    steps = lines(first.folder)
    shutil.rmtree(first.folder / "exports")
    run(made, tmp_path)
    assert (first.folder / "exports" / "hf" / "model.safetensors").is_file()
    shutil.rmtree(first.folder / "student")
    run(made, tmp_path)
    assert (first.folder / "student" / "model.safetensors").read_bytes() == student
    assert lines(first.folder) == steps


def test_an_export_that_fails_keeps_the_rest_and_is_tried_again(tiny, tmp_path, monkeypatch):
    from kdframe_hf_export import exporter

    made = tiny(export=["hf"])
    with monkeypatch.context() as broken:
        broken.setattr(exporter, "_same_tokens", lambda one, other: False)
        with pytest.raises(Exception, match="nothing was kept"):
            run(made, tmp_path)
    folder = tmp_path / "runs" / "tiny"
    assert manifest(folder)["status"] == "running"
    assert list((folder / "exports").iterdir()) == []
    trained = (folder / "student" / "model.safetensors").stat().st_mtime_ns
    run(made, tmp_path)
    assert (folder / "exports" / "hf").is_dir()
    assert (folder / "student" / "model.safetensors").stat().st_mtime_ns == trained


# ------------------------------------------------------------------------- the teacher once
def test_another_loss_and_seed_ask_the_teacher_nothing(tiny, tmp_path):
    run(tiny(), tmp_path)
    other = tiny(name="other", loss__alpha=0.9, loss__temperature=3.0, training__seed=5)
    outcome = run(other, tmp_path)
    assert manifest(outcome.folder)["done"]["cache"]["rows"] == 0


def test_only_rows_that_are_new_or_edited_are_computed(tiny, tmp_path, prose):
    run(tiny(), tmp_path)
    rows = texts(prose, 24)
    rows[3]["text"] = rows[3]["text"].replace("a", "e", 1)
    edited = write_rows(tmp_path / "edited.jsonl", rows)
    outcome = run(tiny(name="edited", data__train=edited), tmp_path)
    assert manifest(outcome.folder)["done"]["cache"]["rows"] == 1
    grown = write_rows(tmp_path / "grown.jsonl", texts(prose, 29))
    outcome = run(tiny(name="grown", data__train=grown), tmp_path)
    assert manifest(outcome.folder)["done"]["cache"]["rows"] == 5


def test_files_that_change_under_a_run_are_refused(tiny, tmp_path, prose):
    made = tiny()
    pipeline.train(made, where(tmp_path))
    write_rows(tmp_path / "train.jsonl", texts(prose, 25))
    with pytest.raises(InputError, match=r"files changed since this run began.*--name"):
        pipeline.run(made, where(tmp_path))


def test_repair_computes_damaged_rows_again(tiny, tmp_path):
    made = tiny()
    _, info = cache_commands.fill_cache(made, where(tmp_path))
    shard = next((tmp_path / "cache").glob("*/shard-*.bin"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    found = cache_commands.verify_cache(made, where(tmp_path), repair=True)
    assert (found.rows, len(found.bad)) == (info["rows"], 1)
    again = cache_commands.verify_cache(made, where(tmp_path))
    assert (again.rows, again.bad) == (info["rows"], [])


# ----------------------------------------------------------------------------------- stopping
def test_a_stop_while_the_teacher_reads_keeps_what_it_read(tiny, tmp_path):
    made = tiny(evaluation__batch_tokens=64)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted, match="while the teacher reads; run it again"):
        pipeline.run(made, where(tmp_path, stop=lambda: next(asked)))
    kept = cache_commands.cache_info(made, where(tmp_path))["rows"]
    assert kept > 0
    outcome = run(made, tmp_path)
    read = manifest(outcome.folder)["done"]["cache"]["rows"]
    assert kept + read == cache_commands.cache_info(made, where(tmp_path))["rows"] == 33


def test_observers_are_told_how_a_run_ended(tiny, tmp_path):
    class Observer:
        def __init__(self):
            self.told = []

        @hookimpl
        def kdframe_run_finished(self, run, status):
            noted = manifest(run)["status"]
            self.told.append((status, noted))

    observer = Observer()
    manager = installed().manager
    manager.register(observer)
    try:
        made = tiny()
        steps = iter([False] * 8 + [True] * 99)
        with pytest.raises(Interrupted):
            run(made, tmp_path, stop=lambda: next(steps))
        run(made, tmp_path)
    finally:
        manager.unregister(observer)
    assert observer.told == [("interrupted", "running"), ("done", "done")]


# ------------------------------------------------------------------------------ export alone
def test_a_saved_student_is_exported_outside_a_run(tmp_path, student_folder):
    from kdframe_hf_export import HfExport

    said = Said()
    (report,) = pipeline.export_folder(student_folder, [HfExport()], tmp_path / "out", said)
    assert report.status == "verified"
    assert same(weights(load(tmp_path / "out" / "hf")), weights(load(student_folder)))
    with pytest.raises(InputError, match="not a saved model"):
        pipeline.export_folder(tmp_path, [HfExport()], tmp_path / "out", said)
