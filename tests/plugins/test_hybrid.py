"""The codec `hybrid`: the likeliest ids exactly, the others by a coarse hidden state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe.api import HiddenTargets, OutputHead, TeacherShape
from kdframe_codecs import Hybrid, Klt, exact_ids
from tests.plugins.hidden_kit import coded, mean_kl, normal, outputs


def through_bytes(logits: torch.Tensor, k: int):
    return exact_ids.decode(exact_ids.encode(logits, k), k, logits.shape[1])


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.1, 3.0, 30.0, 1000.0]),
    st.integers(0, 2**20),
)
def test_the_ids_and_their_masses_come_back(n, vocab_size, k, size, seed):
    k = min(k, vocab_size)
    logits = normal(n, vocab_size, seed=seed) * size
    ids, log_probs, log_rest = through_bytes(logits, k)
    right = logits.double().log_softmax(-1)
    assert torch.equal(logits.gather(1, ids), logits.topk(k).values)
    masses = log_probs.exp().sum(-1) + log_rest.exp()
    torch.testing.assert_close(masses, torch.ones(n))
    true = right.gather(1, ids)
    known = ~log_probs.isneginf()
    told = (log_probs.double() - true)[known]
    # Half a step of the fourth root of the share, which is wider for the unlikely.
    half = 2 / 255 * torch.exp((true.amax(-1, keepdim=True) - true).clamp(max=23) / 4)
    allowed = (half / (1 - half / 4).clamp(min=0.3) + 0.02).expand_as(true)[known]
    assert (told.abs() <= allowed).all()
    rest = right.scatter(1, ids, torch.where(known, -torch.inf, true)).logsumexp(-1)
    assert ((log_rest.exp() - rest.exp()).abs() <= 2**-10 * rest.abs().clamp(max=10)).all()


@pytest.mark.parametrize("vocab_size", [2, 300, 65_536, 65_537, 151_936, 262_144])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_ids_of_every_vocabulary_survive(vocab_size, k):
    k = min(k, vocab_size)
    logits = normal(3, vocab_size, seed=1)
    logits[0, -1] = logits[1, vocab_size // 2] = 30.0
    ids, *_ = through_bytes(logits, k)
    assert torch.equal(ids, logits.topk(k).indices)
    shape = TeacherShape(vocab_size, 8)
    assert Hybrid(k=k).record_bytes(shape) == exact_ids.encode(logits, k).shape[1] + 4


@pytest.mark.parametrize("vocab_size", [2, 20, 300])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_it_is_closer_than_the_state_alone(vocab_size, temperature):
    sizes = {"vocab_size": vocab_size}
    sample, fresh = outputs(400, **sizes), outputs(200, seed=50, **sizes)
    targets = coded(Hybrid(), sample, fresh)
    log_probs = targets.dense().at(temperature)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(200))
    alone = mean_kl(coded(Klt(), sample, fresh), fresh, temperature)
    assert mean_kl(targets, fresh, temperature) < max(1.3 * alone, 1e-4)
    if temperature == 1:
        assert mean_kl(targets, fresh, temperature) < alone / 3


def test_a_certain_teacher_keeps_its_tail_at_other_temperatures():
    """A tail of 1e-10, which float32 cannot tell from a sum of 1, is half of the mass at T = 4."""
    logits = normal(20, 2000)
    logits[:, 7] = 32.0
    head, wrong = OutputHead(torch.eye(2000)), logits - 3
    wrong[:, 7] = 30.0
    targets = HiddenTargets(wrong, head, *through_bytes(logits, 1))
    for temperature in (1.0, 2.0, 4.0):
        right = (logits.double() / temperature).log_softmax(-1)
        torch.testing.assert_close(
            targets.dense().at(temperature).double(), right, rtol=0, atol=2e-2
        )


def test_what_float32_cannot_hold_is_still_possible():
    logits = torch.zeros(1, 40)
    logits[0, 3] = 500.0
    found = HiddenTargets(logits, OutputHead(torch.eye(40)), *through_bytes(logits, 4)).dense()
    assert found.log_probs.isfinite().all()


def test_soft_cap_scale_and_bias_are_kept():
    sample = outputs(300, soft_cap=8.0, scale=2.0, bias=normal(300))
    targets = coded(Hybrid(bits=8), sample, sample)
    assert mean_kl(targets, sample, 1.0) < 1e-3
    assert mean_kl(targets, sample, 2.0) < 1e-3


def test_positions_are_picked_and_moved_with_all_that_is_known_of_them():
    sample = outputs(10)
    targets = coded(Hybrid(k=3), sample, sample)
    whole = targets.dense().log_probs
    few = targets.select(slice(2, 5)).to(torch.device("cpu"))
    torch.testing.assert_close(few.dense().log_probs, whole[2:5])


def test_without_a_told_rest_the_others_share_what_is_left():
    head = OutputHead(torch.eye(3))
    ids, log_probs = torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.0]]).log()
    targets = HiddenTargets(torch.tensor([[1.0, 1.0, 0.0]]), head, ids, log_probs)
    found = targets.dense().log_probs.exp()
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.25, 0.5]]))


def test_at_most_340_bytes_at_the_usual_size():
    assert Hybrid().record_bytes(TeacherShape(49_152, 576)) == 337
