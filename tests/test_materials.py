"""What the stages work on: each loaded once, and the two models seen to fit."""

import pytest
from transformers import AutoTokenizer

from kdframe.errors import InputError
from kdframe.materials import Materials
from kdframe.progress import Quiet
from tests.conftest import make_llama
from tests.run_kit import Said, experiment


@pytest.fixture
def materials(tmp_path, prose, teacher_folder, student_folder):
    def make(student=student_folder, teacher=teacher_folder, progress=None, **changes):
        made = experiment(tmp_path, prose, teacher, student, **changes)
        return Materials(made, tmp_path / "cache", progress or Quiet())

    return make


def test_each_is_loaded_once(materials):
    found = materials()
    for name in ("tokenizer", "dataset", "teacher", "store"):
        assert getattr(found, name) is getattr(found, name)


def test_nothing_is_loaded_before_it_is_asked_for(materials, tmp_path):
    found = materials()
    assert not {"tokenizer", "dataset", "teacher", "store"} & set(vars(found))
    assert not (tmp_path / "cache").exists()


def test_a_forgotten_teacher_is_loaded_anew(materials):
    found = materials()
    found.forget_teacher()  # not there yet
    first = found.teacher
    found.forget_teacher()
    assert "teacher" not in vars(found)
    assert found.teacher is not first
    assert not any(parameter.requires_grad for parameter in found.teacher.parameters())


def test_what_became_of_the_rows_is_told(materials):
    said = Said()
    counts = materials(progress=said, data__max_length=8).dataset.counts
    assert counts["train"].kept == 24
    for name in ("train", "validation", "test.more"):
        assert [f"data, {name}: {line}" for line in counts[name].lines()] == [
            line for line in said.lines if line.startswith(f"data, {name}: ")
        ]


def test_held_out_sets(materials, tmp_path):
    found = materials()
    assert {name: len(rows) for name, rows in found.held_out.items()} == {
        "validation": 5,
        "more": 4,
    }
    clash = materials(data__test={"validation": str(tmp_path / "more.jsonl")})
    with pytest.raises(InputError, match="'validation' is taken"):
        _ = clash.held_out


def test_a_token_that_one_of_the_models_lacks_is_refused(materials, tmp_path, tokenizer):
    """The ids of both models' rows are known before one is loaded."""
    small = make_llama(tmp_path / "s", tokenizer, layers=1, hidden=16, seed=2, vocab_size=300)
    found = materials(student=small)
    assert (found.teacher_shape.vocab_size, found.student_rows) == (len(tokenizer), 300)
    with pytest.raises(InputError, match="outside the model's vocabulary of 300"):
        _ = found.dataset


def test_two_tokenizers_are_refused(materials, tmp_path, tokenizer, student_folder):
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(student_folder, other)
    whole = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocab = whole["model"]["vocab"]
    a, b = [token for token in vocab if token.isalpha()][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    with pytest.raises(InputError, match="projection"):
        _ = materials(student=other).tokenizer


def test_the_cut_of_a_teacher_speaks_its_language(materials):
    found = materials(student={"from_teacher": {"layers": 2}})
    assert found.student_rows == found.teacher_shape.vocab_size
    assert found.tokenizer.get_vocab() == found.tokenizer.get_vocab()


def test_padding_needs_no_token(materials, tmp_path, tokenizer, student_folder, teacher_folder):
    assert materials().pad_id == tokenizer.pad_token_id
    import shutil

    for name, folder in (("t", teacher_folder), ("s", student_folder)):
        shutil.copytree(folder, tmp_path / name)
        bare = AutoTokenizer.from_pretrained(folder)
        bare.pad_token = None
        bare.save_pretrained(tmp_path / name)
    assert materials(student=tmp_path / "s", teacher=tmp_path / "t").pad_id == 0


def test_the_cache_is_that_of_this_teacher(materials):
    folder = materials().store.cache.folder
    assert materials(loss__alpha=0.9, training__seed=3).store.cache.folder == folder
    for change in ({"teacher__dtype": "bfloat16"}, {"cache__codec": {"kind": "topk", "k": 4}}):
        assert materials(**change).store.cache.folder != folder


def test_the_number_of_threads(materials):
    import torch

    before = torch.get_num_threads()
    try:
        materials(runtime__threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
