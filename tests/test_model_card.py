"""The model card: whatever names stand in it, its front matter and its tables stay whole."""

import pytest
from ruamel.yaml import YAML

from kdframe.model_card import model_card

FIGURES = {
    "sets": {
        "validation": {
            "loss": {"teacher": 1.0, "student_before": 3.0, "student": 2.0, "better": "lower"}
        }
    }
}
HOSTILE = [
    "---\nevil: yes",
    'a" \n# b: c',
    "x|y|z",
    "`code` <script>",
    "[link](http://x)",
    "emoji 😀 and \u2028 and \x85",
    "\udcff not Unicode",
    "'\\\n...",
]


def front(card: str) -> dict:
    head = card.split("---\n")[1]
    return YAML(typ="safe").load(head)


def test_figures_stand_in_a_table():
    card = model_card({"name": "e"}, FIGURES)
    assert "## On validation" in card
    assert "| loss (lower is better) | 1.0000 | 3.0000 | 2.0000 |" in card


def test_a_model_that_was_not_measured_has_an_empty_cell():
    figures = {"sets": {"v": {"kl": {"student": 0.5, "better": "lower"}}}}
    assert "| kl (lower is better) |  |  | 0.5000 |" in model_card({}, figures)


@pytest.mark.parametrize(
    ("facts", "base"),
    [
        ({"teacher": "big/one", "student": "small/one"}, "small/one"),
        ({"teacher": "big/one", "student": "cut from the teacher's layers"}, "big/one"),
        ({"teacher": "big/one", "student": "/home/somebody/student"}, None),
        ({"teacher": "/home/teacher", "student": "cut from the teacher's layers"}, None),
    ],
)
def test_the_base_is_the_hub_model_that_the_student_began_as(facts, base):
    assert front(model_card(facts, {})).get("base_model") == base


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_out_of_the_front_matter(name):
    facts = {"name": name, "teacher": name, "student": name, name: name}
    head = front(model_card(facts, {"sets": {name: {}}}))
    assert head.keys() <= {"library_name", "tags", "base_model", "base_model_relation"}
    assert head["library_name"] == "transformers"


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_a_table_or_begins_markup(name):
    entry = {"teacher": 1.0, "student_before": 1.0, "student": 1.0, "better": "lower"}
    card = model_card({"name": name, name: name}, {"sets": {name: {name: entry}}})
    card.encode()
    body = card.split("---\n", 2)[2]
    for line in body.splitlines():
        bare = line.replace("\\\\", "").replace("\\|", "")
        assert bare.count("|") in (0, 3, 5)
        assert "<script>" not in line.replace("\\<", "")
    assert sum(line.startswith("#") for line in body.splitlines()) == 2
