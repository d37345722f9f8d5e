"""The contract of a loss, as tests.

A loss's test module names its settings and pytest does the rest:

    from kdframe.testing.losses import LossContract
    from my_loss import MyLoss

    class TestMyLoss(LossContract):
        def config(self):
            return MyLoss()
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdframe.api import (
    ChunkTargets,
    DenseTargets,
    LossConfig,
    LossTerms,
    TargetForm,
    TruncatedTargets,
    WeightedTargets,
)
from kdframe.chunks import Head, chunked
from kdframe.parts import AnalyticLoss

V, H = 40, 6
_FORMS: tuple[TargetForm, ...] = ("dense", "truncated", "weighted")
# A test method that subclasses share is one function with several objects.
_PROPERTY = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)
_SIZES = st.tuples(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(_FORMS))
_CHUNKS = st.integers(1, 13)


class LossContract:
    """The contract: subclass it as `Test…` and answer `config()`.

    Attributes:
        zero_at_agreement: whether the loss, all hard labels apart, is 0 where student and teacher
            agree. Looked at for terms named `soft`.
    """

    zero_at_agreement: ClassVar[bool] = True

    def config(self) -> LossConfig:
        """The settings of the loss; called more than once."""
        raise NotImplementedError

    def example(
        self, size: tuple[int, int, TargetForm], dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, ChunkTargets, Tensor]:
        """A student's logits, a teacher's targets and labels, of one size."""
        n, seed, form = size
        config = self.config()
        assume(form in config.accepts)
        random = torch.Generator().manual_seed(seed)
        teacher, student = 3 * torch.randn(2, n, V, generator=random, dtype=torch.float64)
        labels = torch.randint(0, V, (n,), generator=random)
        targets = targets_of(form, teacher, config.temperatures())
        return student.to(dtype), _as(targets, dtype), labels

    # ------------------------------------------------------------------------------ values
    @given(_SIZES)
    @_PROPERTY
    def test_it_gives_a_number_for_each_position(self, size: tuple[int, int, TargetForm]) -> None:
        """Total and named terms are `[n]` and finite."""
        student, targets, labels = self.example(size)
        found = self.config().build()(student, targets, labels)
        for value in (found.total, *found.terms.values()):
            assert value.shape == labels.shape
            assert torch.isfinite(value).all()

    @given(_SIZES)
    @_PROPERTY
    def test_a_position_does_not_know_its_neighbours(
        self, size: tuple[int, int, TargetForm]
    ) -> None:
        """Any order and any company give each position the same value."""
        student, targets, labels = self.example(size)
        loss = self.config().build()
        whole = loss(student, targets, labels).total
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(size[1]))
        order = order[: max(1, len(labels) // 2)]
        some = loss(student[order], targets.select(order), labels[order]).total
        torch.testing.assert_close(some, whole[order], rtol=1e-9, atol=1e-12)

    @given(_SIZES)
    @_PROPERTY
    def test_half_the_digits_give_the_same_value(self, size: tuple[int, int, TargetForm]) -> None:
        """In float32 as in float64, to 1e-4 of the largest position."""
        right = self.config().build()(*self.example(size)).total
        found = self.config().build()(*self.example(size, torch.float32)).total
        scale = float(right.abs().max()) + 1
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4 * scale)

    @given(_SIZES)
    @_PROPERTY
    def test_where_both_agree_there_is_nothing_to_learn(
        self, size: tuple[int, int, TargetForm]
    ) -> None:
        """The soft term is 0 against the student's own distribution."""
        if not self.zero_at_agreement or size[2] == "weighted":
            return
        student, _, labels = self.example(size)
        targets = targets_of(size[2], student, self.config().temperatures())
        soft = self.config().build()(student, targets, labels).terms.get("soft")
        if soft is not None:
            torch.testing.assert_close(soft, torch.zeros_like(soft), rtol=0, atol=1e-6)

    # --------------------------------------------------------------------------- gradients
    @given(_SIZES, st.sampled_from(["teacher", "student", "both"]))
    @_PROPERTY
    def test_an_impossible_token_makes_nothing_infinite(
        self, size: tuple[int, int, TargetForm], masked: str
    ) -> None:
        """Logits of -inf on either side leave loss and gradient finite."""
        n, seed, form = size
        config = self.config()
        assume(form in config.accepts)
        random = torch.Generator().manual_seed(seed)
        teacher, student = 3 * torch.randn(2, n, V, generator=random, dtype=torch.float64)
        if masked != "student":
            teacher[:, :4] = -torch.inf
        if masked != "teacher":
            student[:, 2:6] = -torch.inf
        labels = torch.randint(6, V, (n,), generator=random)
        leaf = student.requires_grad_()
        total = config.build()(leaf, targets_of(form, teacher, config.temperatures()), labels).total
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
        assert torch.isfinite(total).all()
        assert torch.isfinite(gradient).all()

    @given(_SIZES)
    @_PROPERTY
    def test_its_own_gradient_is_autograds(self, size: tuple[int, int, TargetForm]) -> None:
        """For a loss that gives one: the same terms, the same gradient."""
        loss = self.config().build()
        if not isinstance(loss, AnalyticLoss):
            return
        student, targets, labels = self.example(size)
        leaf = student.clone().requires_grad_()
        right = loss(leaf, targets, labels)
        (gradient,) = torch.autograd.grad(right.total.sum(), leaf)
        found = loss.with_gradient(student, targets, labels)
        torch.testing.assert_close(found.total, right.total.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(student, gradient, rtol=1e-7, atol=1e-9)

    @given(_SIZES, _CHUNKS, st.booleans())
    @_PROPERTY
    def test_chunks_change_nothing(
        self, size: tuple[int, int, TargetForm], chunk: int, matrices: bool
    ) -> None:
        """Through the engine, cut into any chunks: the loss and all gradients as of one piece."""
        _, targets, labels = self.example(size)
        one = self._through_engine(targets, labels, len(labels), matrices)
        cut = self._through_engine(targets, labels, chunk, matrices)
        for a, b in zip(one, cut, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("matrices", [True, False])
    def test_no_positions_no_loss(self, matrices: bool) -> None:
        """A batch in which nothing counts gives exactly 0, and no gradient."""
        form = next(f for f in _FORMS if f in self.config().accepts)
        targets = targets_of(form, torch.zeros(0, V).double(), self.config().temperatures())
        labels = torch.zeros(0, dtype=torch.int64)
        total, _, grad_weight = self._through_engine(targets, labels, 4, matrices)
        assert float(total) == 0
        assert not grad_weight.any()

    def _through_engine(
        self, targets: ChunkTargets, labels: Tensor, chunk: int, matrices: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and gradients of hidden states and output layer."""
        random = torch.Generator().manual_seed(len(labels))
        weight = torch.randn(V, H, generator=random, dtype=torch.float64).requires_grad_()
        hidden = torch.randn(len(labels), H, generator=random, dtype=torch.float64).requires_grad_()
        loss = _Bound(self.config(), targets, labels)
        head = Head(lambda h: h @ weight.T, [weight], weight if matrices else None)
        total, _ = chunked(loss, hidden, head, max(1, chunk))
        torch.autograd.backward(total)
        assert hidden.grad is not None
        assert weight.grad is not None
        return total.detach(), hidden.grad, weight.grad


class _Bound:
    def __init__(self, config: LossConfig, targets: ChunkTargets, labels: Tensor) -> None:
        self._loss, self._targets, self._labels = config.build(), targets, labels

    def __call__(self, logits: Tensor, part: slice) -> LossTerms:
        return self._loss(logits, self._targets.select(part), self._labels[part])

    def with_gradient(self, logits: Tensor, part: slice) -> LossTerms | None:
        if not isinstance(self._loss, AnalyticLoss):
            return None
        targets, labels = self._targets.select(part), self._labels[part]
        return self._loss.with_gradient(logits, targets, labels)


def targets_of(
    form: TargetForm, logits: Tensor, temperatures: tuple[float, ...], k: int = 7
) -> ChunkTargets:
    """The targets of a teacher with `logits [n, V]`, without any rounding.

    Args:
        temperatures: those at which they can be read (`weighted`: the first alone).
        k: ids that are kept.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    if form == "dense":
        return DenseTargets(log_p)
    if form == "weighted":
        weights, ids = torch.softmax(logits / temperatures[0], dim=-1).topk(k)
        return WeightedTargets(ids, weights * 1.1, temperatures[0])
    kept, ids = log_p.topk(k)
    grid = tuple(sorted({1.0, *temperatures}))
    log_z = [torch.logsumexp(log_p / t, dim=-1) for t in grid]
    return TruncatedTargets(ids, kept, grid, torch.stack(log_z, dim=-1))


def _as(targets: ChunkTargets, dtype: torch.dtype) -> ChunkTargets:
    match targets:
        case DenseTargets():
            return DenseTargets(targets.log_probs.to(dtype))
        case WeightedTargets():
            return WeightedTargets(targets.ids, targets.weights.to(dtype), targets.temperature)
    kept, log_z = targets.log_probs.to(dtype), targets.grid_log_z.to(dtype)
    return TruncatedTargets(targets.ids, kept, targets.grid, log_z)
