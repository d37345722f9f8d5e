"""What `topk` reads of logits: the largest, and sums of powers at several temperatures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe_codecs.topk_logits import power_sums, powers_of, read, top


def random_logits(n: int, vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3000), st.integers(1, 40), st.integers(0, 9), st.booleans()
)
def test_the_fast_selection_selects_what_topk_does(n, vocab_size, k, seed, ties):
    logits = random_logits(n, vocab_size, seed)
    logits = logits.round() if ties else logits
    k = min(k, vocab_size)
    values, ids = top(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize(
    ("grid", "exponentials"),
    [
        ((1.0, 1.5, 2.0, 3.0, 6.0), [6.0]),
        ((1.0, 1.5, 2.0, 3.0, 4.0, 5.0), [5.0, 4.0, 3.0]),
        ((1.0,), [1.0]),
    ],
)
def test_few_exponentials_lead_to_all_temperatures(grid, exponentials):
    plan = powers_of(grid)
    assert sorted(p.temperature for p in plan) == sorted(grid)
    assert [p.temperature for p in plan if p.factors is None] == exponentials


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0]), unique=True),
    st.integers(0, 99),
)
def test_the_sums_are_those_of_the_powers(above, seed):
    x = -random_logits(3, 700, seed).abs()
    plan = powers_of([1.0, *above])
    sums = power_sums(x, None, plan, torch.empty(len(plan), 3, 700))
    for i, power in enumerate(plan):
        expected = (x.double() / power.temperature).exp().sum(-1)
        torch.testing.assert_close(sums[:, i].double(), expected, rtol=1e-5, atol=0)


def test_threads_share_the_rows_and_change_nothing():
    logits = random_logits(11, 30_000, 0)
    plan = powers_of((1.0, 2.0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = read(logits, 20, plan)
        torch.set_num_threads(3)
        shared = read(logits, 20, plan)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))
