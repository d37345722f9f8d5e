"""What a teacher says about a position, in the forms that a codec can decode.

Letters: `n` counted positions, `k` kept ids, `V` the vocabulary, `g` temperatures of the grid.
All probabilities are natural logarithms in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdframe.errors import InputError
from kdframe.parts import TargetForm


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

        Exact on the grid; between its points a polynomial through all of them in 1/T.

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
        weights = _lagrange([1 / t for t in self.grid], 1 / temperature)
        return self.grid_log_z @ self.grid_log_z.new_tensor(weights)

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The distribution at a temperature: a bucket per kept id and one for all the others.

        Returns:
            `[n, k]` log-probabilities of the kept ids and `[n]` of the tail (the mass of every
            other id together, `-inf` where nothing is left); their sum is 1.
        """
        log_probs = self.log_probs / temperature - self.log_z(temperature).unsqueeze(-1)
        kept = log_probs.exp().sum(-1).clamp(max=1.0)
        return log_probs, torch.log1p(-kept)

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


TeacherTargets = TruncatedTargets | DenseTargets


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
