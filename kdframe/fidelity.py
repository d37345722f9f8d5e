"""How much of the teacher a codec gives back: of its distribution, and of the gradient it makes.

Letters: `n` positions, `V` the vocabulary. With the true teacher p, the student q and what was
decoded p̂, all at temperature T, the gradient of the divergence with respect to the student's
logits is `q - p` (but for a factor); with the codec it is `q - p̂`. A truncated form's tail is one
outcome, whose gradient spreads its mass in the shape of q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kdframe.targets import ChunkTargets, DenseTargets, TruncatedTargets


@dataclass
class Fidelity:
    """Sums over positions at one temperature; add up those of chunks.

    Attributes:
        positions: how many.
        kl: of `KL(p || p̂)`, nats; `inf` where p̂ gives nothing to what p has. Not for draws.
        error: of `|p̂ - p|²`, the gradient's squared error.
        true: of `|q - p|²`; decoded: of `|q - p̂|²`; product: of `(q - p) · (q - p̂)`.
        entropy: of the teacher's entropy, nats; support: of the mass that p gives to the ids
            that were kept (1 for a whole distribution).
    """

    positions: float = 0.0
    kl: float = 0.0
    error: float = 0.0
    true: float = 0.0
    decoded: float = 0.0
    product: float = 0.0
    entropy: float = 0.0
    support: float = 0.0

    def __add__(self, other: Fidelity) -> Fidelity:
        sums = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        return Fidelity(*sums)

    @property
    def mean_kl(self) -> float:
        """Nats per position."""
        return self.kl / self.positions

    @property
    def gradient_error(self) -> float:
        """Relative L2 error of the gradient, over all positions and the vocabulary."""
        return math.sqrt(self.error / self.true)

    @property
    def gradient_angle(self) -> float:
        """Degrees between the two gradients."""
        cosine = self.product / math.sqrt(self.true * self.decoded)
        return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))

    @property
    def gradient_size(self) -> float:
        """Length of the decoded gradient over that of the true one."""
        return math.sqrt(self.decoded / self.true)


def compare(
    targets: ChunkTargets, teacher: Tensor, student: Tensor, temperature: float
) -> Fidelity:
    """The sums of one chunk.

    Args:
        targets: what a codec gave back for the positions.
        teacher: `[n, V]`, the teacher's true logits at T = 1; student: `[n, V]`, the student's.
    """
    log_p = torch.log_softmax(teacher.float() / temperature, dim=-1)
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    p, q = log_p.exp(), log_q.exp()
    decoded, kept = _decoded(targets, q, temperature)
    right, coded = q - p, q - decoded
    if torch.is_tensor(kept):
        support = float(p.gather(-1, targets.ids).masked_fill(~kept, 0).sum())  # type: ignore[union-attr]
    else:
        support = float(len(p))
    drawn = not isinstance(targets, (TruncatedTargets, DenseTargets))
    kl = torch.nan if drawn else float(_kl(p, log_p, decoded.clamp(min=0).log()))
    return Fidelity(
        positions=float(len(p)),
        kl=kl,
        error=_squared(decoded - p),
        true=_squared(right),
        decoded=_squared(coded),
        product=float((right * coded).sum(dtype=torch.float64)),
        entropy=-float(torch.where(p > 0, p * log_p, 0).sum(dtype=torch.float64)),
        support=support,
    )


def _decoded(targets: ChunkTargets, q: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
    """p̂ `[n, V]`, and which of the kept ids count `[n, k]` (None: all ids are there)."""
    if isinstance(targets, DenseTargets):
        return targets.at(temperature).exp(), None
    if isinstance(targets, TruncatedTargets):
        log_kept, log_tail = targets.at(temperature)
        kept = ~log_kept.isneginf()
        outside = q.scatter_add(-1, targets.ids, -q.gather(-1, targets.ids).where(kept, 0.0))
        outside = outside.clamp(min=0)
        share = log_tail.exp() / outside.sum(-1).clamp(min=torch.finfo(q.dtype).tiny)
        filled = outside * share.unsqueeze(-1)
        return filled.scatter_add(-1, targets.ids, log_kept.exp()), kept
    weights = targets.at(temperature)
    return torch.zeros_like(q).scatter_add(-1, targets.ids, weights), weights > 0


def _kl(p: Tensor, log_p: Tensor, log_decoded: Tensor) -> Tensor:
    return torch.where(p > 0, p * (log_p - log_decoded), 0).sum(dtype=torch.float64)


def _squared(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
