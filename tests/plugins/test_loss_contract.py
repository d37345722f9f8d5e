"""The built-in losses keep the contract that a stranger's is held to."""

import pytest
import torch

from kdframe.api import LossConfig, LossTerms
from kdframe.testing.losses import LossContract
from kdframe_logit_kd import LogitKD


class TestLogitKD(LossContract):
    def config(self):
        return LogitKD(alpha=0.3)


class TestSoftLogitKD(LossContract):
    def config(self):
        return LogitKD(alpha=0.0, temperature=2.0)


class TestLogitKDAtAnOddTemperature(LossContract):
    def config(self):
        return LogitKD(alpha=0.6, temperature=3.3)


class Plain(LossConfig):
    """A stranger's loss, in a few lines of plain torch."""

    kind: str = "plain"
    accepts = frozenset({"dense"})

    def build(self):
        def loss(logits, targets, labels):
            log_q = torch.log_softmax(logits, dim=-1)
            log_p = targets.at(1.0)
            safe = torch.where(log_p.isneginf() | log_q.isneginf(), 0.0, log_p - log_q)
            soft = (log_p.exp() * safe).sum(-1)
            return LossTerms(soft, {"soft": soft})

        return loss


class TestPlain(LossContract):
    def config(self):
        return Plain()


class Greedy(Plain):
    """Looks at its neighbours: what the contract forbids."""

    def build(self):
        right = super().build()

        def loss(logits, targets, labels):
            found = right(logits, targets, labels)
            return LossTerms(found.total / len(labels), found.terms)

        return loss


@pytest.mark.parametrize(
    "test", ["test_a_position_does_not_know_its_neighbours", "test_chunks_change_nothing"]
)
def test_the_contract_finds_a_loss_that_averages(test):
    class Kit(LossContract):
        def config(self):
            return Greedy()

    with pytest.raises(AssertionError):
        getattr(Kit(), test)()
