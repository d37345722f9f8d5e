"""The codec `topk`: the likeliest ids, and the true mass of all others at every temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kdframe.api import InputError, TeacherOutputs, TeacherShape, TruncatedTargets
from kdframe_codecs import TopK

GRID = (1.0, 1.5, 2.0, 3.0, 6.0)
FINE = 9  # ids that have a byte or two for their value; the others have half a byte
LAST_STEP = torch.where(torch.arange(1, 500) < FINE, 64.0, 6.0)  # nats down to the next id


def random_logits(n: int, vocab_size: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def zipf(n: int, vocab_size: int, seed: int, exponent: float = 1.2) -> torch.Tensor:
    """Logits that fall off as a language model's do."""
    ranks = torch.arange(1, vocab_size + 1).log() * exponent
    shuffled = [
        ranks[torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed + i))]
        for i in range(n)
    ]
    return -torch.stack(shuffled) + random_logits(n, vocab_size, seed, 0.5)


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


# --------------------------------------------------------------------------------- probabilities
@settings(max_examples=150, deadline=None)
@given(logits_of_any_shape(), st.integers(1, 80))
def test_kept_mass_is_never_over_the_truth_and_hardly_under_it(logits, k):
    targets = coded(logits, k=k)
    true = logits.double().log_softmax(-1).gather(1, targets.ids)
    there = targets.log_probs.isfinite()
    kept = targets.log_probs.double().exp().sum(-1)
    expected = true.exp().where(there, 0).sum(-1)
    if k >= logits.shape[1]:  # normalised again
        torch.testing.assert_close(kept, torch.ones_like(kept), rtol=0, atol=2e-6)
    else:
        assert (kept <= 1).all()
        assert (kept <= expected + 5e-7).all()  # float32's error of the sum over the vocabulary
        assert (expected - kept <= 5e-4).all()


@settings(max_examples=150, deadline=None)
@given(logits_of_any_shape(), st.integers(1, 80))
def test_a_value_errs_by_half_a_step_of_those_that_lead_to_it(logits, k):
    k = min(k, logits.shape[1] - 1)
    if not k:
        return
    targets = coded(logits, k=k)
    true = logits.double().log_softmax(-1).gather(1, targets.ids)
    there = targets.log_probs.isfinite()
    fall = -true.diff(dim=-1)
    fine = torch.arange(k - 1) < FINE - 1
    half = torch.where(fine, 0.011 * (fall + 0.3), 0.2 * (fall + 0.06))
    half = torch.where(fall > LAST_STEP[: k - 1], 0.2 * fall, half)  # up to a quarter too far
    worst = torch.nn.functional.pad(half, (1, 0)).cummax(-1).values
    # The first value, and all others with it, makes up for the mass of all errors.
    allowed = worst + worst.where(there, 0).amax(-1, keepdim=True) + 1e-3 + 1e-6 * true.abs()
    assert ((targets.log_probs - true).abs() <= allowed).masked_select(there).all()


@settings(max_examples=100, deadline=None)
@given(logits_of_any_shape(), st.integers(1, 80))
def test_only_what_is_impossible_or_next_to_it_has_no_value(logits, k):
    """What no step says counts to the tail, and so do the ids after it."""
    targets = coded(logits, k=k)
    true = logits.double().log_softmax(-1).gather(1, targets.ids)
    k = true.shape[1]
    nothing = targets.log_probs.isneginf()
    assert nothing[true.isneginf()].all()
    if k < logits.shape[1]:
        steep = -true.diff(dim=-1) > LAST_STEP[: k - 1]
        cliff = torch.nn.functional.pad(steep, (1, 0)).cumsum(-1) > 0
        assert (cliff | true.isneginf())[nothing].all()


def test_a_certain_id_is_certain():
    logits = torch.full((1, 500), -torch.inf)
    logits[0, 7] = 3
    targets = coded(logits, k=20)
    for temperature in (1.0, 1.7, 2.0, 5.0):
        log_probs, tail = targets.at(temperature)
        assert log_probs[0, 0].abs() <= 1e-6
        assert (log_probs[0, 1:] == -torch.inf).all()
        assert tail[0] == -torch.inf


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**20),
    st.sampled_from([3.0, 30.0, 1000.0]),
    st.integers(1, 80),
    st.sampled_from(GRID),
)
def test_on_the_grid_what_is_possible_is_never_given_probability_zero(seed, scale, k, temperature):
    _, tail = coded(random_logits(5, 300, seed, scale), k=k).at(temperature)
    assert (tail > -torch.inf).all()


@pytest.mark.parametrize("k", [41, 120])
def test_a_language_models_values_are_close(k):
    logits = zipf(100, 5000, 3)
    targets = coded(logits, k=k)
    off = targets.log_probs - logits.log_softmax(-1).gather(1, targets.ids)
    assert off[:, :FINE].square().mean().sqrt() < 0.01
    assert off.square().mean().sqrt() < 0.03


