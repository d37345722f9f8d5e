"""The codec `hidden`: the whole distribution at any temperature, from the final hidden state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe.api import InputError, TeacherOutputs, TeacherShape
from kdframe_codecs import Hidden, Hybrid, Klt
from tests.plugins.hidden_kit import built, coded, mean_kl, normal, outputs

PRECISIONS = ("float16", "int8")


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(PRECISIONS),
    st.integers(0, 4),
    st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0, 1e4, 1e30]),
    st.integers(0, 2**20),
)
def test_any_finite_state_comes_back_within_its_rounding(precision, n, size, seed):
    states = normal(n, 24, seed=seed) * size
    sample = outputs(50)
    back = coded(Hidden(precision=precision), sample, TeacherOutputs(states, sample.head)).hidden
    assert back.isfinite().all()
    largest = states.abs().amax(-1, keepdim=True)
    # int8: half a step of the widest number's scale, whose spread here is at most 10 times another.
    allowed = states.abs() * 2**-11 + largest * 2**-28 if precision == "float16" else largest / 25
    assert ((back - states).abs() <= allowed + 2e-38).all()


def test_one_large_number_does_not_overflow_and_leaves_the_others():
    states = normal(3, 24)
    states[:, 5] = torch.tensor([1e5, 3e38, -7e4])
    sample = outputs(50)
    back = coded(Hidden(), sample, TeacherOutputs(states, sample.head)).hidden
    torch.testing.assert_close(back[[0, 2]], states[[0, 2]], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back[1, 5], states[1, 5], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_float16_gives_the_distribution_at_every_temperature(temperature):
    sample, fresh = outputs(100), outputs(200, seed=50)
    assert mean_kl(coded(Hidden(), sample, fresh), fresh, temperature) < 1e-5


def test_int8_is_coarser_and_smaller():
    sample, fresh = outputs(100), outputs(200, seed=50)
    targets = coded(Hidden(precision="int8"), sample, fresh)
    assert 1e-7 < mean_kl(targets, fresh, 1.0) < 5e-3
    torch.testing.assert_close(targets.dense().log_probs.exp().sum(-1), torch.ones(200))


def test_int8_serves_numbers_that_are_always_large():
    """As the final states of language models have."""
    sample, fresh = outputs(100), outputs(200, seed=50)
    for some in (sample, fresh):
        some.hidden[:, 3] += 60
    few = mean_kl(coded(Hidden(precision="int8"), sample, fresh), fresh, 1.0)
    unfitted = outputs(0)  # tells nothing of the spread
    assert few < mean_kl(coded(Hidden(precision="int8"), unfitted, fresh), fresh, 1.0) / 4


@pytest.mark.parametrize(
    "more", [{"bias": normal(300)}, {"scale": 0.25}, {"soft_cap": 5.0}, {"scale": 3, "soft_cap": 9}]
)
def test_bias_scale_and_soft_cap_are_kept(more):
    sample = outputs(60, **more)
    right = sample.logits.log_softmax(-1)
    found = coded(Hidden(), sample, sample).dense().log_probs
    torch.testing.assert_close(found, right, rtol=2e-3, atol=5e-3)


def test_half_precision_states_lose_nothing():
    sample = outputs(60)
    states = sample.hidden.bfloat16()
    back = coded(Hidden(), sample, TeacherOutputs(states, sample.head)).hidden
    assert torch.equal(back, states.float())


@pytest.mark.parametrize("config", [Hidden(), Klt(), Hybrid()])
def test_a_teacher_of_unknown_width_is_refused(config):
    with pytest.raises(InputError, match=r"`hidden_size`; use the codec 'topk'"):
        config.record_bytes(TeacherShape(300))


@pytest.mark.parametrize("config", [Hidden(), Klt(), Hybrid()])
def test_a_teacher_of_another_width_than_it_says_is_refused(config):
    with pytest.raises(InputError, match="reads 24 numbers, its configuration says 32"):
        config.build(TeacherShape(300, 32), config.fit(outputs(50)))


@pytest.mark.parametrize("config", [Hidden(), Klt(), Hybrid()])
def test_a_teacher_of_logits_alone_is_refused(config):
    with pytest.raises(InputError, match="logits alone"):
        config.fit(TeacherOutputs.of(normal(4, 300)))


@pytest.mark.parametrize("config", [Hidden(), Hidden(precision="int8"), Klt(), Hybrid()])
def test_read_only_and_strided_records_are_taken(config):
    sample = outputs(40)
    codec = built(config, sample)
    records = codec.encode(sample)
    assert records.dtype == np.uint8
    assert records.shape == (40, config.record_bytes(TeacherShape(300, 24)))
    expected = codec.decode(records).dense().log_probs
    records.flags.writeable = False
    assert torch.equal(codec.decode(records).dense().log_probs, expected)
    strided = np.repeat(records, 2, axis=0)[::2]
    assert torch.equal(codec.decode(strided).dense().log_probs, expected)
    assert len(codec.decode(codec.encode(outputs(0)))) == 0


def test_the_record_is_two_bytes_a_number_and_a_scale():
    shape = TeacherShape(49_152, 576)
    assert Hidden().record_bytes(shape) == 1156
    assert Hidden().record_bytes(shape) <= 0.012 * 2 * 49_152
    assert Hidden(precision="int8").record_bytes(shape) == 580
