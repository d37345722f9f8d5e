"""What a cache does not tell, and how the divergences take it."""

import pydantic
import pytest
import torch
from hypothesis import given

from kdframe.api import DenseTargets, TruncatedTargets, WeightedTargets
from kdframe.testing.losses import targets_of
from kdframe_divergences import JSD, AdaptiveKL, ForwardKL, Jeffreys, Ranking, ReverseKL, SkewRKL
from kdframe_logit_kd import LogitKD
from tests.plugins.divergence_kit import (
    F_DIVERGENCES,
    PROPERTY,
    WITH_P_AND_Q,
    N,
    V,
    bucketed,
    by_formula,
    made,
    probabilities,
    seeds,
    soft,
    temperatures,
)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_a_filler_is_none_of_the_kept_ids(name):
    """A row that keeps fewer ids has id 0 with probability 0 behind them, once or more."""
    config, _ = F_DIVERGENCES[name]
    student, teacher, _ = made(3)
    teacher[:, 0] = 9.0  # the likeliest id is the one that fillers name
    kept = targets_of("truncated", teacher, (1.0,), 4)
    none = torch.full((N, 2), -torch.inf).double()
    ids = torch.cat([kept.ids, torch.zeros(N, 2, dtype=torch.int64)], -1)
    filled = TruncatedTargets(
        ids, torch.cat([kept.log_probs, none], -1), kept.grid, kept.grid_log_z
    )
    for given_config in (config, Ranking(k=5)):
        leaves = [student.clone().requires_grad_() for _ in range(2)]
        one, other = (
            soft(given_config, leaf, t) for leaf, t in zip(leaves, (kept, filled), strict=True)
        )
        torch.testing.assert_close(one, other)
        gradients = [
            torch.autograd.grad(value.sum(), leaf)[0]
            for value, leaf in zip((one, other), leaves, strict=True)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", WITH_P_AND_Q)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_a_row_that_keeps_nothing_says_nothing(name, tail):
    config, _ = WITH_P_AND_Q[name]
    if tail == "renormalise" and not config.renormalises:
        return
    student = made(1)[0].requires_grad_()
    ids, none = torch.zeros(N, 3, dtype=torch.int64), torch.full((N, 3), -torch.inf).double()
    targets = TruncatedTargets(ids, none, (1.0,), torch.zeros(N, 1).double())
    found = soft(config.model_copy(update={"tail": tail}), student, targets)
    gradient = torch.autograd.grad(found.sum(), student)[0]
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@given(seeds, temperatures)
@PROPERTY
def test_forward_kl_is_logit_kd(seed, temperature):
    student, teacher, labels = made(seed)
    for form in ("dense", "truncated", "weighted"):
        targets = targets_of(form, teacher, (temperature,))
        found = []
        for config in (ForwardKL, LogitKD):
            leaf = student.clone().requires_grad_()
            total = config(alpha=0.3, temperature=temperature).build()(leaf, targets, labels).total
            found.append((total.detach(), torch.autograd.grad(total.sum(), leaf)[0]))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_drawn_targets_have_the_full_gradient_in_expectation():
    """And the value of the cross-entropy: KL and the teacher's entropy."""
    student, teacher, _ = made(5, 1.5, n=1)
    p = torch.softmax(teacher / 2, dim=-1)
    draws = 20_000
    random = torch.Generator().manual_seed(0)
    ids = torch.multinomial(p[0], 8 * draws, replacement=True, generator=random).reshape(draws, 8)
    # One weight for each distinct id of a draw: its count / 8; a repeated id has weight 0.
    same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    first = same.int().argmax(-1) == torch.arange(8)
    weights = torch.where(first, same.sum(-1) / 8, 0.0).double()
    leaf = student.expand(draws, V).clone().requires_grad_()
    config = ForwardKL(temperature=2)
    found = soft(config, leaf, WeightedTargets(ids, weights, 2.0)).mean()
    gradient = torch.autograd.grad(found, leaf)[0].sum(0)
    exact = student.clone().requires_grad_()
    whole = soft(config, exact, DenseTargets(teacher.log_softmax(-1)))
    wanted = torch.autograd.grad(whole.sum(), exact)[0][0]
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0.01)
    entropy = -(p * p.log()).sum()
    assert found.item() == pytest.approx((whole + 4 * entropy).item(), rel=0.01)


# ----------------------------------------------------------------------------- renormalisation
@given(seeds, temperatures)
@PROPERTY
def test_renormalised_the_kept_ids_have_all_of_the_teacher_and_none_of_the_student(
    seed, temperature
):
    student, teacher, _ = made(seed, 2.0)
    targets = targets_of("truncated", teacher, (temperature,), 5)
    ids = targets.ids.numpy()
    p, q = (bucketed(probabilities(x, temperature), ids) for x in (teacher, student))
    p[:, -1] = 0
    p /= p.sum(-1, keepdims=True)
    for name in ("forward_kl", "skew_kl", "total_variation"):
        config, formula = F_DIVERGENCES[name]
        at = config.model_copy(update={"temperature": temperature, "tail": "renormalise"})
        wanted = by_formula(formula, p, q, temperature)
        torch.testing.assert_close(soft(at, student, targets), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("config", [ReverseKL, Jeffreys, JSD, SkewRKL, AdaptiveKL])
def test_renormalising_is_refused_where_the_student_s_probability_weighs(config):
    with pytest.raises(pydantic.ValidationError, match="weighs an id by the student's probability"):
        config(tail="renormalise")