# -------------------------------------------------------------------------------------------- ids
@settings(max_examples=100, deadline=None)
@given(logits_of_any_shape(), st.integers(1, 80))
def test_ids_are_the_likeliest_in_falling_order(logits, k):
    ids = coded(logits, k=k).ids
    expected = logits.topk(min(k, logits.shape[1])).values
    assert torch.equal(logits.gather(1, ids), expected)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize(
    "vocab_size", [1, 2, 300, 65_536, 65_537, 131_072, 151_936, 262_144, 300_000]
)
@pytest.mark.parametrize("k", [1, 7, 64])
def test_ids_of_every_vocabulary_survive(vocab_size, k):
    logits = random_logits(3, vocab_size, 5)
    logits[0, vocab_size - 1] = 30
    logits[1, vocab_size // 2] = 30
    config = TopK(k=k)
    codec = config.build(TeacherShape(vocab_size))
    records = codec.encode(TeacherOutputs.of(logits))
    assert records.dtype == np.uint8
    assert records.shape == (3, config.record_bytes(TeacherShape(vocab_size)))
    targets = codec.decode(records)
    assert targets.ids.dtype == torch.int64
    assert targets.log_probs.dtype == torch.float32
    assert torch.equal(targets.ids, logits.topk(min(k, vocab_size)).indices)


# ------------------------------------------------------------------------------------- the tail
@settings(max_examples=150, deadline=None)
@given(logits_of_any_shape(), st.integers(1, 80))
def test_log_z_on_the_grid_is_within_half_a_code(logits, k):
    targets = coded(logits, k=k)
    true = logits.double().log_softmax(-1)
    for temperature in GRID:
        off = (targets.log_z(temperature) - (true / temperature).logsumexp(-1)).abs()
        if k >= logits.shape[1]:
            assert (off <= 0.02).all()  # of float16 values, the whole distribution
        elif temperature == 1:
            assert (off <= 1e-6).all()
        else:
            assert (off <= 0.035).all()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("vocab_size", [151_936, 262_144])
def test_log_z_of_a_real_vocabulary(scale, vocab_size):
    logits = random_logits(4, vocab_size, 1, scale) + 100
    targets = coded(logits)
    true = logits.double().log_softmax(-1)
    for temperature in GRID:
        error = targets.log_z(temperature).double() - (true / temperature).logsumexp(-1)
        assert error.abs().max() <= 0.03


@pytest.mark.parametrize("exponent", [0.8, 1.2, 2.0])
@pytest.mark.parametrize("k", [41, 120])
def test_between_the_grids_temperatures_log_z_is_hardly_worse(exponent, k):
    logits = zipf(40, 20_000, 11, exponent)
    targets = coded(logits, k=k)
    true = logits.double().log_softmax(-1)
    for temperature in (1.25, 1.7, 2.5, 4.0, 5.0):
        error = targets.log_z(temperature).double() - (true / temperature).logsumexp(-1)
        assert error.square().mean().sqrt() <= 0.02
        assert error.abs().max() <= 0.05


@settings(max_examples=60, deadline=None)
@given(logits_of_any_shape(), st.integers(1, 80), st.floats(1, 6))
def test_at_every_temperature_what_is_read_is_a_distribution(logits, k, temperature):
    log_probs, tail = coded(logits, k=k).at(temperature)
    total = log_probs.double().exp().sum(-1) + tail.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-6)


def test_ids_left_to_the_tail_do_not_spoil_it_between_the_grids_temperatures():
    logits = torch.zeros(1, 2000)
    logits[0, :15] = 20.0  # then nothing for 20 nats: no step says it
    targets = coded(logits, k=30)
    assert targets.log_probs.isneginf().any()
    true = logits.double().log_softmax(-1)
    for temperature in (1.0, 1.7, 2.5, 3.0, 5.0):
        expected = (true / temperature).logsumexp(-1)
        assert (targets.log_z(temperature) - expected).abs().max() <= 0.05


def test_where_everything_is_kept_no_tail_is_left():
    targets = coded(random_logits(20, 50, 0), k=64)
    for temperature in (1.0, 1.7, 2.0, 5.0):
        log_probs, tail = targets.at(temperature)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(20))
        assert (tail == -torch.inf).all()


def test_a_grid_of_one_temperature_serves_that_alone():
    targets = coded(random_logits(3, 500, 0), temperatures=(1.0,))
    assert (targets.log_z(1.0) == 0).all()
    with pytest.raises(InputError, match=r"2\.0 lies outside"):
        targets.at(2.0)


# ------------------------------------------------------------------------------------- settings
@settings(max_examples=100, deadline=None)
@given(st.integers(6, 3000), st.sampled_from([2, 300, 49_152, 151_936, 262_144]))
def test_as_many_ids_as_the_bytes_hold(size, vocab_size):
    shape = TeacherShape(vocab_size)
    if size < TopK(k=1).record_bytes(shape):
        with pytest.raises(InputError, match=f"{size} bytes hold no id"):
            TopK(for_bytes=size).record_bytes(shape)
        return
    k = TopK(for_bytes=size).layout(shape).k
    assert TopK(k=k).record_bytes(shape) == TopK(for_bytes=size).record_bytes(shape) <= size
    assert k == vocab_size or TopK(k=k + 1).record_bytes(shape) > size


def test_the_number_of_ids_is_set_once():
    assert (TopK().k, TopK().for_bytes) == (64, None)
    assert TopK(for_bytes=115).k is None
    assert TopK.model_validate(TopK(for_bytes=115).model_dump()) == TopK(for_bytes=115)
    for settings_ in ({"k": 4, "for_bytes": 100}, {"k": None}):
        with pytest.raises(ValidationError, match="either k or for_bytes"):
            TopK(**settings_)


@pytest.mark.parametrize(
    ("vocab_size", "k", "size"),
    [(49_152, 41, 112), (49_152, 64, 170), (131_072, 41, 118), (262_144, 41, 123)],
)
def test_a_record_is_as_small_as_is_said(vocab_size, k, size):
    """Ids of 2 bytes and up to 2 bits; values of 2, of 1 for eight ids, then of 1/2; 4 tails."""
    assert TopK(k=k).record_bytes(TeacherShape(vocab_size)) == size


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
        found.log_probs[:, :size], given.log_probs[:, :size], rtol=0, atol=0.05
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
