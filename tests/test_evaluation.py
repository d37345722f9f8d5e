"""The stage that measures models on named sets."""

import pytest

from kdframe import evaluation
from kdframe.api import EvaluationRow, Figure
from kdframe.progress import Quiet
from kdframe_evaluators import Agreement, Perplexity
from tests.run_kit import filled, load, token_rows

SETTING = evaluation.Setting((Perplexity(), Agreement()), pad_id=0, batch_tokens=64)


@pytest.fixture(scope="module")
def sets():
    empty = token_rows(1).select([])
    untaught = token_rows(3, seed=2, taught=False)
    return {"validation": empty, "one": token_rows(5), "plain": untaught}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_folder, sets):
    return filled(tmp_path_factory.mktemp("cache"), load(teacher_folder), list(sets.values()))


def test_every_set_that_has_rows_gets_the_figures_that_apply(student_folder, sets, cache):
    found = evaluation.evaluate(
        "student", load(student_folder), sets, SETTING, cache=cache, progress=Quiet()
    )
    plain = {"loss", "perplexity", "bits_per_byte"}
    assert set(found) == {"one", "plain"}
    assert set(found["one"]) == plain | {"kl_to_teacher", "top1_agreement"}
    assert set(found["plain"]) == plain


def test_a_figure_does_not_depend_on_the_shape_of_a_pass(student_folder, sets, cache):
    def figures(tokens):
        setting = evaluation.Setting(SETTING.evaluators, 0, tokens)
        found = evaluation.evaluate(
            "student", load(student_folder), sets, setting, cache=cache, progress=Quiet()
        )
        return {metric: figure.value for metric, figure in found["one"].items()}

    assert figures(1) == pytest.approx(figures(1000), rel=1e-5)


def test_what_an_evaluator_learns_of_the_rows(student_folder):
    rows = token_rows(4)
    from kdframe.output_layer import Halves

    halves = Halves(load(student_folder))
    subject = evaluation.ModelOnSet("student", halves, rows, None, SETTING, Quiet())
    counted = [len(rows.positions(i)) for i in range(4)]
    assert subject.rows == [EvaluationRow(2 * n, n) for n in counted]
    assert not subject.has_targets


def test_evaluation_json_has_a_value_for_each_model():
    def one(value, interval=None):
        return evaluation.plain({"a": {"loss": Figure(value, "lower", interval)}})

    whole = evaluation.combine(
        {"teacher": one(1.0), "student_before": one(3.0, (2.9, 3.1)), "student": one(2.0, (1, 3))},
        ["llm_judge"],
    )
    assert whole["sets"] == {
        "a": {
            "loss": {
                "teacher": 1.0,
                "student_before": 3.0,
                "student": 2.0,
                "better": "lower",
                "ci95": (1, 3),
            }
        }
    }
    assert list(whole["unavailable"]) == ["llm_judge"]
    assert "unavailable" not in evaluation.combine({"teacher": one(1.0)}, [])
