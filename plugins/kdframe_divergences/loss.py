"""The losses that the settings build: a hard and a soft part, or a sum of losses.

Letters: `n` positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdframe.api import (
    ChunkTargets,
    DenseTargets,
    Loss,
    LossTerms,
    TruncatedTargets,
    WeightedTargets,
)
from kdframe_divergences.formulas import Formula, kl
from kdframe_divergences.outcomes import IMPOSSIBLE, grouped, scores, sides

Soft = Callable[[Tensor, ChunkTargets, Tensor], Tensor]
"""Logits `[n, V]`, targets and labels `[n]` to nats `[n]`, before T^2."""


class DivergenceLoss:
    """`alpha * CE + (1 - alpha) * T^2 * D`; the terms are CE (`hard`) and T^2 * D (`soft`)."""

    def __init__(self, alpha: float, temperature: float, soft: Soft) -> None:
        self._alpha, self._scale, self._soft = alpha, temperature**2, soft

    def __call__(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> LossTerms:
        """Both parts of `logits [n, V]`, `[n]` nats each."""
        hard = F.cross_entropy(logits, labels, reduction="none")
        soft = self._scale * self._soft(logits, targets, labels)
        return LossTerms(
            self._alpha * hard + (1 - self._alpha) * soft, {"hard": hard, "soft": soft}
        )


class OverOutcomes:
    """A divergence over the outcomes that the targets tell of."""

    def __init__(
        self, formula: Formula, temperature: float, tail: Literal["bucket", "renormalise"]
    ) -> None:
        self._formula, self._temperature, self._tail = formula, temperature, tail

    def __call__(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> Tensor:
        """Nats `[n]`; of drawn targets, which forward KL alone accepts, the cross-entropy."""
        if isinstance(targets, WeightedTargets):
            return _drawn(logits, targets, self._temperature)
        return self._formula(sides(targets, logits, self._temperature, self._tail))


def _drawn(logits: Tensor, targets: WeightedTargets, temperature: float) -> Tensor:
    """`-sum w log q`; its gradient counts the normaliser once, not by the sum of the weights.

    That is `q - w`: the same in expectation, without the noise of the sum.
    """
    z = scores(logits, temperature)
    log_z = torch.logsumexp(z, dim=-1)
    held = log_z.detach()
    told = targets.at(temperature) * (z.gather(-1, targets.ids) - held.unsqueeze(-1))
    return log_z - held - told.sum(-1)


class Decoupled:
    """KL of the label against all others, and KL among the others."""

    def __init__(self, target: float, others: float, temperature: float) -> None:
        self._target, self._others, self._temperature = target, others, temperature

    def __call__(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> Tensor:
        """Nats `[n]`."""
        assert isinstance(targets, DenseTargets)
        log_p = targets.at(self._temperature)
        label = labels.unsqueeze(-1)
        # A teacher that is wholly sure of the label says nothing of the others.
        doubts = log_p.scatter(-1, label, -torch.inf).amax(-1) > -torch.inf
        teacher = log_p.masked_fill(log_p.isneginf(), IMPOSSIBLE)
        (pair_p, rest_p), (pair_q, rest_q) = (
            _apart(teacher, label),
            _apart(scores(logits, self._temperature), label),
        )
        among = torch.where(doubts, kl(rest_p, rest_q), 0.0)
        return self._target * kl(pair_p, pair_q) + self._others * among


def _apart(z: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, others) `[n, 2]`, and of each other id among them `[n, V]`."""
    everything = torch.ones_like(label, dtype=torch.bool)
    pair = torch.log_softmax(grouped(z, label, everything), dim=-1)
    own = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, label, everything)
    lowest = z.detach().amin(-1, keepdim=True) + IMPOSSIBLE
    return pair, torch.log_softmax(torch.where(own, lowest, z), dim=-1)


class Ranked:
    """The negative log-likelihood of the teacher's order."""

    def __init__(self, k: int, temperature: float) -> None:
        self._k, self._temperature = k, temperature

    def __call__(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> Tensor:
        """Nats for each rank, `[n]`."""
        assert isinstance(targets, TruncatedTargets | DenseTargets)
        log_p, at = targets.log_probs.topk(min(self._k, targets.log_probs.shape[-1]), dim=-1)
        ids = targets.ids.gather(-1, at) if isinstance(targets, TruncatedTargets) else at
        kept = ~log_p.isneginf()
        z = grouped(scores(logits, self._temperature), ids, kept)
        below = torch.logcumsumexp(z.flip(-1), dim=-1).flip(-1)  # an id, and what ranks under it
        each = torch.where(kept, (below - z)[:, :-1], 0.0)
        return each.sum(-1) / kept.sum(-1).clamp(min=1)


class MixtureLoss:
    """A weighted sum of losses."""

    def __init__(self, parts: Sequence[tuple[str, float, Loss]]) -> None:
        self._parts = parts

    def __call__(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> LossTerms:
        """The sum over `logits [n, V]`; each part's total by its name, and `hard` if one has it."""
        total = logits.new_zeros(len(labels))
        terms: dict[str, Tensor] = {}
        for name, weight, loss in self._parts:
            found = loss(logits, targets, labels)
            total = total + weight * found.total
            if "hard" in found.terms:
                terms["hard"] = found.terms["hard"]
            terms[name] = found.total
        return LossTerms(total, terms)
