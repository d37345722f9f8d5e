"""The codec `klt`: hidden states, decorrelated, with more bits for what matters more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from kdframe.api import OutputHead, TeacherOutputs, TeacherShape
from kdframe_codecs import Hybrid, Klt
from kdframe_codecs.decorrelation import decorrelating
from kdframe_codecs.output_fisher import TEMPERATURES, fisher
from tests.plugins.hidden_kit import built, coded, mean_kl, normal, outputs


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(0, 40),
    st.integers(1, 70),
    st.integers(2, 90),
    st.sampled_from([0.0, 1e-6, 1.0, 1e4, 1e30]),
    st.integers(0, 2**20),
)
def test_any_state_and_any_sample_give_a_distribution(
    bits, fitted_on, width, vocab_size, size, seed
):
    """Also fewer positions than numbers, none at all, and states unlike the sample's."""
    config = Klt(bits=bits)
    sizes = {"vocab_size": vocab_size, "width": width, "head_seed": seed}
    sample = outputs(fitted_on, **sizes)
    strange = TeacherOutputs(normal(3, width, seed=seed) * size, sample.head)
    codec = built(config, sample)
    records = codec.encode(strange)
    assert records.shape == (3, config.record_bytes(TeacherShape(vocab_size, width)))
    log_probs = codec.decode(records).dense().log_probs
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_more_bits_are_closer(temperature):
    sample, fresh = outputs(400), outputs(200, seed=50)
    kl = [
        mean_kl(coded(Klt(bits=bits), sample, fresh), fresh, temperature) for bits in (2, 4, 6, 8)
    ]
    assert kl == sorted(kl, reverse=True)
    assert kl[-1] < 3e-3


@pytest.mark.parametrize("config", [Klt(), Hybrid()])
def test_the_same_sample_gives_the_same_bytes(config):
    first, second = (save(dict(config.fit(outputs(100)))) for _ in range(2))
    assert first == second


def test_axes_do_not_turn_round():
    """An eigenvector's sign is anyone's choice; here its largest number is positive."""
    states = normal(200, 6) * torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0, 2.0])
    analysis = decorrelating(states, torch.eye(6)).analysis
    assert (analysis.diagonal() > 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(1, 30), st.integers(0, 2**20))
def test_the_transform_and_its_inverse(n, width, seed):
    half = normal(width, width, seed=seed).double()
    found = decorrelating(normal(n, width, seed=seed + 1), half @ half.T)
    there_and_back = found.analysis @ found.synthesis
    torch.testing.assert_close(there_and_back, torch.eye(width).double(), rtol=0, atol=1e-6)
    assert (found.variances.diff() <= 0).all()
    assert (found.variances > 0).all()


def test_numbers_are_uncorrelated_and_errors_cost_their_variance():
    half = normal(8, 8).double()
    metric = half @ half.T
    states = normal(4000, 8, seed=1) @ normal(8, 8, seed=2)
    found = decorrelating(states, metric)
    numbers = (states.double() - found.mean) @ found.analysis
    torch.testing.assert_close(torch.cov(numbers.T), torch.eye(8).double(), rtol=0, atol=0.05)
    cost = found.synthesis @ metric @ found.synthesis.T
    torch.testing.assert_close(cost, found.variances.diag(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"scale": 0.5}, {"soft_cap": 4.0}, {"bias": normal(300)}])
def test_the_metric_tells_what_a_small_error_costs(more):
    """Half the quadratic form is the KL, summed over T times the temperature."""
    given = outputs(30, **more)
    metric = fisher(given.head, given.hidden)
    for seed in range(3):
        error = normal(1, 24, seed=seed) * 1e-2
        other = TeacherOutputs(given.hidden.double() + error, _double(given.head))
        expected = sum(t * _mean_kl(given, other, t) for t in TEMPERATURES)
        found = float(error.double() @ metric @ error.double().T) / 2
        assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("more", [{}, {"soft_cap": 4.0}])
def test_the_metric_counts_what_is_left_when_the_likeliest_ids_are_known(more):
    given = outputs(30, **more)
    metric = fisher(given.head, given.hidden, known=10)
    ids = given.logits.topk(10).indices
    for seed in range(3):
        error = normal(1, 24, seed=seed) * 1e-2
        wrong = _double(given.head)(given.hidden.double() + error).double()
        right = _double(given.head)(given.hidden.double()).double()
        mended = _mended(right, wrong, ids)
        expected = sum(t * _kl(right / t, mended / t) for t in TEMPERATURES)
        found = float(error.double() @ metric @ error.double().T) / 2
        assert found == pytest.approx(expected, rel=0.1)


def _mended(right: torch.Tensor, wrong: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The wrong logits with the right ids and, of the others, the right mass."""
    masses = [x.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) for x in (right, wrong)]
    return (wrong + masses[0] - masses[1]).scatter(-1, ids, right.gather(-1, ids))


def _kl(right: torch.Tensor, found: torch.Tensor) -> float:
    log_p = right.log_softmax(-1)
    return float((log_p.exp() * (log_p - found.log_softmax(-1))).sum(-1).mean())


def _double(head: OutputHead):
    def logits(hidden: torch.Tensor) -> torch.Tensor:
        plain = hidden @ head.weight.double().T * head.scale
        if head.bias is not None:
            plain = plain + head.bias.double() * head.scale
        return plain if head.soft_cap is None else head.soft_cap * torch.tanh(plain / head.soft_cap)

    return logits


def _mean_kl(one: TeacherOutputs, other: TeacherOutputs, temperature: float) -> float:
    right = _double(one.head)(one.hidden.double())
    return _kl(right / temperature, other.logits / temperature)


def test_half_the_bytes_of_int8_at_four_bits():
    assert Klt(bits=4).record_bytes(TeacherShape(49_152, 576)) == 288
    assert Klt(bits=3).record_bytes(TeacherShape(300, 17)) == 7
