"""Targets: buckets that sum to 1, a tail that is the truth, temperatures inside the grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdframe.errors import InputError
from kdframe.targets import DenseTargets, TruncatedTargets

GRID = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
BETWEEN = (1.05, 1.25, 1.75, 2.5, 3.5, 4.6)
V, K = 20_000, 64


def truncated(true: torch.Tensor, k: int, *, rounded: bool = False) -> TruncatedTargets:
    """Targets of `true [n, V]`, log-probabilities in float64; in float16 if `rounded`."""
    values, ids = true.topk(k)
    kept = values.half().float() if rounded else values.float()
    log_z = torch.stack([(true / t).logsumexp(-1) for t in GRID], dim=1)
    return TruncatedTargets(ids, kept, GRID, log_z.float())


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def peaked() -> torch.Tensor:
    logits = noise(40, 1) * 2
    logits[:, 7] = torch.linspace(3, 40, 40)
    return logits


def zipf() -> torch.Tensor:
    return -torch.linspace(0.5, 4, 16).unsqueeze(1) * torch.arange(1, V + 1).double().log()


def shelves() -> torch.Tensor:
    logits = noise(40, 2)
    logits[:, :1000] += torch.linspace(0, 20, 40).unsqueeze(1)
    logits[:, 0] += torch.linspace(0, 40, 40)
    return logits


def masked() -> torch.Tensor:
    logits = noise(20, 3) * 4
    logits[:, 200:] = -torch.inf
    return logits


def mixture() -> torch.Tensor:
    """A hundred likely ids over a crowd, at every distance: made to be hard."""
    generator = torch.Generator().manual_seed(2)
    width, step, spread = torch.rand(3, 40, 1, generator=generator, dtype=torch.float64)
    logits = noise(40, 2) * width * 4
    logits[:, :100] = (logits[:, :100] + step * 30) * (1 + spread)
    return logits


SHAPES = {
    "flat": (lambda: noise(10, 4) * 0.1, 1e-4),
    "uniform": (lambda: torch.zeros(2, V, dtype=torch.float64), 1e-4),
    "gaussian": (lambda: noise(20, 5) * 3, 1e-3),
    "peaked": (peaked, 2e-3),
    "zipf": (zipf, 5e-3),
    "masked": (masked, 2e-3),
    "shelves": (shelves, 5e-3),
    "mixture": (mixture, 3e-2),
}


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_between_grid_points_log_z_is_within_its_stated_error(shape, rounded):
    make, bound = SHAPES[shape]
    true = make().log_softmax(-1)
    targets = truncated(true, K, rounded=rounded)
    for temperature in BETWEEN:
        expected = (true / temperature).logsumexp(-1)
        error = (targets.log_z(temperature).double() - expected).abs().max()
        assert error <= bound, (shape, temperature)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 3.3, 5.0])
def test_the_tail_is_the_mass_of_every_other_id(temperature):
    true = (noise(20, 6) * 2).log_softmax(-1)
    targets = truncated(true, K)
    log_probs, tail = targets.at(temperature)
    dense = DenseTargets(true.float()).at(temperature)
    others = dense.scatter(1, targets.ids, -torch.inf)
    torch.testing.assert_close(log_probs, dense.gather(1, targets.ids), atol=1e-3, rtol=0)
    torch.testing.assert_close(tail, others.logsumexp(-1), atol=1e-3, rtol=0)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**20),
    st.sampled_from([0.0, 1.0, 10.0, 300.0]),
    st.integers(2, 60),
    st.integers(1, 60),
    st.floats(1, 5),
)
def test_buckets_sum_to_one_at_every_temperature(seed, scale, vocab_size, k, temperature):
    logits = noise(4, seed)[:, :vocab_size] * scale
    targets = truncated(logits.log_softmax(-1), min(k, vocab_size))
    log_probs, tail = targets.at(temperature)
    total = log_probs.exp().sum(-1) + tail.exp()
    torch.testing.assert_close(total, torch.ones(4), atol=1e-5, rtol=0)
    assert not tail.isnan().any()
    assert (tail <= 0).all()


def test_at_one_the_tail_is_what_the_kept_ids_leave():
    targets = truncated((noise(20, 7) * 2).log_softmax(-1), K)
    log_probs, tail = targets.at(1.0)
    assert torch.equal(log_probs, targets.log_probs)
    torch.testing.assert_close(tail.exp(), 1 - log_probs.exp().sum(-1))


def test_where_nothing_is_left_the_tail_is_minus_infinity():
    logits = torch.tensor([[50.0, 0.0, -torch.inf, -torch.inf]]).double()
    for k in (1, 2, 3, 4):
        targets = truncated(logits.log_softmax(-1), k)
        assert targets.at(1.0)[1].tolist() == [-torch.inf]


@pytest.mark.parametrize("temperature", [0.5, 0.999, 5.001, 100.0, float("nan")])
def test_outside_the_grid_is_refused(temperature):
    targets = truncated(noise(2, 0).log_softmax(-1), K)
    with pytest.raises(InputError, match="lies outside what the cache covers"):
        targets.log_z(temperature)


@pytest.mark.parametrize("grid", [(1.0, 2.0), (1.0, 2.0, 4.0), (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)])
def test_grids_of_any_size_interpolate(grid):
    true = (noise(5, 9) * 2).log_softmax(-1)
    log_z = torch.stack([(true / t).logsumexp(-1) for t in grid], dim=1).float()
    values, ids = true.topk(K)
    targets = TruncatedTargets(ids, values.float(), grid, log_z)
    error = targets.log_z(1.3).double() - (true / 1.3).logsumexp(-1)
    assert error.abs().max() < 0.2
    assert targets.log_z(1.3).dtype == torch.float32


def test_some_positions_can_be_selected():
    targets = truncated(noise(6, 1).log_softmax(-1), K)
    index = torch.tensor([4, 1])
    part = targets.select(index)
    assert len(part) == 2
    assert torch.equal(part.at(2.0)[0], targets.at(2.0)[0][index])
    assert torch.equal(targets.select(slice(1, 3)).ids, targets.ids[1:3])
    assert torch.equal(targets.to(torch.device("cpu")).log_z(2.5), targets.log_z(2.5))


def test_dense_targets_read_at_any_temperature():
    logits = noise(3, 2)[:, :50].float() * 3
    targets = DenseTargets.from_logits(logits)
    assert len(targets) == 3
    for temperature in (0.3, 1.0, 7.5):
        torch.testing.assert_close(targets.at(temperature), (logits / temperature).log_softmax(-1))
    torch.testing.assert_close(targets.log_z(1.0), torch.zeros(3), atol=1e-5, rtol=0)
    assert torch.equal(targets.select(slice(1, 2)).log_probs, targets.log_probs[1:2])
