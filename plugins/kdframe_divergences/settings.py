"""Settings of the f-divergences: sums over outcomes of something of p and q alone.

p is the teacher's distribution at the temperature, q the student's, nats throughout.

On `truncated` targets each works over k + 1 outcomes, on both sides: every kept id, and all the
others as one. By the data processing inequality (Csiszar, "Information-type measures of
difference of probability distributions", Studia Sci. Math. Hungar. 2, 1967) that is a lower bound
of the value over the whole vocabulary, 0 where p = q.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from kdframe.api import HardSoftLoss, Loss, TargetForm, fixed

if TYPE_CHECKING:
    from kdframe_divergences.formulas import Formula


class Divergence(HardSoftLoss):
    """Base of the f-divergences: `alpha * CE + (1 - alpha) * T^2 * D(p, q)`."""

    renormalises: ClassVar[bool] = False
    """Whether the kept ids may stand for the whole distribution."""

    tail: Literal["bucket", "renormalise"] = "bucket"
    """Of truncated targets, what is known of the ids that were not kept: `bucket` compares their
    mass; `renormalise` takes the teacher to have said that it is 0 and shares it among the kept
    ids, as tools without the true tail do: a biased teacher, for comparison."""

    @model_validator(mode="after")
    def _tail_is_sound(self) -> Self:
        if self.tail == "renormalise" and not self.renormalises:
            raise ValueError(
                f"{self.kind} cannot renormalise the kept ids: it weighs an id by the student's "
                "probability, and the teacher would be taken to give 0 to every id that was not "
                "kept; leave `tail: bucket`, or take forward_kl, skew_kl or total_variation"
            )
        return self

    def formula(self) -> Formula:
        """The divergence of the two sides, in nats."""
        raise NotImplementedError

    def build(self) -> Loss:
        """The loss function."""
        from kdframe_divergences.loss import DivergenceLoss, OverOutcomes

        temperature = fixed(self.temperature)
        soft = OverOutcomes(self.formula(), temperature, self.tail)
        return DivergenceLoss(fixed(self.alpha), temperature, soft)


class ForwardKL(Divergence):
    """`KL(p || q) = sum p log(p / q)`: the student covers all that the teacher does.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531),
    section 2. The same as `logit_kd`, which is faster; here for mixtures and for `tail`. Linear in
    p, so drawn (`weighted`) targets serve it too: of those the value is the cross-entropy, KL
    without the teacher's entropy, and its gradient that of KL in expectation.
    """

    accepts: ClassVar[frozenset[TargetForm]] = frozenset({"truncated", "dense", "weighted"})
    renormalises: ClassVar[bool] = True

    kind: Literal["forward_kl"] = "forward_kl"

    def formula(self) -> Formula:
        """KL(p || q)."""
        from kdframe_divergences import formulas

        return formulas.forward_kl


class ReverseKL(Divergence):
    """`KL(q || p) = sum q log(q / p)`: the student keeps to what the teacher finds likely.

    Gu, Dong, Wei and Huang, "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv
    2306.08543), section 2.1, equation 1; here at each position of a given text, without sampling.
    """

    kind: Literal["reverse_kl"] = "reverse_kl"

    def formula(self) -> Formula:
        """KL(q || p)."""
        from kdframe_divergences import formulas

        return formulas.reverse_kl


class Jeffreys(Divergence):
    """`KL(p || q) + KL(q || p)`: both directions, symmetric.

    Jeffreys, "An invariant form for the prior probability in estimation problems" (Proc. R. Soc.
    A 186, 1946); Kullback and Leibler, "On information and sufficiency" (Ann. Math. Stat. 22,
    1951), section 2. The sum, not its half.
    """

    kind: Literal["jeffreys"] = "jeffreys"

    def formula(self) -> Formula:
        """KL both ways."""
        from kdframe_divergences import formulas

        return formulas.jeffreys


class JSD(Divergence):
    """`beta KL(p || m) + (1 - beta) KL(q || m)`, `m = beta p + (1 - beta) q`: bounded.

    Agarwal and others, "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes" (arXiv 2306.13649), section 2, "generalized JSD". Divided by beta it tends to
    KL(p || q) as beta goes to 0, and divided by 1 - beta to KL(q || p) as beta goes to 1; at both
    ends itself is 0, so they are refused. 1/2 is the Jensen-Shannon divergence, at most log 2.
    """

    kind: Literal["jsd"] = "jsd"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the teacher in the mixture; near 0 like forward, near 1 like reverse KL."""

    def formula(self) -> Formula:
        """The generalised JSD."""
        from kdframe_divergences import formulas

        return partial(formulas.jsd, beta=self.beta)


class SkewKL(Divergence):
    """`KL(p || skew p + (1 - skew) q)`: forward KL whose gradient stays bounded.

    Ko, Kim, Chen and Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models"
    (arXiv 2402.03898), section 3.1. `skew` 0 is forward KL.
    """

    renormalises: ClassVar[bool] = True

    kind: Literal["skew_kl"] = "skew_kl"
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the teacher that is mixed into the student (the paper's alpha)."""

    def formula(self) -> Formula:
        """Skew KL."""
        from kdframe_divergences import formulas

        return partial(formulas.skew_kl, skew=self.skew)


class SkewRKL(Divergence):
    """`KL(q || (1 - skew) p + skew q)`: reverse KL that stays finite where the teacher says 0.

    Ko, Kim, Chen and Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models"
    (arXiv 2402.03898), section 3.1. `skew` 0 is reverse KL.
    """

    kind: Literal["skew_rkl"] = "skew_rkl"
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the student that is mixed into the teacher (the paper's alpha)."""

    def formula(self) -> Formula:
        """Skew reverse KL."""
        from kdframe_divergences import formulas

        return partial(formulas.skew_rkl, skew=self.skew)


class TotalVariation(Divergence):
    """`1/2 sum |p - q|`: the mass that is in the wrong place, 0 to 1. Symmetric.

    Wen, Li, Du and Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation"
    (arXiv 2307.15190), section 3. A probability, not nats; robust to a teacher's rare ids, but
    its gradient vanishes where student and teacher hardly meet.
    """

    renormalises: ClassVar[bool] = True

    kind: Literal["total_variation"] = "total_variation"

    def formula(self) -> Formula:
        """Total variation."""
        from kdframe_divergences import formulas

        return formulas.total_variation
