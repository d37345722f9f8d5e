"""Settings of the losses that know more of an id than its p and q: its rank, or the label."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from kdframe.api import HardSoftLoss, Loss, TargetForm, fixed
from kdframe_divergences.settings import Divergence

if TYPE_CHECKING:
    from kdframe_divergences.formulas import Formula


class AdaptiveKL(Divergence):
    """`w KL(p || q) + (1 - w) KL(q || p)`: forward where the head is wrong, reverse for the tail.

    Wu and others, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
    Language Models" (arXiv 2404.02657), section 4. The head is the smallest set of the teacher's
    likeliest ids that holds the mass `head`; `w` is the head's share of `sum |p - q|`, without a
    gradient, as in the authors' code (1/2 where p = q).

    On truncated targets the bucket of all other ids always belongs to the tail. Lower and upper
    bound are those of the two KL; the mixture of them is no f-divergence, so truncation may move
    it either way. On dense targets a flat teacher costs a sort of the vocabulary.
    """

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    head: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Cumulative mass of the head (the paper's mu)."""

    def formula(self) -> Formula:
        """Adaptive KL."""
        from kdframe_divergences import formulas

        return partial(formulas.adaptive_kl, head=self.head)


class DecoupledKD(HardSoftLoss):
    """`target KL(b_p || b_q) + others KL(p' || q')`: the label and all other ids apart.

    `b` is the pair (probability of the label, of all others); `p'` and `q'` are the distributions
    over the others alone. Plain KL weighs the second term by the teacher's doubt, `1 - p_label`;
    here it keeps its weight where the teacher is sure. Zhao, Cui, Song, Qiu and Liang, "Decoupled
    Knowledge Distillation" (arXiv 2203.08679), section 3.2, equation 7 (their alpha is `target`,
    their beta `others`).

    It needs the teacher's probability of the label itself and of every other id: dense targets
    alone. (The engine makes dense ones of a cache of hidden states, so those serve it.) A
    truncated teacher tells of neither where the label was not kept.
    """

    accepts: ClassVar[frozenset[TargetForm]] = frozenset({"dense"})

    kind: Literal["decoupled_kd"] = "decoupled_kd"
    target: NonNegativeFloat = 1.0
    """Weight of the label against all others."""
    others: NonNegativeFloat = 1.0
    """Weight of the distribution over all others (the paper: 1 and more, 8 on CIFAR-100)."""

    def build(self) -> Loss:
        """The loss function."""
        from kdframe_divergences.loss import Decoupled, DivergenceLoss

        temperature = fixed(self.temperature)
        soft = Decoupled(self.target, self.others, temperature)
        return DivergenceLoss(fixed(self.alpha), temperature, soft)


class Ranking(HardSoftLoss):
    """`-1/k sum_i log(e^z_i / (e^z_i + ... + e^z_k + sum of all others))`: the teacher's order.

    ListMLE (Xia, Liu, Wang, Zhang and Li, "Listwise Approach to Learning to Rank: Theory and
    Algorithm", ICML 2008, section 4.3) of the student's logits z over T, over the teacher's `k`
    likeliest ids in their order; all other ids stay in every denominator, so the student's mass
    there counts (top-k ListMLE: Xia, Liu and Li, "Statistical Consistency of Top-k Ranking", NIPS
    2009). Nats for each rank.

    It takes from the teacher an order and nothing else, so it is not 0 where p = q: its least
    value is 0, for the right order with ever wider gaps. Use it beside a hard loss or in a
    mixture. Truncated targets that keep `k` ids give the same value as dense ones; those that
    keep fewer rank what they keep.
    """

    kind: Literal["ranking"] = "ranking"
    k: PositiveInt = 8
    """How many of the teacher's likeliest ids are ranked."""

    def build(self) -> Loss:
        """The loss function."""
        from kdframe_divergences.loss import DivergenceLoss, Ranked

        temperature = fixed(self.temperature)
        return DivergenceLoss(fixed(self.alpha), temperature, Ranked(self.k, temperature))
