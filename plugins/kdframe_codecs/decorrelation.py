"""A linear transform that makes of hidden states numbers whose errors cost alike and add up.

Letters: `n` positions, `H` the hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 1e-6  # of the largest: what a direction costs or varies at least
_FOLDS = 4


@dataclass(frozen=True)
class Transform:
    """`(state - mean) @ analysis` are numbers of variance 1; `@ synthesis + mean` is the way back.

    Attributes:
        mean: `[H]`; analysis, synthesis: `[H, H]`, inverse to each other. All float64.
        variances: `[H]`, falling: what leaving out a number would cost, as the metric counts.
    """

    mean: Tensor
    analysis: Tensor
    synthesis: Tensor
    variances: Tensor


def decorrelating(states: Tensor, metric: Tensor) -> Transform:
    """The Karhunen–Loève transform of hidden states in the geometry of `metric`.

    With `metric = L Lᵀ`, an error of `Lᵀ state` costs its squared length; so the transform is
    that of `Lᵀ state`, whose principal axes make the squared errors of the numbers add up
    (transform coding: Goyal 2001). A number's variance is measured on other positions than those
    that gave its axis (Bartz 2016): the sample itself would tell less than the truth wherever it
    is not much larger than H.

    Args:
        states: `[n, H]`, a sample; any n, also fewer than H.
        metric: `[H, H]`, what an error costs.
    """
    states = states.cpu().double()
    metric = metric.cpu().double()
    costs, directions = torch.linalg.eigh(metric)
    root = _floored(costs).sqrt()
    mean = states.mean(0) if len(states) else states.new_zeros(states.shape[1])
    plain = (states - mean) @ (directions * root)
    axes = _axes(plain)
    variances = _floored(_variances(plain))
    spread = variances.sqrt()
    return Transform(
        mean,
        directions * root @ axes / spread,
        (spread * axes).T @ (directions / root).T,
        variances,
    )


def _axes(plain: Tensor) -> Tensor:
    """`[H, H]`: the principal axes in columns, the widest first, with their signs settled."""
    centred = plain - plain.mean(0) if len(plain) else plain
    axes: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
    largest = axes.abs().argmax(0, keepdim=True)
    return axes * axes.gather(0, largest).sign()


def _variances(plain: Tensor) -> Tensor:
    """`[H]`, falling: the mean square along axes that were found without the position."""
    folds = plain.tensor_split(max(1, min(_FOLDS, len(plain))))
    total = plain.new_zeros(plain.shape[1])
    for i, fold in enumerate(folds):
        rest = torch.cat([*folds[:i], *folds[i + 1 :], plain[:0]])
        mean = rest.mean(0) if len(rest) else rest.sum(0)
        total += ((fold - mean) @ _axes(rest)).square().sum(0)
    return (total / max(1, len(plain))).sort(descending=True).values


def _floored(values: Tensor) -> Tensor:
    highest = values.max()
    return values.clamp(min=highest * _FLOOR) if highest > 0 else torch.ones_like(values)
