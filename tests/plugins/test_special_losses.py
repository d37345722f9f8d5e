"""The losses that know an id's rank, its part of the mass, or the label."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdframe.api import DenseTargets
from kdframe.testing.losses import targets_of
from kdframe_divergences import AdaptiveKL, DecoupledKD, ForwardKL, Ranking, ReverseKL
from tests.plugins.divergence_kit import (
    PROPERTY,
    adaptive,
    by_formula,
    kl,
    made,
    probabilities,
    seeds,
    soft,
    temperatures,
)


@given(seeds, st.sampled_from(["dense", "truncated"]), st.floats(0.01, 0.99))
@PROPERTY
def test_adaptive_lies_between_forward_and_reverse(seed, form, head):
    student, teacher, _ = made(seed)
    targets = targets_of(form, teacher, (1.0,))
    both = torch.stack([soft(c, student, targets) for c in (ForwardKL(), ReverseKL())])
    found = soft(AdaptiveKL(head=head), student, targets)
    assert (found >= both.amin(0) - 1e-9).all()
    assert (found <= both.amax(0) + 1e-9).all()


def test_the_head_of_a_flat_teacher_is_found_beyond_the_first_few_hundred_ids():
    teacher = torch.linspace(0, 0.1, 3000).double()[None]
    student = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0)).double()
    p, q = probabilities(teacher, 1), probabilities(student, 1)
    found = soft(AdaptiveKL(), student, DenseTargets(teacher.log_softmax(-1)))
    torch.testing.assert_close(found, by_formula(adaptive, p, q, 1))


@given(seeds, temperatures)
@PROPERTY
def test_decoupled_kd_is_its_formula(seed, temperature):
    student, teacher, labels = made(seed)
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    wanted = []
    for a, b, label in zip(p, q, labels.tolist(), strict=True):
        pairs = [np.array([x[label], 1 - x[label]]) for x in (a, b)]
        others = [np.delete(x, label) / (1 - x[label]) for x in (a, b)]
        wanted.append(temperature**2 * (0.7 * kl(*pairs) + 3 * kl(*others)))
    config = DecoupledKD(target=0.7, others=3, temperature=temperature)
    found = soft(config, student, DenseTargets(teacher.log_softmax(-1)), labels)
    torch.testing.assert_close(found, torch.tensor(np.array(wanted)), rtol=1e-7, atol=1e-9)


def test_decoupled_kd_is_kl_once_its_second_part_has_the_teacher_s_doubt():
    student, teacher, labels = made(0, n=1)
    doubt = 1 - float(torch.softmax(teacher, -1)[0, labels[0]])
    targets = DenseTargets(teacher.log_softmax(-1))
    found = soft(DecoupledKD(others=doubt), student, targets, labels)
    torch.testing.assert_close(found, soft(ForwardKL(), student, targets))


def test_a_teacher_that_is_wholly_sure_says_nothing_of_the_others():
    student, teacher, labels = made(0)
    teacher = torch.full_like(teacher, -torch.inf).scatter(-1, labels[:, None], 0.0)
    found = soft(DecoupledKD(target=0), student, DenseTargets(teacher), labels)
    assert not found.any()


@given(seeds, temperatures, st.integers(1, 9), st.integers(0, 5))
@PROPERTY
def test_ranking_is_the_likelihood_of_drawing_the_teacher_s_order(seed, temperature, k, more):
    student, teacher, _ = made(seed)
    weights = np.exp(student.numpy() / temperature)
    wanted = []
    for w, t in zip(weights, teacher.numpy(), strict=True):
        left, likelihood = w.sum(), 0.0
        for i in np.argsort(-t)[:k]:
            likelihood += math.log(w[i] / left)
            left -= w[i]
        wanted.append(-(temperature**2) * likelihood / k)
    config = Ranking(k=k, temperature=temperature)
    for form in ("dense", "truncated"):
        targets = targets_of(form, teacher, (temperature,), k + more)
        found = soft(config, student, targets)
        torch.testing.assert_close(found, torch.tensor(np.array(wanted)), rtol=1e-7, atol=1e-9)


def test_ranking_knows_the_order_alone():
    student, teacher, _ = made(2)
    config = Ranking(k=4)
    targets = DenseTargets(teacher.log_softmax(-1))
    sharper = DenseTargets((5 * teacher).log_softmax(-1))
    torch.testing.assert_close(soft(config, student, targets), soft(config, student, sharper))
    right, sure = soft(config, teacher, targets), soft(config, 50 * teacher, targets)
    assert (sure < right).all()
