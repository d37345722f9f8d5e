"""The divergences themselves, of log-probabilities over the same outcomes: `[n, m]` to `[n]`.

The settings' classes name the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdframe_divergences.outcomes import Sides

Formula = Callable[[Sides], Tensor]
"""Both sides, `[n, m]`, to nats `[n]`."""

_FEW = 256  # ids among which the head of most distributions lies


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """`sum a (log a - log b)`."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def forward_kl(both: Sides) -> Tensor:
    """KL(p || q)."""
    return kl(both.log_p, both.log_q)


def reverse_kl(both: Sides) -> Tensor:
    """KL(q || p)."""
    return kl(both.log_q, both.log_p)


def jeffreys(both: Sides) -> Tensor:
    """KL(p || q) + KL(q || p)."""
    return ((both.log_p.exp() - both.log_q.exp()) * (both.log_p - both.log_q)).sum(-1)


def jsd(both: Sides, *, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence; `beta` is the teacher's share."""
    mixed = _mixed(both, beta)
    return beta * kl(both.log_p, mixed) + (1 - beta) * kl(both.log_q, mixed)


def skew_kl(both: Sides, *, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) q)."""
    return kl(both.log_p, _mixed(both, skew))


def skew_rkl(both: Sides, *, skew: float) -> Tensor:
    """KL(q || (1 - skew) p + skew q)."""
    return kl(both.log_q, _mixed(both, 1 - skew))


def total_variation(both: Sides) -> Tensor:
    """Half the sum of |p - q|."""
    return (both.log_p.exp() - both.log_q.exp()).abs().sum(-1) / 2


def adaptive_kl(both: Sides, *, head: float) -> Tensor:
    """The two KL, weighed by where teacher and student differ."""
    weight = _head_share(both, head)
    return weight * forward_kl(both) + (1 - weight) * reverse_kl(both)


def _mixed(both: Sides, share: float) -> Tensor:
    """log of `share * p + (1 - share) * q`, for `share` from 0 to 1."""
    if share in (0, 1):
        return both.log_p if share else both.log_q
    return torch.logaddexp(both.log_p + math.log(share), both.log_q + math.log1p(-share))


@torch.no_grad()
def _head_share(both: Sides, head: float) -> Tensor:
    """`[n]`: which share of the sum of |p - q| lies in the teacher's head."""
    p = both.log_p.exp()
    gap = (p - both.log_q.exp()).abs()
    single = p[:, : both.ids]
    sorted_p, ids = single.topk(min(_FEW, both.ids), dim=-1)
    if bool((sorted_p.sum(-1) < head).any()):
        sorted_p, ids = single.sort(dim=-1, descending=True)
    before = sorted_p.cumsum(-1) - sorted_p
    in_head = (gap.gather(-1, ids) * (before < head)).sum(-1)
    whole = gap.sum(-1)
    return torch.where(whole > 0, in_head / whole.clamp(min=torch.finfo(p.dtype).tiny), 0.5)
