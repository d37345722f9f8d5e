"""What the commands share: units, tables, and that only results are on standard output."""

from __future__ import annotations

import os
import signal

import pytest

from kdframe import terminal
from kdframe.checks import Guard


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1_456_000, "1.5 MB"),
        (2e15, "2,000.0"),
    ],
)
def test_bytes_are_told_in_a_unit_that_fits(number, text):
    assert terminal.size(number).startswith(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.01, "1 s"), (89, "89 s"), (600, "10 min"), (9000, "2 h 30 min")]
)
def test_seconds_are_told_in_units_that_fit(seconds, text):
    assert terminal.duration(seconds) == text


def test_a_name_in_brackets_is_a_name_and_a_missing_figure_an_empty_cell(capsys):
    entry = {"teacher": 1234.5, "student": 0.25, "better": "lower"}
    terminal.show_evaluation(
        {
            "sets": {"[red]set": {"loss": entry, "kl": {"student": 0.5, "better": "lower"}}},
            "verdict": {"text": "it helped"},
            "unavailable": {"mmlu": "pip install 'x[y]'"},
        }
    )
    shown = capsys.readouterr().out
    assert "[red]set" in shown
    assert "1,234.5" in shown
    assert "0.2500" in shown
    assert "student before" not in shown
    assert "it helped" in shown
    assert "mmlu: unavailable: pip install 'x[y]'" in shown


def test_guards_are_told_with_their_remedies(capsys):
    terminal.show_guards([Guard("a", "error", "is wrong", "mend it"), Guard("b", "note", "is")])
    assert capsys.readouterr().out == "error: is wrong (mend it)\nnote: is\n"
    terminal.show_guards([])
    assert capsys.readouterr().out == "no faults found\n"


def test_what_is_printed_during_the_work_goes_to_standard_error(tmp_path, capsys):
    with terminal.where(tmp_path, tmp_path):
        print("loud")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "loud\n"


def test_the_first_signal_asks_and_the_old_handlers_come_back(tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT)
    with terminal.where(tmp_path, tmp_path) as where:
        assert not where.stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert where.stop()
    assert signal.getsignal(signal.SIGINT) is before
    assert "once more stops at once" in capfd.readouterr().err
