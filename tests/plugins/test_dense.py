"""The codec `dense`: every log-probability, at any temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe.api import TeacherOutputs, TeacherShape
from kdframe_codecs import Dense

PRECISIONS = ("float32", "float16", "bfloat16", "int8")
# Largest relative error of a log-probability: half a unit in the last place.
ERROR = {"float32": 2**-22, "float16": 2**-11, "bfloat16": 2**-8}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PRECISIONS),
    st.integers(0, 5),
    st.integers(1, 70),
    st.floats(0, 30),
    st.integers(0, 2**20),
)
def test_a_distribution_comes_back_normalised_and_close(precision, n, vocab_size, scale, seed):
    logits = torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    codec = Dense(precision=precision).build(TeacherShape(vocab_size))
    records = codec.encode(TeacherOutputs.of(logits))
    assert records.dtype == np.uint8
    assert records.shape == (n, codec.record_bytes)
    back = codec.decode(records).log_probs
    true = logits.log_softmax(-1)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back.exp().sum(-1), torch.ones(n))
    if precision == "int8":  # half a step, of 254 down to the least likely id
        allowed = (true.amax(-1, keepdim=True) - true.amin(-1, keepdim=True)) / 508
    else:
        allowed = ERROR[precision] * true.abs()
    assert ((back - true).abs() <= allowed + allowed.amax(-1, keepdim=True) + 2e-5).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_impossible_ids_stay_impossible_and_large_logits_do_not_overflow(precision):
    codec = Dense(precision=precision).build(TeacherShape(4))
    logits = torch.tensor([[70_000.0, -torch.inf, 70_000.0, -70_000.0]])
    back = codec.decode(codec.encode(TeacherOutputs.of(logits))).log_probs
    assert back[0, 1] == -torch.inf
    torch.testing.assert_close(back[0, [0, 2]].exp(), torch.tensor([0.5, 0.5]))
    assert back[0, 3].exp() == 0


def test_the_record_is_as_large_as_the_config_says():
    for precision, size in (
        ("float32", 400),
        ("float16", 200),
        ("bfloat16", 200),
        ("int8", 104),
    ):
        config = Dense(precision=precision)
        assert config.record_bytes(TeacherShape(100)) == size
        assert config.build(TeacherShape(100)).encode(
            TeacherOutputs.of(torch.zeros(3, 100))
        ).shape == (3, size)


def test_a_read_only_map_decodes():
    codec = Dense().build(TeacherShape(7))
    records = codec.encode(TeacherOutputs.of(torch.randn(3, 7)))
    expected = codec.decode(records).log_probs
    records.flags.writeable = False
    torch.testing.assert_close(codec.decode(records).log_probs, expected)
