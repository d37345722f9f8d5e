"""How much an error of the hidden state costs, through the output layer.

Letters: `n` positions, `H` the hidden width, `V` the vocabulary, `k` ids known exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdframe.api import OutputHead

TEMPERATURES = (1.0, 2.0, 4.0)
_CHUNK = 1 << 24  # logits at once


def fisher(head: OutputHead, hidden: Tensor, known: int = 0) -> Tensor:
    """`[H, H]` float64: M such that an error d of a state costs about `½ dᵀ M d` nats of KL.

    With e the error of the logits, `KL(p_T || p̂_T) ≈ Var_{p_T}(e) / 2T²` (the second order; M
    is the Fisher information of the output layer, as in Amari 1998). The average is over the
    positions, the sum over `TEMPERATURES`, each multiplied with T so that none of them decides
    alone. An error of the state gives `e = J d`, J being the weight times the slope of the
    soft-cap. The `known` likeliest ids have no error, and the others, which share the mass that
    is left at T = 1, have `e - E_t[e]`, with t the distribution among them at T = 1.

    Args:
        hidden: `[n, H]`.
        known: how many of the likeliest ids are kept exactly.
    """
    weight = head.weight.float()
    diagonal = weight.new_zeros(len(weight))
    step = max(1, _CHUNK // len(weight))
    inner = weight.new_zeros(weight.shape[1], weight.shape[1])
    for i in range(0, len(hidden), step):
        logits = head(hidden[i : i + step])
        slope = _slope(head, logits)
        away = logits.topk(min(known, len(weight))).indices
        log_tail = torch.log_softmax(logits, -1).scatter(-1, away, -torch.inf)
        mean = _pulled(log_tail.softmax(-1).nan_to_num(), slope, weight) if known else None
        for t in TEMPERATURES:
            shares = torch.softmax(logits / t, -1).scatter(-1, away, 0)
            diagonal += (shares if slope is None else shares * slope**2).sum(0) / t
            pulled = _pulled(shares, slope, weight)
            inner += _outer(pulled, pulled) / t
            if mean is not None:
                # With m the mass: the second moment about the mean, less the square of the first.
                m = shares.sum(-1, keepdim=True)
                inner += (_outer(pulled, mean) + _outer(mean, pulled)) / t
                inner -= _outer(mean * m, mean) / t
                inner += _outer(mean * m, mean * m) / t
                inner -= (_outer(pulled, mean * m) + _outer(mean * m, pulled)) / t
    whole = (weight.T * diagonal @ weight - inner).cpu().double() / max(1, len(hidden))
    return head.scale**2 * (whole + whole.T) / 2


def _slope(head: OutputHead, logits: Tensor) -> Tensor | None:
    """`[n, V]`: what the soft-cap leaves of a logit's error; None: all of it."""
    return None if head.soft_cap is None else 1 - (logits / head.soft_cap).square()


def _pulled(shares: Tensor, slope: Tensor | None, weight: Tensor) -> Tensor:
    """`[n, H]`: the mean row of J under some shares of the ids."""
    return (shares if slope is None else shares * slope) @ weight


def _outer(one: Tensor, other: Tensor) -> Tensor:
    return one.T @ other
