"""The divergences against their formulas, their limits and the contract of a loss."""

import math
from functools import partial

import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdframe.api import DenseTargets
from kdframe.testing.losses import LossContract, targets_of
from kdframe_divergences import (
    JSD,
    AdaptiveKL,
    DecoupledKD,
    ForwardKL,
    Jeffreys,
    Ranking,
    ReverseKL,
    SkewKL,
    SkewRKL,
    TotalVariation,
)
from tests.plugins.divergence_kit import (
    F_DIVERGENCES,
    PROPERTY,
    SYMMETRIC,
    WITH_P_AND_Q,
    N,
    V,
    adaptive,
    bucketed,
    by_formula,
    made,
    probabilities,
    seeds,
    soft,
    temperatures,
)

names = st.sampled_from(sorted(WITH_P_AND_Q))
f_names = st.sampled_from(sorted(F_DIVERGENCES))


@given(names, seeds, temperatures, st.sampled_from([0.2, 3.0, 12.0]))
@PROPERTY
def test_over_the_whole_vocabulary_each_is_its_formula(name, seed, temperature, scale):
    config, formula = WITH_P_AND_Q[name]
    student, teacher, _ = made(seed, scale)
    at = config.model_copy(update={"temperature": temperature})
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    found = soft(at, student, DenseTargets(teacher.log_softmax(-1)))
    wanted = by_formula(formula, p, q, temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


@given(names, seeds, temperatures, st.integers(1, 12))
@PROPERTY
def test_of_a_truncated_teacher_each_is_its_formula_over_k_plus_1_outcomes(
    name, seed, temperature, k
):
    config, formula = WITH_P_AND_Q[name]
    student, teacher, _ = made(seed, 2.0)
    at = config.model_copy(update={"temperature": temperature})
    targets = targets_of("truncated", teacher, (temperature,), k)
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    ids = targets.ids.numpy()
    if name == "adaptive_kl":
        formula = partial(adaptive, bucket=True)
    wanted = by_formula(formula, bucketed(p, ids), bucketed(q, ids), temperature)
    torch.testing.assert_close(soft(at, student, targets), wanted, rtol=1e-6, atol=1e-8)


@given(f_names, seeds, temperatures, st.integers(1, V), st.sampled_from([0.5, 3.0, 20.0]))
@PROPERTY
def test_truncation_bounds_from_below_and_never_below_0(name, seed, temperature, k, scale):
    config, _ = F_DIVERGENCES[name]
    at = config.model_copy(update={"temperature": temperature})
    student, teacher, _ = made(seed, scale)
    bound = soft(at, student, targets_of("truncated", teacher, (temperature,), k))
    whole = soft(at, student, targets_of("dense", teacher, (temperature,)))
    # A tail below 5e-7 is hidden by float32, and is worth as much as that times a log q.
    slack = 1e-6 * float(whole.max()) + 2e-5 * temperature**2
    assert (bound <= whole + slack).all()
    assert (bound >= -slack).all()


@given(st.sampled_from(SYMMETRIC), seeds)
@PROPERTY
def test_the_symmetric_ones_are_symmetric(name, seed):
    config, _ = F_DIVERGENCES[name]
    student, teacher, _ = made(seed)
    one = soft(config, student, DenseTargets(teacher.log_softmax(-1)))
    other = soft(config, teacher, DenseTargets(student.log_softmax(-1)))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------------- limits
@given(seeds, st.sampled_from(["dense", "truncated"]))
@PROPERTY
def test_at_its_ends_each_becomes_another(seed, form):
    student, teacher, _ = made(seed, 1.0)
    targets = targets_of(form, teacher, (1.0,))

    def value(config):
        return soft(config, student, targets)

    def near(one, other):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)

    forward, reverse = value(ForwardKL()), value(ReverseKL())
    torch.testing.assert_close(value(SkewKL(skew=0)), forward)
    torch.testing.assert_close(value(SkewRKL(skew=0)), reverse)
    near(value(JSD(beta=1e-5)) / 1e-5, forward)
    near(value(JSD(beta=1 - 1e-5)) / 1e-5, reverse)
    near(value(SkewKL(skew=1 - 1e-9)), torch.zeros(N).double())
    near(value(SkewRKL(skew=1 - 1e-9)), torch.zeros(N).double())
    torch.testing.assert_close(value(Jeffreys()), forward + reverse)


def test_the_bounded_ones_are_bounded():
    """Where student and teacher agree on nothing."""
    student, teacher = torch.full((2, 1, V), -60.0).double()
    student[0, 0] = teacher[0, 1] = 60
    targets = DenseTargets(teacher.log_softmax(-1))
    assert float(soft(TotalVariation(), student, targets)) == pytest.approx(1)
    assert float(soft(JSD(), student, targets)) == pytest.approx(math.log(2))
    assert float(soft(SkewKL(skew=0.1), student, targets)) == pytest.approx(math.log(10))
    assert float(soft(SkewRKL(skew=0.1), student, targets)) == pytest.approx(math.log(10))
    assert float(soft(ReverseKL(), student, targets)) == pytest.approx(120)


@pytest.mark.parametrize("beta", [0, 1])
def test_a_jsd_that_would_be_0_everywhere_is_refused(beta):
    with pytest.raises(pydantic.ValidationError, match="beta"):
        JSD(beta=beta)


def test_a_loss_says_in_words_what_alpha_weighs():
    said = JSD(alpha=0.2, beta=0.3, temperature=2).describe()
    assert said.startswith("jsd (tail bucket) (beta 0.3), alpha 0.2: 20 % hard labels, 80 % the")
    assert "temperature 2 (some tools weigh the other way round)" in said


# -------------------------------------------------------------------------------- the contract
def contract(config, *, zero=True):
    class Kept(LossContract):
        zero_at_agreement = zero

        def config(self):
            return config

    return Kept


TestForwardKL = contract(ForwardKL())
TestForwardKLRenormalised = contract(ForwardKL(tail="renormalise"), zero=False)
TestReverseKL = contract(ReverseKL())
TestJeffreys = contract(Jeffreys(alpha=0.2))
TestJSD = contract(JSD())
TestSoftJSD = contract(JSD(alpha=0, beta=0.1, temperature=2.5))
TestSkewKL = contract(SkewKL())
TestSkewRKL = contract(SkewRKL())
TestTotalVariation = contract(TotalVariation())
TestAdaptiveKL = contract(AdaptiveKL())
TestDecoupledKD = contract(DecoupledKD(temperature=1.5))
TestRanking = contract(Ranking(), zero=False)
