"""Divergences between a teacher's and a student's predictions, and weighted sums of losses."""

from __future__ import annotations

from kdframe.api import LossConfig, hookimpl
from kdframe_divergences.mixture import Mixture, Weighted
from kdframe_divergences.settings import (
    JSD,
    ForwardKL,
    Jeffreys,
    ReverseKL,
    SkewKL,
    SkewRKL,
    TotalVariation,
)
from kdframe_divergences.special import AdaptiveKL, DecoupledKD, Ranking

__all__ = [
    "JSD",
    "AdaptiveKL",
    "DecoupledKD",
    "ForwardKL",
    "Jeffreys",
    "Mixture",
    "Ranking",
    "ReverseKL",
    "SkewKL",
    "SkewRKL",
    "TotalVariation",
    "Weighted",
]


@hookimpl
def kdframe_losses() -> tuple[type[LossConfig], ...]:
    """The family, and mixtures."""
    return (
        ForwardKL,
        ReverseKL,
        Jeffreys,
        JSD,
        SkewKL,
        SkewRKL,
        TotalVariation,
        AdaptiveKL,
        DecoupledKD,
        Ranking,
        Mixture,
    )
