"""metrics.jsonl: a line a measurement, JSON whatever was measured, cut back where a run goes on."""

import json
import math

from kdframe import metrics


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.read(path) == []
    for step in (1, 2):
        metrics.append(path, {"step": step, "loss": 1 / 3, "soft": None})
    metrics.sync(path)
    assert metrics.read(path) == [{"step": s, "loss": 1 / 3, "soft": None} for s in (1, 2)]


def test_what_is_no_number_is_null(tmp_path):
    """`NaN` is not JSON: other programs could not read the file."""
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, {"step": 1, "loss": math.nan, "norm": math.inf})
    strict = json.loads(path.read_text("utf-8"), parse_constant=lambda name: 1 / 0)
    assert strict == {"step": 1, "loss": None, "norm": None}


def test_a_torn_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        metrics.append(path, {"step": step, "loss": 2.5})
    path.write_text(path.read_text("utf-8")[:-7], "utf-8")
    assert [line["step"] for line in metrics.read(path)] == [1]


def test_cut_back_drops_what_comes_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 2, 3):
        metrics.append(path, {"step": step, "loss": 2.5})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    metrics.cut_back(path, 2)
    metrics.append(path, {"step": 3, "loss": 1.5})
    steps = [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()]
    assert steps == [1, 2, 2, 3]


def test_cut_back_to_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.cut_back(path, 0)
    assert path.read_text("utf-8") == ""
