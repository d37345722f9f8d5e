"""What the tests of the command line share: a project on the disk, and how to call kdframe."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kdframe.cli import main

ROWS = 24


@dataclass(frozen=True)
class Called:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def plain(self):
        return json.loads(self.out)


def project(folder: Path, teacher: Path, student: Path, prose: str) -> Path:
    """Rows and an experiment `e.yaml` that runs in a second."""
    words = prose.split()
    lines = [json.dumps({"text": " ".join(words[i : i + 25])}) for i in range(ROWS)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "e.yaml"
    path.write_text(
        f"""\
teacher: {teacher}
student: {student}
data: {{train: rows.jsonl, validation: 0.2, max_length: 48}}
loss: {{kind: logit_kd, alpha: 0.2, temperature: 2.0}}
training: {{epochs: 1, batch_size: 4}}
export: [hf]
"""
    )
    return path


def call(*words: object) -> Called:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as left:
            code = left.code
        finally:
            logging.captureWarnings(False)
    return Called(int(code or 0), out.getvalue(), err.getvalue())


def command(*words: object) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-c", "from kdframe.cli import main; main()", *map(str, words)]


def start(*words: object, folder: Path, **env: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        command(*words),
        cwd=folder,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def spawn(*words: object, folder: Path, **env: str) -> Called:
    """The command in a process of its own, to its end."""
    process = start(*words, folder=folder, **env)
    out, err = process.communicate(timeout=120)
    return Called(process.returncode, out, err)
