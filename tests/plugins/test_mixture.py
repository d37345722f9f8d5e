"""A weighted sum of losses."""

import pydantic
import pytest
import torch

from kdframe import reading
from kdframe.api import Schedule
from kdframe.errors import InputError
from kdframe.testing.losses import LossContract, targets_of
from kdframe_divergences import JSD, DecoupledKD, ForwardKL, Mixture, ReverseKL, Weighted
from kdframe_logit_kd import LogitKD
from tests.plugins.divergence_kit import made

TWO = Mixture(
    parts=[
        {"loss": LogitKD(alpha=0.3, temperature=2), "weight": 0.7},
        {"loss": {"kind": "jsd", "alpha": 0, "beta": 0.2}, "weight": 3},
    ]
)


class TestMixture(LossContract):
    def config(self):
        return TWO


class TestMixtureOfOne(LossContract):
    def config(self):
        return Mixture(parts=[{"loss": "forward_kl"}])


def test_it_is_the_sum_of_its_parts_with_their_hard_losses():
    student, teacher, labels = made(0)
    targets = targets_of("truncated", teacher, TWO.temperatures())
    found = TWO.build()(student, targets, labels)
    first, second = (
        config.build()(student, targets, labels)
        for config in (LogitKD(alpha=0.3, temperature=2), JSD(alpha=0, beta=0.2))
    )
    torch.testing.assert_close(found.total, 0.7 * first.total + 3 * second.total)
    assert found.terms.keys() == {"hard", "logit_kd", "jsd"}
    torch.testing.assert_close(found.terms["hard"], first.terms["hard"])
    torch.testing.assert_close(found.terms["logit_kd"], first.total)


def test_two_parts_of_a_kind_have_two_names():
    student, teacher, labels = made(0)
    twice = Mixture(parts=[{"loss": "jsd"}, {"loss": "reverse_kl"}, {"loss": JSD(beta=0.1)}])
    found = twice.build()(student, targets_of("dense", teacher, (1.0,)), labels)
    assert found.terms.keys() == {"hard", "jsd", "reverse_kl", "jsd_2"}


def test_it_wants_of_the_teacher_what_all_its_parts_want():
    parts = [ForwardKL(temperature=2), LogitKD(temperature=Schedule(start=3, end=1))]
    drawn = Mixture(parts=[{"loss": part} for part in parts])
    assert drawn.accepts == {"truncated", "dense", "weighted"}
    assert drawn.temperatures() == (1, 2, 3)
    narrow = Mixture(parts=[{"loss": part} for part in (ForwardKL(), DecoupledKD())])
    assert narrow.accepts == {"dense"}


def test_weights_and_parts_move_together():
    moving = Mixture(
        parts=[
            Weighted(loss=ForwardKL(temperature=Schedule(start=3, end=1)), weight=1),
            Weighted(loss=ReverseKL(), weight=Schedule(start=0, end=2)),
        ]
    )
    half = moving.at(0.5)
    assert half.parts[0] == Weighted(loss=ForwardKL(temperature=2), weight=1)
    assert half.parts[1] == Weighted(loss=ReverseKL(), weight=1)


def test_the_header_names_every_part_and_weight():
    said = TWO.describe()
    assert said.startswith("mixture: 0.7 x [logit_kd, alpha 0.3: 30 % hard labels")
    assert "+ 3 x [jsd " in said


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least 1 item"),
        ([{"loss": "jsd", "weight": -1}], "greater than or equal to 0"),
        ([{"loss": "jsdd"}], "did you mean 'jsd'"),
        ([{"loss": TWO}], "write all its parts in one list"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        Mixture(parts=parts)


def test_parts_that_no_targets_serve_are_refused():
    class Drawn(ForwardKL):
        accepts = frozenset({"weighted"})

    with pytest.raises(pydantic.ValidationError, match="no form of targets serves every part"):
        Mixture(parts=[{"loss": Drawn()}, {"loss": JSD()}])


def test_a_part_is_reached_by_its_number(tmp_path):
    (tmp_path / "e.yaml").write_text(
        "{name: e, teacher: a/b, student: a/c, data: {train: rows.jsonl}, "
        "loss: {kind: mixture, parts: [{loss: jsd}, {loss: reverse_kl, weight: 2}]}}"
    )

    def read(*overrides):
        return reading.load(tmp_path / "e.yaml", overrides).loss

    changed = read("loss.parts.0.weight=0.5", "loss.parts.0.loss.beta=0.1")
    assert changed.parts[0] == Weighted(loss=JSD(beta=0.1), weight=0.5)
    assert read("loss.parts.1.loss.kind=jsd").parts[1] == Weighted(loss=JSD(), weight=2)
    with pytest.raises(InputError, match=r"betta.*did you mean 'beta'"):
        read("loss.parts.0.loss.betta=0.1")


def test_its_schema_ends():
    """Though any loss may stand in it."""
    kinds = str(Mixture.model_json_schema())
    assert "'jsd'" in kinds
    assert "'logit_kd'" in kinds
