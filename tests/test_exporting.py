"""The stage that ships: each export appears whole, or the old one stays."""

import json

import pytest

from kdframe import exporting
from kdframe.api import ExportContext, ExporterConfig, ExportReport
from kdframe.errors import DamagedError
from tests.run_kit import Said


class Text(ExporterConfig):
    """Writes a word; `fails` says how it goes wrong."""

    kind: str = "text"
    word: str = "good"
    fails: str = ""

    def build(self):
        def write(student, out, context):
            (out / "word.txt").write_text(self.word, "utf-8")
            if self.fails == "raises":
                raise OSError("the disk is full")
            status = "failed" if self.fails else "verified"
            return ExportReport(self.kind, ["word.txt"], 4, status, reason="it says otherwise")

        return write


CONTEXT = ExportContext(card="", facts={}, probe=[], load=lambda path: None)


def export(out, *exporters, progress=None):
    return exporting.export(out, exporters, out, CONTEXT, progress or Said())


def test_an_export_is_a_folder_with_its_report(tmp_path):
    said = Said()
    (report,) = export(tmp_path, Text(), progress=said)
    assert (tmp_path / "text" / "word.txt").read_text("utf-8") == "good"
    assert json.loads((tmp_path / "text" / "export.json").read_text("utf-8")) == {
        **exporting.plain(report),
        "files": ["word.txt"],
    }
    assert "export text: verified, 4 bytes" in str(said)


def test_a_new_one_takes_the_place_of_the_old(tmp_path):
    export(tmp_path, Text())
    (tmp_path / "text" / "left.txt").write_text("old", "utf-8")
    export(tmp_path, Text(word="new"))
    assert (tmp_path / "text" / "word.txt").read_text("utf-8") == "new"
    assert not (tmp_path / "text" / "left.txt").exists()


@pytest.mark.parametrize(("fails", "error"), [("raises", OSError), ("reports", DamagedError)])
def test_one_that_fails_leaves_the_old_one(tmp_path, fails, error):
    export(tmp_path, Text())
    with pytest.raises(error):
        export(tmp_path, Text(word="bad", fails=fails))
    assert (tmp_path / "text" / "word.txt").read_text("utf-8") == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_the_reason_is_told(tmp_path):
    with pytest.raises(DamagedError, match="export text: it says otherwise; nothing was kept"):
        export(tmp_path, Text(fails="reports"))
    assert list(tmp_path.iterdir()) == []
