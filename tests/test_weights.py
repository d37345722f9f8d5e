"""The fingerprint of a model: all of its content, read once."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from kdframe import models, weights
from kdframe.errors import InputError
from tests.model_helpers import moved, teacher_of


@pytest.fixture(autouse=True)
def own_memory(monkeypatch, tmp_path) -> Path:
    """A memory of hashes of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kdframe" / "hashes.json"


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    """A file that begins like a `.gguf` file."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


@pytest.fixture(scope="module")
def adapter(teacher_folder, tokenizer, tmp_path_factory) -> Path:
    """A LoRA adapter on the teacher that changes its logits."""
    folder = tmp_path_factory.mktemp("lora")
    models.save(moved(teacher_folder), tokenizer, folder / "plain", folder / "adapter")
    return folder / "adapter"


def test_fingerprint_is_of_the_content(teacher_folder, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "copy")
    plain = weights.weights_fingerprint(teacher_of(teacher_folder))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert weights.weights_fingerprint(teacher_of(copy)) == plain
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert weights.weights_fingerprint(teacher_of(copy)) != plain


def test_fingerprint_sees_one_flipped_bit(teacher_folder, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "copy")
    before = weights.weights_fingerprint(teacher_of(copy))
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert weights.weights_fingerprint(teacher_of(copy)) != before


def test_fingerprint_sees_type_quantisation_and_adapter(teacher_folder, adapter, gguf_file):
    def of(**settings):
        return weights.weights_fingerprint(teacher_of(teacher_folder, **settings))

    assert of() == of(dtype="float32")  # the stored type
    seen = {of(), of(dtype="bfloat16"), of(quantize="int8"), of(adapter=str(adapter))}
    assert len(seen | {weights.weights_fingerprint(teacher_of(gguf_file))}) == 5
    assert weights.weights_fingerprint(teacher_of(gguf_file)) == weights.weights_fingerprint(
        teacher_of(gguf_file, dtype="float32")
    )


def test_unchanged_file_is_not_read_again(teacher_folder, own_memory, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "copy")
    weights.weights_fingerprint(teacher_of(copy))
    assert not own_memory.exists(), "a file changed just now could change again unseen"
    time.sleep(0.15)
    first = weights.weights_fingerprint(teacher_of(copy))
    (key,) = json.loads(own_memory.read_text())
    own_memory.write_text(json.dumps({key: "remembered"}))
    assert weights.weights_fingerprint(teacher_of(copy)) != first
    os.utime(copy / "model.safetensors")
    assert weights.weights_fingerprint(teacher_of(copy)) == first


@pytest.mark.parametrize("damage", ["{", "[]", ""])
def test_damaged_memory_is_ignored(teacher_folder, own_memory, damage):
    first = weights.weights_fingerprint(teacher_of(teacher_folder))
    own_memory.parent.mkdir(parents=True, exist_ok=True)
    own_memory.write_text(damage)
    assert weights.weights_fingerprint(teacher_of(teacher_folder)) == first
    assert len(json.loads(own_memory.read_text())) == 1


def test_large_files_are_hashed_in_pieces(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(os.urandom(1000))
    whole = weights._digest(tmp_path / "x")
    monkeypatch.setattr(weights, "_PIECE", 7)
    assert weights._digest(tmp_path / "x") == whole


def test_folder_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no weights"):
        weights.weights_fingerprint(teacher_of(tmp_path))
