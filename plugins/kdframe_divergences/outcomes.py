"""The two distributions that a divergence compares, as log-probabilities of the same outcomes.

Everything is finite: what is impossible has a log-probability so low that its probability is 0 or
next to it. Letters: `n` positions, `m` outcomes, `k` kept ids, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdframe.api import DenseTargets, TruncatedTargets

LOWEST = -1e4  # under the row's highest score: exp of it is 0
IMPOSSIBLE = -100.0  # log-probability of an id that the teacher masks; 0 or so, with a slope to it
UNSEEN = 5e-7  # the most that a tail can hold which float32 cannot tell from none


@dataclass(frozen=True)
class Sides:
    """Teacher and student over the same `m` outcomes.

    Attributes:
        log_p, log_q: `[n, m]` nats, finite; the teacher's has no gradient.
        ids: how many of the outcomes are single ids; the last, if any is left, is all others.
    """

    log_p: Tensor
    log_q: Tensor
    ids: int


def scores(logits: Tensor, temperature: float) -> Tensor:
    """`logits [n, V]` over T, finite: `-inf` is held far below the highest, without a gradient."""
    z = logits / temperature
    return z.clamp(min=z.detach().amax(-1, keepdim=True) + LOWEST)


def grouped(z: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """Scores of some ids, and of all others as one.

    Args:
        z: `[n, V]` finite scores.
        ids: `[n, k]`; where not `kept [n, k]`, an id is a filler and may stand there twice.

    Returns:
        `[n, k + 1]`; their log-softmax is that of `z`, with the others summed.
    """
    lowest = z.detach().amax(-1, keepdim=True) + LOWEST
    mine = torch.where(kept, z.gather(-1, ids), lowest)
    # A filler points at an id that is kept, so that every mark on an id says the same.
    first = ids.gather(-1, kept.int().argmax(-1, keepdim=True))
    marks = kept.any(-1, keepdim=True).expand(ids.shape)
    taken = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, torch.where(kept, ids, first), marks)
    others = torch.logsumexp(torch.where(taken, lowest, z), dim=-1, keepdim=True)
    return torch.cat([mine, others], dim=-1)


def sides(
    targets: TruncatedTargets | DenseTargets,
    logits: Tensor,
    temperature: float,
    tail: Literal["bucket", "renormalise"],
) -> Sides:
    """Both distributions at a temperature, over the outcomes that the targets tell of."""
    z = scores(logits, temperature)
    if isinstance(targets, DenseTargets):
        log_p = _held(targets.at(temperature))
        return Sides(log_p, torch.log_softmax(z, dim=-1), log_p.shape[-1])
    kept = ~targets.log_probs.isneginf()
    log_q = torch.log_softmax(grouped(z, targets.ids, kept), dim=-1)
    log_p, rest = targets.at(temperature)
    if tail == "bucket":
        rest = _seen(rest, log_q[:, -1].detach())
    else:
        log_p, rest = _renormalised(log_p)
    log_p = _held(torch.cat([log_p, rest.unsqueeze(-1)], dim=-1))
    return Sides(log_p, log_q, targets.ids.shape[-1])


def _held(log_p: Tensor) -> Tensor:
    return log_p.masked_fill(log_p.isneginf(), IMPOSSIBLE)


def _seen(rest: Tensor, student: Tensor) -> Tensor:
    """A tail of which float32 tells nothing is as the student has it, up to what it can hide.

    Else a divergence that weighs by q would take it for impossible, and be no lower bound.
    """
    hidden = student.clamp(max=torch.log(rest.new_tensor(UNSEEN)))
    return torch.where(rest.isneginf(), hidden, rest)


def _renormalised(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The kept ids share all the mass; a row that keeps none leaves it to the others."""
    total = torch.logsumexp(log_p, dim=-1)
    none = total.isneginf()
    shared = log_p - total.masked_fill(none, 0).unsqueeze(-1)
    return shared, torch.zeros_like(total).masked_fill(~none, -torch.inf)
