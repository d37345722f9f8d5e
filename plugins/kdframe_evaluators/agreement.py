"""How close a student is to its teacher's cached predictions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdframe.api import ChunkTargets, Figure, Subject, TruncatedTargets, WeightedTargets


def evaluate(subject: Subject) -> dict[str, Figure]:
    """`kl_to_teacher` (nats per counted token at T = 1) and `top1_agreement` (share of tokens).

    Nothing for the teacher itself, nor where the cache does not cover the set or holds draws.
    Targets that are truncated give the KL over their kept ids and the tail as one outcome: a
    lower bound.
    """
    if subject.role == "teacher" or not subject.has_targets:
        return {}
    sums = subject.per_row(_compare)
    counted = float(sums["counted"].sum())
    if not counted:
        return {}
    return {
        "kl_to_teacher": Figure(float(sums["kl"].sum()) / counted, "lower"),
        "top1_agreement": Figure(float(sums["top1"].sum()) / counted, "higher"),
    }


def _compare(logits: Tensor, labels: Tensor, targets: ChunkTargets | None) -> Mapping[str, Tensor]:
    if targets is None or isinstance(targets, WeightedTargets):
        nothing = logits.new_zeros(len(labels))
        return {"kl": nothing, "top1": nothing, "counted": nothing}
    log_q = torch.log_softmax(logits, dim=-1)
    if isinstance(targets, TruncatedTargets):
        log_p, log_p_tail = targets.at(1.0)
        # An id that the teacher gives nothing is none of the kept: it may stand there twice.
        kept = log_q.gather(-1, targets.ids).masked_fill(log_p.isneginf(), -torch.inf)
        tail = torch.log1p(-kept.exp().sum(-1).clamp(max=1 - 2.0**-24))
        kl = _kl(log_p, kept).sum(-1) + _kl(log_p_tail, tail)
        best = targets.ids.gather(-1, targets.log_probs.argmax(-1, keepdim=True)).squeeze(-1)
    else:
        log_p = targets.at(1.0)
        kl = _kl(log_p, log_q).sum(-1)
        best = log_p.argmax(-1)
    top1 = (logits.argmax(-1) == best).float()
    return {"kl": kl, "top1": top1, "counted": torch.ones_like(kl)}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    term = log_p.exp() * (log_p - log_q)
    return torch.where(log_p.isneginf(), torch.zeros_like(term), term)
