"""How much of the teacher a codec gives back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe.api import DenseTargets, TeacherOutputs, TeacherShape, TruncatedTargets
from kdframe.fidelity import Fidelity, compare
from kdframe.targets import WeightedTargets
from kdframe_codecs import TopK
from kdframe_logit_kd import LogitKD

N, V = 6, 40


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_truth_itself_has_no_error(temperature):
    teacher = logits(0)
    found = compare(DenseTargets.from_logits(teacher), teacher, logits(1), temperature)
    assert found.positions == N
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.gradient_error == pytest.approx(0, abs=1e-6)
    assert found.gradient_angle == pytest.approx(0, abs=0.1)
    assert found.gradient_size == pytest.approx(1)
    assert found.support == N


def test_entropy_is_the_teachers():
    even = torch.zeros(N, V)
    found = compare(DenseTargets.from_logits(even), even, logits(1), 2.0)
    assert found.entropy / N == pytest.approx(math.log(V))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 2.0, 4.0]), st.integers(1, 20))
def test_the_error_is_that_of_the_gradient_that_the_loss_gives(seed, temperature, k):
    """logit_kd's own gradient, once from the truth and once from what was kept."""
    teacher, student = logits(seed), logits(seed + 1)
    codec = TopK(k=k).build(TeacherShape(V))
    kept = codec.decode(codec.encode(TeacherOutputs.of(teacher)))
    loss = LogitKD(alpha=0, temperature=temperature).build()

    def gradient(targets):
        leaf = student.clone().requires_grad_()
        loss(leaf, targets, torch.zeros(N, dtype=torch.int64)).total.sum().backward()
        return leaf.grad

    right, coded = gradient(DenseTargets.from_logits(teacher)), gradient(kept)
    found = compare(kept, teacher, student, temperature)
    assert found.gradient_error == pytest.approx(
        float((coded - right).norm() / right.norm()), rel=1e-3, abs=1e-5
    )
    assert found.gradient_size == pytest.approx(float(coded.norm() / right.norm()), rel=1e-3)


def test_what_lies_outside_the_kept_ids_is_seen():
    teacher = logits(3)
    ids = teacher.topk(3).indices
    log_probs = teacher.log_softmax(-1).gather(-1, ids)
    kept = TruncatedTargets(ids, log_probs, (1.0,), torch.zeros(N, 1))
    found = compare(kept, teacher, logits(4), 1.0)
    assert found.support == pytest.approx(float(log_probs.exp().sum()), rel=1e-5)
    assert found.mean_kl > 0.01


def test_draws_have_an_error_but_no_divergence():
    ids = torch.zeros(N, 1, dtype=torch.int64)
    found = compare(WeightedTargets(ids, torch.ones(N, 1), 1.0), logits(0), logits(1), 1.0)
    assert math.isnan(found.mean_kl)
    assert found.gradient_error > 0.1


def test_chunks_add_up():
    teacher, student = logits(0), logits(1)
    whole = compare(DenseTargets.from_logits(teacher + logits(2)), teacher, student, 1.0)
    parts = Fidelity()
    for half in (slice(0, 2), slice(2, N)):
        targets = DenseTargets.from_logits((teacher + logits(2))[half])
        parts += compare(targets, teacher[half], student[half], 1.0)
    assert parts.gradient_error == pytest.approx(whole.gradient_error, rel=1e-5)
    assert parts.mean_kl == pytest.approx(whole.mean_kl, rel=1e-5)
