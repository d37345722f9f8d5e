"""`alpha * CE + (1 - alpha) * T^2 * KL(teacher_T || student_T)` on counted positions.

Letters: `n` positions, `V` vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdframe.api import ChunkTargets, LossTerms
from kdframe_logit_kd.soft import soft

_SAFE = 60.0  # a logit: exp(60), summed over any vocabulary, is far from float32's end
_BLOCK = 1 << 20  # logits worked on at once: two buffers of them fit the processor's cache


class LogitKDLoss:
    """The loss with its two settings."""

    def __init__(self, alpha: float, temperature: float) -> None:
        self.alpha = alpha
        self.temperature = temperature

    def __call__(self, logits: Tensor, targets: ChunkTargets, labels: Tensor) -> LossTerms:
        """Hard and soft loss of `logits [n, V]`; both are in the terms, unweighted but for T^2.

        With drawn targets `soft` is a cross-entropy: KL and the teacher's entropy, which draws do
        not tell. Its expected gradient is KL's.
        """
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
        _shift(z)
        teacher.read(z)
        at = z.gather(-1, labels).squeeze(-1)
        e_t = scratch[: len(z)]
        z_1, z_t = _exponentials(z, e_t, self.temperature)
        kl = teacher.value(z_t.squeeze(-1).log())
        weight = (1 - self.alpha) * self.temperature
        spread = teacher.spread().mul_(weight) / z_t
        if self.temperature == 1:
            z.mul_(spread + self.alpha / z_1)
        else:
            z.mul_(self.alpha / z_1).addcmul_(e_t, spread)
        teacher.correct(z, weight)
        z.scatter_add_(-1, labels, z.new_full(labels.shape, -self.alpha))
        return z_1.squeeze(-1).log() - at, kl

    def _terms(self, hard: Tensor, kl: Tensor) -> LossTerms:
        scaled = self.temperature**2 * kl
        total = self.alpha * hard + (1 - self.alpha) * scaled
        return LossTerms(total, {"hard": hard, "soft": scaled})


def _shift(z: Tensor) -> None:
    """Bring rows to where their exponentials neither overflow nor all vanish.

    Most models' logits are there already, and a pass over them is saved.
    """
    highest = z.amax(-1, keepdim=True)
    if not bool(((highest >= 0) & (highest <= _SAFE)).all()):
        z.sub_(highest)


def _exponentials(z: Tensor, e_t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`z` becomes `exp(z)`, and `e_t` `exp(z / T)` (unused at T = 1); their sums `[n, 1]`."""
    if temperature == 1:
        z.exp_()
        total = z.sum(-1, keepdim=True)
        return total, total
    torch.mul(z, 1 / temperature, out=e_t)
    e_t.exp_()
    doublings = math.log2(temperature)
    if doublings in (1, 2, 3):  # a square costs a fraction of an exponential
        torch.mul(e_t, e_t, out=z)
        for _ in range(int(doublings) - 1):
            z.mul_(z)
    else:
        z.exp_()
    return z.sum(-1, keepdim=True), e_t.sum(-1, keepdim=True)
