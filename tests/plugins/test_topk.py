"""The codec `topk`: the likeliest ids, and the true mass of all others at every temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe.api import InputError, TeacherOutputs, TeacherShape, TruncatedTargets
from kdframe_codecs import TopK
from kdframe_codecs.topk import _chains, _to_float16, _top

GRID = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)


def random_logits(n: int, vocab_size: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def coded(logits: torch.Tensor, **settings) -> TruncatedTargets:
    codec = TopK(**settings).build(TeacherShape(logits.shape[1]))
    return codec.decode(codec.encode(TeacherOutputs.of(logits)))


def logits_of_any_shape():
    """Flat to one-hot, with impossible ids, of any size."""
    return st.builds(
        lambda n, v, seed, scale, offset, hidden: (
            random_logits(n, v, seed, scale) + offset
        ).masked_fill(
            torch.rand(n, v, generator=torch.Generator().manual_seed(seed)).argsort(-1)
            < int(hidden * v),
            -torch.inf,
        ),
        st.integers(1, 5),
        st.integers(1, 400),
        st.integers(0, 2**20),
        st.sampled_from([0.0, 0.1, 3.0, 30.0, 1000.0]),
        st.sampled_from([0.0, -5000.0, 70_000.0]),
        st.floats(0, 0.99),
    )


@settings(max_examples=150, deadline=None)
@given(logits_of_any_shape(), st.integers(1, 80))
def test_kept_mass_is_never_over_the_truth_and_hardly_under_it(logits, k):
    targets = coded(logits, k=k)
    true = logits.double().log_softmax(-1).gather(1, targets.ids)
    kept, expected = (x.double().exp().sum(-1) for x in (targets.log_probs, true))
    whole = k >= logits.shape[1]  # then they are normalised again
    assert (kept <= 1 + 3e-7).all()  # float32's own error of a sum near 1
    if not whole:
        assert (kept <= expected + 3e-7).all()
        # What is lost is less than the smallest value's step, some 2**-10 |log p| p <= 4e-4.
        assert (expected - kept <= 5e-4).all()
    assert torch.equal(targets.log_probs == -torch.inf, true < -65_504)
    possible = true >= -65_504
    difference = (targets.log_probs - true)[possible].abs()
    assert (difference <= 2**-10 * true[possible].abs() + 1e-6 + 5e-4 * whole).all()


@settings(max_examples=100, deadline=None)
@given(logits_of_any_shape(), st.integers(1, 80))
def test_ids_are_the_likeliest_in_falling_order(logits, k):
    ids = coded(logits, k=k).ids
    expected = logits.topk(min(k, logits.shape[1])).values
    assert torch.equal(logits.gather(1, ids), expected)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3000), st.integers(1, 40), st.integers(0, 9), st.booleans()
)
def test_the_fast_selection_selects_what_topk_does(n, vocab_size, k, seed, ties):
    logits = random_logits(n, vocab_size, seed)
    logits = logits.round() if ties else logits
    k = min(k, vocab_size)
    values, ids = _top(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


@settings(max_examples=100, deadline=None)
@given(logits_of_any_shape(), st.integers(1, 80))
def test_log_z_is_exact_on_the_grid(logits, k):
    targets = coded(logits, k=k)
    true = logits.double().log_softmax(-1)
    whole = k >= logits.shape[1]
    for temperature in GRID:
        expected = (true / temperature).logsumexp(-1)
        # Where every id is kept the rounded values are the whole distribution.
        allowed = 2e-5 + 2**-10 * 20 * whole
        assert ((targets.log_z(temperature).double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_log_z_is_exact_for_a_real_vocabulary(scale):
    logits = random_logits(8, 151_936, 1, scale) + 100
    targets = coded(logits)
    true = logits.double().log_softmax(-1)
    for temperature in GRID:
        error = targets.log_z(temperature).double() - (true / temperature).logsumexp(-1)
        assert error.abs().max() <= 2e-5


@pytest.mark.parametrize("vocab_size", [1, 2, 300, 65_536, 65_537, 151_936, 262_144])
def test_ids_of_every_vocabulary_survive(vocab_size):
    logits = torch.zeros(2, vocab_size)
    logits[0, vocab_size - 1] = 30
    logits[1, vocab_size // 2] = 30
    config = TopK(k=64)
    codec = config.build(TeacherShape(vocab_size))
    records = codec.encode(TeacherOutputs.of(logits))
    assert records.dtype == np.uint8
    assert records.shape == (2, config.record_bytes(TeacherShape(vocab_size)))
    targets = codec.decode(records)
    assert targets.ids.dtype == torch.int64
    assert targets.ids[:, 0].tolist() == [vocab_size - 1, vocab_size // 2]
    assert targets.ids.shape == targets.log_probs.shape == (2, min(64, vocab_size))


def test_where_everything_is_kept_no_tail_is_left():
    logits = random_logits(20, 50, 0)
    targets = coded(logits, k=64)
    for temperature in (1.0, 1.7, 2.0, 5.0):
        log_probs, tail = targets.at(temperature)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(20))
        assert (tail == -torch.inf).all()


def test_rounding_costs_a_language_model_next_to_nothing():
    true = random_logits(200, 5000, 3).log_softmax(-1).double()
    ids = true.topk(64).indices
    kept = coded(true.float()).log_probs.double().exp().sum(-1)
    lost = true.gather(1, ids).exp().sum(-1) - kept
    assert lost.mean() < 2e-5  # rounding each down would lose 7e-4


def test_rounding_up_needs_mass_that_was_lost_before():
    values = np.log(np.array([[0.3, 0.3, 0.2, 0.1]]))
    rounded = _to_float16(values)
    mass = np.exp(rounded.astype(np.float64)).sum(-1)
    assert 0.9 - 2e-4 < mass[0] <= 0.9  # the last value's step
    assert (np.abs(rounded - values) <= 2**-10 * np.abs(values)).all()


def test_chains_halve():
    assert _chains(GRID) == [[5.0], [4.0, 2.0, 1.0], [3.0, 1.5]]
    assert _chains((1.0,)) == [[1.0]]


def test_a_grid_of_one_temperature_serves_that_alone():
    targets = coded(random_logits(3, 500, 0), temperatures=(1.0,))
    assert (targets.log_z(1.0) == 0).all()
    with pytest.raises(InputError, match=r"2\.0 lies outside"):
        targets.at(2.0)


def test_no_positions_are_no_trouble():
    codec = TopK().build(TeacherShape(1000))
    records = codec.encode(TeacherOutputs.of(torch.empty(0, 1000)))
    assert records.shape == (0, codec.record_bytes)
    assert len(codec.decode(records)) == 0


def test_half_precision_logits_and_read_only_records_are_taken():
    codec = TopK().build(TeacherShape(1000))
    records = codec.encode(TeacherOutputs.of(random_logits(4, 1000, 0).bfloat16()))
    expected = codec.decode(records)
    records.flags.writeable = False
    assert torch.equal(codec.decode(records).log_probs, expected.log_probs)
    strided = np.repeat(records, 2, axis=0)[::2]
    assert torch.equal(codec.decode(strided).ids, expected.ids)


def truncated(log_probs: torch.Tensor, m: int) -> TruncatedTargets:
    """The `m` likeliest of a distribution, as a server gives them."""
    values, ids = log_probs.topk(m)
    return TruncatedTargets(ids, values, (1.0,), torch.zeros(len(ids), 1))


@pytest.mark.parametrize("m", [3, 8, 12])
def test_targets_that_are_truncated_already_are_kept_as_they_are(m):
    """The likeliest k of them; where there are fewer, the rest is the tail's."""
    log_probs = random_logits(20, 300, seed=4).log_softmax(-1)
    codec = TopK(k=8, temperatures=(1.0,)).build(TeacherShape(300))
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    given = truncated(log_probs, m)
    mixed = TruncatedTargets(
        given.ids[:, order], given.log_probs[:, order], given.grid, given.grid_log_z
    )
    found = codec.decode(codec.encode_truncated(mixed))
    size = min(m, 8)
    assert torch.equal(found.ids[:, :size], given.ids[:, :size])
    torch.testing.assert_close(
        found.log_probs[:, :size], given.log_probs[:, :size], rtol=1e-3, atol=1e-4
    )
    assert torch.isinf(found.log_probs[:, size:]).all()
    tail = 1 - given.log_probs[:, :size].exp().sum(-1)
    torch.testing.assert_close(found.at(1.0)[1].exp(), tail, rtol=1e-2, atol=1e-3)


def test_a_tail_that_is_not_known_is_refused():
    given = truncated(random_logits(2, 300, seed=4).log_softmax(-1), 5)
    with pytest.raises(InputError, match=r"at T = 2 does not follow .*temperatures to \[1.0\]"):
        TopK(k=8, temperatures=(1.0, 2.0)).build(TeacherShape(300)).encode_truncated(given)
    with pytest.raises(InputError, match="covers the whole vocabulary"):
        TopK(k=300, temperatures=(1.0,)).build(TeacherShape(300)).encode_truncated(given)
