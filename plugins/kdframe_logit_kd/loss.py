"""`alpha * CE + (1 - alpha) * T^2 * KL(teacher_T || student_T)` on counted positions.

Letters: `n` positions, `V` vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdframe.api import ChunkTargets, LossTerms
from kdframe_logit_kd.soft import soft

_BLOCK = 1 << 18  # logits worked on at once: a few buffers of them fit the processor's cache


class LogitKDLoss:
    """The loss with its two settings."""

    def __init__(self, alpha: float, temperature: float) -> None:
        self.alpha = alpha
        self.temperature = temperature

    def __call__(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> LossTerms:
        """Hard and soft loss of `logits [n, V]`; both are in the terms, unweighted but for T^2."""
        temperature = self.temperature
        log_z = torch.logsumexp(logits, dim=-1)
        soft_log_z = log_z if temperature == 1 else torch.logsumexp(logits / temperature, dim=-1)
        teacher = soft(targets, temperature)
        teacher.read(logits)
        hard = log_z - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return self._terms(hard, teacher.value(soft_log_z))

    def with_gradient(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> LossTerms:
        """The same; `logits [n, V]` becomes the gradient of the summed total.

        That is `alpha * (q_1 - y) + (1 - alpha) * T * (q_T - p_T)`.
        """
        n, vocab_size = logits.shape
        rows = max(1, _BLOCK // vocab_size)
        scratch = logits.new_empty((min(rows, n) if self.temperature != 1 else 0, vocab_size))
        hard, kl = logits.new_empty(n), logits.new_empty(n)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            hard[part], kl[part] = self._overwrite(
                logits[part], scratch, targets.select(part), labels[part].unsqueeze(-1)
            )
        return self._terms(hard, kl)

    def _overwrite(
        self, z: Tensor, scratch: Tensor, targets: ChunkTargets, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and KL of a block of rows, whose logits become the gradient."""
        teacher = soft(targets, self.temperature)
        z.sub_(z.amax(-1, keepdim=True))
        teacher.read(z)
        at = z.gather(-1, labels).squeeze(-1)
        e_1 = scratch[: len(z)]
        z_1, z_t = _exponentials(z, e_1, self.temperature)
        kl = teacher.value(z_t.squeeze(-1).log())
        weight = (1 - self.alpha) * self.temperature
        spread = teacher.spread().mul_(weight) / z_t
        if self.temperature == 1:
            z.mul_(spread + self.alpha / z_1)
        else:
            z.mul_(spread).addcmul_(e_1, self.alpha / z_1)
        teacher.correct(z, weight)
        z.scatter_add_(-1, labels, z.new_full(labels.shape, -self.alpha))
        return z_1.squeeze(-1).log() - at, kl

    def _terms(self, hard: Tensor, kl: Tensor) -> LossTerms:
        scaled = self.temperature**2 * kl
        total = self.alpha * hard + (1 - self.alpha) * scaled
        return LossTerms(total, {"hard": hard, "soft": scaled})


def _exponentials(z: Tensor, e_1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`z` (at most 0) becomes `exp(z / T)`, and `e_1` `exp(z)` (unused at T = 1); sums `[n, 1]`."""
    if temperature == 1:
        z.exp_()
        total = z.sum(-1, keepdim=True)
        return total, total
    doublings = math.log2(temperature)
    if doublings in (1, 2, 3):  # a square costs less than an exponential
        z.mul_(1 / temperature).exp_()
        torch.mul(z, z, out=e_1)
        for _ in range(int(doublings) - 1):
            e_1.mul_(e_1)
    else:
        torch.exp(z, out=e_1)
        z.mul_(1 / temperature).exp_()
    return e_1.sum(-1, keepdim=True), z.sum(-1, keepdim=True)
