"""What a teacher says about a position, in the forms that a codec can decode.

Letters: `n` counted positions, `k` kept ids, `V` the vocabulary, `g` temperatures of the grid.
All probabilities are natural logarithms in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdframe.errors import InputError
from kdframe.heads import OutputHead
from kdframe.part import TargetForm

_NOTHING = 5e-7  # a share below float32's resolution of a sum near 1
_LOWEST = -1e4  # stands for log 0 where a finite slope is needed


@dataclass(frozen=True)
class TruncatedTargets:
    """The teacher's `k` likeliest ids, and the truth about how much mass the others hold.

    Attributes:
        ids: `[n, k]` int64, distinct within a row.
        log_probs: `[n, k]` float32, log p at T = 1; `-inf` where a row keeps fewer than `k` ids.
            `exp(log_probs).sum(-1) <= 1`.
        grid: the temperatures at which `log_z` is stored, ascending, beginning with 1.
        grid_log_z: `[n, g]` float32, `log_z` at each of them (0 at T = 1).
    """

    ids: Tensor
    log_probs: Tensor
    grid: tuple[float, ...]
    grid_log_z: Tensor

    form: ClassVar[TargetForm] = "truncated"

    def __len__(self) -> int:
        return self.ids.shape[0]

    def log_z(self, temperature: float) -> Tensor:
        """`[n]`: log of the sum over the whole vocabulary of `p ** (1/T)`.

        Exact on the grid. Between its points the kept ids' part is computed and only the tail's
        is interpolated. On the default grid the result is within 0.005 nats for a language
        model's distributions (peaked, flat, Zipf) and within 0.03 for mixtures made to be hard
        (measured; a polynomial through `log_z` itself errs by up to 4).

        Raises:
            InputError: `temperature` lies outside the grid.
        """
        if temperature in self.grid:
            return self.grid_log_z[:, self.grid.index(temperature)]
        if not self.grid[0] <= temperature <= self.grid[-1]:
            raise InputError(
                f"temperature {temperature} lies outside what the cache covers "
                f"({self.grid[0]} to {self.grid[-1]}); add it to the codec's `temperatures`"
            )
        nodes = [1 / t for t in self.grid]
        # No log p of the tail is above this; 2**-10 is what a rounding to float16 can hide.
        finite = self.log_probs.masked_fill(self.log_probs.isneginf(), 0)
        steepest = finite.amin(-1).clamp(min=_LOWEST) * (1 - 2**-10)
        kept = torch.stack([torch.logsumexp(self.log_probs * u, dim=-1) for u in nodes], dim=-1)
        share = (-torch.expm1(kept - self.grid_log_z)).clamp(min=_NOTHING / 4)
        tail = _mended(self.grid_log_z + share.log(), nodes, steepest)
        between = _between(tail, nodes, steepest, 1 / temperature)
        return torch.logaddexp(torch.logsumexp(self.log_probs / temperature, dim=-1), between)

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The distribution at a temperature: a bucket per kept id and one for all the others.

        Returns:
            `[n, k]` log-probabilities of the kept ids and `[n]` of the tail (the mass of every
            other id together, `-inf` where float32 can tell of none); their sum is 1.
        """
        log_probs = self.log_probs / temperature - self.log_z(temperature).unsqueeze(-1)
        rest = 1 - log_probs.exp().sum(-1)
        return log_probs, torch.where(rest > _NOTHING, rest, 0.0).log()

    def select(self, index: slice | Tensor) -> TruncatedTargets:
        """The targets of some of the positions."""
        return TruncatedTargets(
            self.ids[index], self.log_probs[index], self.grid, self.grid_log_z[index]
        )

    def to(self, device: torch.device) -> TruncatedTargets:
        """The same targets on another device."""
        ids, log_probs, log_z = (
            x.to(device, non_blocking=True) for x in (self.ids, self.log_probs, self.grid_log_z)
        )
        return TruncatedTargets(ids, log_probs, self.grid, log_z)


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's whole distribution.

    Attributes:
        log_probs: `[n, V]` float32, log p at T = 1; `-inf` is probability zero.
    """

    log_probs: Tensor

    form: ClassVar[TargetForm] = "dense"

    @classmethod
    def from_logits(cls, logits: Tensor) -> DenseTargets:
        """The targets of a live teacher: `logits [n, V]` of any float type."""
        return cls(torch.log_softmax(logits.float(), dim=-1))

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    def log_z(self, temperature: float) -> Tensor:
        """`[n]`: log of the sum over the vocabulary of `p ** (1/T)`."""
        return torch.logsumexp(self.log_probs / temperature, dim=-1)

    def at(self, temperature: float) -> Tensor:
        """`[n, V]`: the log-probabilities at a temperature."""
        return torch.log_softmax(self.log_probs / temperature, dim=-1)

    def select(self, index: slice | Tensor) -> DenseTargets:
        """The targets of some of the positions."""
        return DenseTargets(self.log_probs[index])

    def to(self, device: torch.device) -> DenseTargets:
        """The same targets on another device."""
        return DenseTargets(self.log_probs.to(device, non_blocking=True))


@dataclass(frozen=True)
class WeightedTargets:
    """Ids drawn from the teacher's distribution, with weights whose expectation is it.

    For every id `v` the expected weight (0 where it was not drawn) is `p_T(v)`: a divergence that
    is linear in p has its full gradient in expectation. A row's weights need not sum to 1.

    Attributes:
        ids: `[n, k]` int64, distinct within a row where the weight is not 0.
        weights: `[n, k]` float32, 0 where a row drew fewer than `k` ids.
        temperature: the one at which they were drawn; no other can be read.
    """

    ids: Tensor
    weights: Tensor
    temperature: float

    form: ClassVar[TargetForm] = "weighted"

    def __len__(self) -> int:
        return self.ids.shape[0]

    def at(self, temperature: float) -> Tensor:
        """`[n, k]`: the weights, at the temperature of the draw.

        Raises:
            InputError: another temperature.
        """
        if temperature != self.temperature:
            raise InputError(
                f"temperature {temperature} cannot be read from draws at {self.temperature}; "
                "set the codec's `temperature`, or use the codec 'topk'"
            )
        return self.weights

    def select(self, index: slice | Tensor) -> WeightedTargets:
        """The targets of some of the positions."""
        return WeightedTargets(self.ids[index], self.weights[index], self.temperature)

    def to(self, device: torch.device) -> WeightedTargets:
        """The same targets on another device."""
        ids, weights = (x.to(device, non_blocking=True) for x in (self.ids, self.weights))
        return WeightedTargets(ids, weights, self.temperature)


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's final hidden states: its whole distribution, once its output layer has run.

    A loss never meets this form: the engine makes `DenseTargets` of one chunk at a time.

    Attributes:
        hidden: `[n, H]` float32.
        head: the teacher's output layer.
        exact_ids, exact_log_probs: `[n, k]`, ids whose log p at T = 1 is known better than the
            hidden state tells it (`-inf`: not known).
        log_rest: `[n]`, log of the mass that the others share; None: what the exact ones leave.
            Where that is little, float32 cannot tell it from their sum.
        vocab_size: the width that was asked for with `resized`; None is the head's.
    """

    hidden: Tensor
    head: OutputHead
    exact_ids: Tensor | None = None
    exact_log_probs: Tensor | None = None
    log_rest: Tensor | None = None
    vocab_size: int | None = None

    form: ClassVar[TargetForm] = "hidden"

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def dense(self) -> DenseTargets:
        """The whole distribution, `[n, V]`."""
        logits = self.head(self.hidden)
        if self.exact_ids is None or self.exact_log_probs is None:
            found = DenseTargets.from_logits(logits)
        else:
            found = _corrected(logits, self.exact_ids, self.exact_log_probs, self.log_rest)
        return found if self.vocab_size is None else _resized_dense(found, self.vocab_size)

    def select(self, index: slice | Tensor) -> HiddenTargets:
        """The targets of some of the positions."""
        return self._each(lambda x: x[index])

    def to(self, device: torch.device) -> HiddenTargets:
        """The same targets on another device."""
        moved = self._each(lambda x: x.to(device, non_blocking=True))
        return dataclasses.replace(moved, head=self.head.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> HiddenTargets:
        ids, log_probs, rest = (
            None if x is None else change(x)
            for x in (self.exact_ids, self.exact_log_probs, self.log_rest)
        )
        hidden = change(self.hidden)
        return HiddenTargets(hidden, self.head, ids, log_probs, rest, self.vocab_size)


ChunkTargets = TruncatedTargets | DenseTargets | WeightedTargets
"""What a loss or a measure meets, for the positions of one chunk."""

TeacherTargets = ChunkTargets | HiddenTargets
"""What a codec decodes."""


def met(targets: TeacherTargets) -> ChunkTargets:
    """A chunk's targets as a loss meets them."""
    return targets.dense() if isinstance(targets, HiddenTargets) else targets


def resized(targets: TeacherTargets, vocab_size: int) -> TeacherTargets:
    """The targets for a student with `vocab_size` output rows of the same tokenizer.

    Two models of one tokenizer may pad their output rows differently; ids that only one of them
    has are no tokens. A truncated form moves what little mass they hold to the tail.
    """
    match targets:
        case HiddenTargets():
            return dataclasses.replace(targets, vocab_size=vocab_size)
        case DenseTargets():
            return _resized_dense(targets, vocab_size)
    outside = targets.ids >= vocab_size
    if not bool(outside.any()):
        return targets
    ids = targets.ids.masked_fill(outside, 0)
    if isinstance(targets, WeightedTargets):
        return dataclasses.replace(
            targets, ids=ids, weights=targets.weights.masked_fill(outside, 0)
        )
    log_probs = targets.log_probs.masked_fill(outside, -torch.inf)
    return dataclasses.replace(targets, ids=ids, log_probs=log_probs)


def _resized_dense(targets: DenseTargets, vocab_size: int) -> DenseTargets:
    missing = vocab_size - targets.log_probs.shape[-1]
    if missing == 0:
        return targets
    if missing < 0:
        return DenseTargets(torch.log_softmax(targets.log_probs[:, :vocab_size], dim=-1))
    return DenseTargets(torch.nn.functional.pad(targets.log_probs, (0, missing), value=-torch.inf))


def _corrected(
    logits: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor | None
) -> DenseTargets:
    """The distribution of logits `[n, V]`, with some probabilities replaced. Overwrites them."""
    known = ~log_probs.isneginf()
    if log_rest is None:
        log_rest = (1 - log_probs.exp().sum(-1)).clamp(min=_NOTHING).log()
    guessed = logits.gather(-1, ids)
    log_others = logits.scatter_(-1, ids, guessed.masked_fill(known, -torch.inf)).logsumexp(-1)
    log_rest = torch.where(log_others.isneginf(), log_others, log_rest)  # no others
    log_all = torch.logaddexp(log_probs.logsumexp(-1), log_rest)
    shift = torch.where(log_rest.isneginf(), log_rest, log_rest - log_others - log_all)[:, None]
    replaced = torch.where(known, log_probs - log_all[:, None], guessed + shift)
    return DenseTargets(logits.add_(shift).scatter_(-1, ids, replaced))


def _mended(tail: Tensor, nodes: Sequence[float], steepest: Tensor) -> Tensor:
    """`tail [n, g]` without what rounding did to it where the tail is almost nothing.

    The logarithm of a sum of powers `p ** u` is convex in `u`, and no steeper than its likeliest
    id; so each point is bounded by those at higher temperatures.
    """
    columns = list(tail.unbind(-1))
    for i in reversed(range(len(nodes) - 1)):
        step = nodes[i] - nodes[i + 1]
        upper = columns[i + 1] + steepest * step
        columns[i] = torch.minimum(columns[i], upper)
        if i + 2 < len(nodes):
            slope = (columns[i + 1] - columns[i + 2]) / (nodes[i + 1] - nodes[i + 2])
            lower = torch.minimum(columns[i + 1] + slope * step, upper)
            columns[i] = torch.maximum(columns[i], lower)
    return torch.stack(columns, dim=-1)


def _between(tail: Tensor, nodes: Sequence[float], steepest: Tensor, x: float) -> Tensor:
    """`[n]`: the cubic through the four points about `x`, held to what a convex function can be."""
    right = next(i for i, node in enumerate(nodes) if node < x)
    left = right - 1

    def line(i: int, j: int) -> Tensor:
        share = (x - nodes[i]) / (nodes[j] - nodes[i])
        return tail[:, i] + (tail[:, j] - tail[:, i]) * share

    lower = tail[:, left] + steepest * (x - nodes[left])
    if left > 0:
        lower = torch.maximum(lower, line(left - 1, left))
    if right + 1 < len(nodes):
        lower = torch.maximum(lower, line(right, right + 1))
    first = max(0, min(left - 1, len(nodes) - 4))
    about = slice(first, first + 4)
    cubic = tail[:, about] @ tail.new_tensor(_lagrange(nodes[about], x))
    return torch.minimum(torch.maximum(cubic, lower), line(left, right))


def _lagrange(nodes: Sequence[float], x: float) -> list[float]:
    """Weights of the polynomial through `nodes`, at `x`."""
    weights = []
    for i, node in enumerate(nodes):
        weight = 1.0
        for j, other in enumerate(nodes):
            if i != j:
                weight *= (x - other) / (node - other)
        weights.append(weight)
    return weights
