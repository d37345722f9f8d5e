"""KL(teacher_T || student_T) against each form of targets: its value, and its own gradient.

With the student's q at T the gradient of the KL with respect to `z / T` is `q - p`. Every form
gives it as `spread * q`, and a correction at the ids that it knows.

Letters: `n` positions, `k` kept ids, `V` vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kdframe.api import ChunkTargets, DenseTargets, TruncatedTargets, WeightedTargets

_FLOOR = -1e4  # a log-probability: finite where a model masks an id that its teacher likes
_ALMOST_ONE = 1 - 2.0**-24


class Soft(Protocol):
    """The soft loss of some positions. `read`, then `value`, then the gradient's two parts."""

    def read(self, logits: Tensor) -> None:
        """Take what is needed of `logits [n, V]`; a row may be shifted, as long as `value`'s is."""

    def value(self, log_z: Tensor) -> Tensor:
        """`[n]` nats, from `log_z [n]` of the same logits over T."""

    def spread(self) -> Tensor:
        """`[n, 1]`: the factor of q in the gradient."""

    def correct(self, gradient: Tensor, weight: float) -> None:
        """Add what the gradient has besides, times `weight`, in place."""


def soft(targets: ChunkTargets, temperature: float) -> Soft:
    """The soft loss against a form of targets."""
    match targets:
        case TruncatedTargets():
            return _Kept(targets, temperature)
        case WeightedTargets():
            return _Drawn(targets, temperature)
        case DenseTargets():
            return _Whole(targets, temperature)


class _Kept:
    """KL over k + 1 outcomes: each kept id, and all the others as one.

    For an id of the tail, whose mass is `p_t` where the student has `q_t`, the gradient is
    `q * (1 - p_t / q_t)`.
    """

    def __init__(self, targets: TruncatedTargets, temperature: float) -> None:
        self._ids, self._temperature = targets.ids, temperature
        self._log_p, self._log_p_tail = targets.at(temperature)

    def read(self, logits: Tensor) -> None:
        self._z = logits.gather(-1, self._ids) / self._temperature

    def value(self, log_z: Tensor) -> Tensor:
        # An id that the teacher gives nothing is none of the kept: it may stand there twice.
        log_q = (self._z - log_z.unsqueeze(-1)).masked_fill(self._log_p.isneginf(), -torch.inf)
        self._q = log_q.exp()
        self._sum = self._q.sum(-1)
        log_q_tail = torch.log1p(-self._sum.clamp(max=_ALMOST_ONE))
        return _kl(self._log_p, log_q).sum(-1) + _kl(self._log_p_tail, log_q_tail)

    def spread(self) -> Tensor:
        # What the value holds fast has no slope: an id that the student masks, a tail that is
        # less than float32 can tell.
        self._p = self._log_p.exp().masked_fill(self._z.isneginf(), 0)
        tail = self._log_p_tail.exp().masked_fill(self._sum >= _ALMOST_ONE, 0)
        self._ratio = (tail / (1 - self._sum).clamp(min=1 - _ALMOST_ONE)).unsqueeze(-1)
        return (self._p.sum(-1) + tail).unsqueeze(-1) - self._ratio

    def correct(self, gradient: Tensor, weight: float) -> None:
        change = (self._q * self._ratio - self._p).mul_(weight)
        gradient.scatter_add_(-1, self._ids, change.to(gradient.dtype))


class _Drawn:
    """Cross-entropy: KL but for the teacher's entropy, which draws do not tell.

    Value and gradient are the full ones in expectation. The gradient counts the student's
    normaliser once, not by the sum of the weights: it is `q - weights`, without that sum's noise.
    """

    def __init__(self, targets: WeightedTargets, temperature: float) -> None:
        self._ids, self._temperature = targets.ids, temperature
        self._weights = targets.at(temperature)

    def read(self, logits: Tensor) -> None:
        self._z = logits.gather(-1, self._ids) / self._temperature

    def value(self, log_z: Tensor) -> Tensor:
        held = log_z.detach()
        log_q = (self._z - held.unsqueeze(-1)).clamp(min=_FLOOR)
        return log_z - held - (self._weights * log_q).sum(-1)

    def spread(self) -> Tensor:
        return torch.ones_like(self._z[:, :1])

    def correct(self, gradient: Tensor, weight: float) -> None:
        weights = self._weights.masked_fill(self._z.isneginf(), 0)
        gradient.scatter_add_(-1, self._ids, (-weight * weights).to(gradient.dtype))


class _Whole:
    """KL over the whole vocabulary."""

    def __init__(self, targets: DenseTargets, temperature: float) -> None:
        self._log_p, self._temperature = targets.at(temperature), temperature

    def read(self, logits: Tensor) -> None:
        p = self._log_p.exp()
        highest = logits.detach().amax(-1, keepdim=True)
        z = logits.clamp(min=highest + _FLOOR * self._temperature) / self._temperature
        self._told = (p * (self._log_p.clamp(min=_FLOOR) - z)).sum(-1)
        # An id that the student masks is held at the floor: it has no slope.
        self._p = p.masked_fill(logits.isneginf(), 0)
        self._held = p.sum(-1) - self._p.sum(-1)

    def value(self, log_z: Tensor) -> Tensor:
        return self._told + self._p.sum(-1) * log_z + self._held * log_z.detach()

    def spread(self) -> Tensor:
        return self._p.sum(-1, keepdim=True)

    def correct(self, gradient: Tensor, weight: float) -> None:
        gradient.sub_(self._p, alpha=weight)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`p * (log p - log q)`, 0 where p is 0."""
    term = log_p.exp() * (log_p.clamp(min=_FLOOR) - log_q.clamp(min=_FLOOR))
    return torch.where(log_p > _FLOOR, term, torch.zeros_like(term))
