"""`alpha * CE + (1 - alpha) * T^2 * KL(teacher_T || student_T)` on counted positions.

Letters: `n` positions, `k` kept ids, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdframe.api import ChunkTargets, DenseTargets, LossTerms, TruncatedTargets, WeightedTargets

_FLOOR = -1e4  # a log-probability: finite where a model masks an id that its teacher likes
_ALMOST_ONE = 1 - 2.0**-24


class LogitKDLoss:
    """The loss with its two settings."""

    def __init__(self, alpha: float, temperature: float) -> None:
        self.alpha = alpha
        self.temperature = temperature

    def __call__(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> LossTerms:
        """Hard and soft loss of `logits [n, V]`; both are in the terms, unweighted but for T^2."""
        log_z = torch.logsumexp(logits, dim=-1)
        hard = log_z - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        temperature = self.temperature
        soft_log_z = log_z if temperature == 1 else torch.logsumexp(logits / temperature, dim=-1)
        if isinstance(targets, TruncatedTargets):
            kl = _truncated_kl(logits, soft_log_z, targets, temperature)
        elif isinstance(targets, WeightedTargets):
            kl = _weighted_cross_entropy(logits, soft_log_z, targets, temperature)
        else:
            kl = _dense_kl(logits, soft_log_z, targets, temperature)
        soft = temperature**2 * kl
        total = self.alpha * hard + (1 - self.alpha) * soft
        return LossTerms(total, {"hard": hard, "soft": soft})


def _truncated_kl(
    logits: Tensor, log_z: Tensor, targets: TruncatedTargets, temperature: float
) -> Tensor:
    """KL over k + 1 outcomes: each kept id, and all the others as one."""
    log_p, log_p_tail = targets.at(temperature)
    log_q = logits.gather(-1, targets.ids) / temperature - log_z.unsqueeze(-1)
    # An id that the teacher gives nothing is none of the kept: it may stand there twice.
    log_q = log_q.masked_fill(log_p.isneginf(), -torch.inf)
    log_q_tail = torch.log1p(-log_q.exp().sum(-1).clamp(max=_ALMOST_ONE))
    return _kl(log_p, log_q).sum(-1) + _kl(log_p_tail, log_q_tail)


def _dense_kl(logits: Tensor, log_z: Tensor, targets: DenseTargets, temperature: float) -> Tensor:
    log_q = logits / temperature - log_z.unsqueeze(-1)
    return _kl(targets.at(temperature), log_q).sum(-1)


def _weighted_cross_entropy(
    logits: Tensor, log_z: Tensor, targets: WeightedTargets, temperature: float
) -> Tensor:
    """KL but for the teacher's entropy, which draws do not tell; its expected gradient is KL's.

    The student's normaliser is counted once, not by the sum of the weights: so the gradient is
    exactly `q - weights`, without the noise of that sum.
    """
    drawn = (targets.at(temperature) * logits.gather(-1, targets.ids) / temperature).sum(-1)
    return log_z - drawn


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`p * (log p - log q)`, 0 where p is 0."""
    term = log_p.exp() * (log_p.clamp(min=_FLOOR) - log_q.clamp(min=_FLOOR))
    return torch.where(log_p > _FLOOR, term, torch.zeros_like(term))
