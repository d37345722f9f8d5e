"""The divergences' formulas, written out in plain float64, and what their tests share."""

import math

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from kdframe_divergences import (
    JSD,
    AdaptiveKL,
    ForwardKL,
    Jeffreys,
    ReverseKL,
    SkewKL,
    SkewRKL,
    TotalVariation,
)

V, N = 40, 6
PROPERTY = settings(max_examples=40, deadline=None)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive(p, q, mass=0.5, bucket=False):
    """The likeliest ids that reach the mass are the head; a bucket at the end is never in it."""
    head, held = [], 0.0
    for i in np.argsort(-p[: len(p) - bucket], kind="stable"):
        if held < mass:
            head.append(i)
        held += p[i]
    gap = np.abs(p - q)
    share = gap[head].sum() / gap.sum()
    return share * kl(p, q) + (1 - share) * kl(q, p)


F_DIVERGENCES = {
    "forward_kl": (ForwardKL(), kl),
    "reverse_kl": (ReverseKL(), lambda p, q: kl(q, p)),
    "jeffreys": (Jeffreys(), lambda p, q: kl(p, q) + kl(q, p)),
    "jsd": (JSD(), lambda p, q: jsd(p, q, 0.5)),
    "jsd 0.2": (JSD(beta=0.2), lambda p, q: jsd(p, q, 0.2)),
    "skew_kl": (SkewKL(skew=0.3), lambda p, q: kl(p, 0.3 * p + 0.7 * q)),
    "skew_rkl": (SkewRKL(skew=0.3), lambda p, q: kl(q, 0.7 * p + 0.3 * q)),
    "total_variation": (TotalVariation(), lambda p, q: np.abs(p - q).sum() / 2),
}
WITH_P_AND_Q = {**F_DIVERGENCES, "adaptive_kl": (AdaptiveKL(), adaptive)}
SYMMETRIC = ["jeffreys", "jsd", "total_variation"]


def made(seed, scale=3.0, n=N):
    """Logits of a student and a teacher, and labels."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, n, V, generator=random, dtype=torch.float64)
    return student, teacher, torch.randint(0, V, (n,), generator=random)


def probabilities(logits, temperature):
    return torch.softmax(logits / temperature, dim=-1).numpy()


def soft(config, logits, targets, labels=None):
    labels = torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels
    return config.build()(logits, targets, labels).terms["soft"]


def by_formula(formula, p, q, temperature):
    return torch.tensor(
        [temperature**2 * formula(*pair) for pair in zip(p, q, strict=True)], dtype=torch.float64
    )


def bucketed(p, ids):
    kept = np.take_along_axis(p, ids, axis=-1)
    return np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], axis=-1)


seeds = st.integers(0, 10**6)
temperatures = st.sampled_from([1.0, 1.7, 4.0])
