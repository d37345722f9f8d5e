"""A teacher's output layer as plain tensors, and what a forward pass of the teacher gives.

Letters: `n` positions, `H` the hidden width, `V` the vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class OutputHead:
    """Final hidden states (after the last norm) to logits.

    Attributes:
        weight: `[V, H]`, of any float type; bias: `[V]` or None.
        scale: what the logits are multiplied with.
        soft_cap: `logits = soft_cap * tanh(logits / soft_cap)`, where set (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    _elsewhere: dict[torch.device, OutputHead] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[n, H]` to logits `[n, V]` in float32."""
        return bent(F.linear(hidden.float(), *self._float32), self.scale, self.soft_cap)

    @property
    def vocab_size(self) -> int:
        """`V`."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """`H`."""
        return self.weight.shape[1]

    def to(self, device: torch.device) -> OutputHead:
        """The same on another device; moved once."""
        if device == self.weight.device:
            return self
        if device not in self._elsewhere:
            bias = None if self.bias is None else self.bias.to(device)
            moved = OutputHead(self.weight.to(device), bias, self.scale, self.soft_cap)
            self._elsewhere[device] = moved
        return self._elsewhere[device]

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, to be kept."""
        cap = float("nan") if self.soft_cap is None else self.soft_cap
        found = {"weight": self.weight, "bending": torch.tensor([self.scale, cap])}
        return found if self.bias is None else {**found, "bias": self.bias}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> OutputHead:
        """What `tensors` gave."""
        scale, cap = tensors["bending"].tolist()
        return cls(tensors["weight"], tensors.get("bias"), scale, None if math.isnan(cap) else cap)

    @functools.cached_property
    def _float32(self) -> tuple[Tensor, Tensor | None]:
        """Cast once: a half-precision product is slow on most processors, and less exact."""
        return self.weight.float(), None if self.bias is None else self.bias.float()


def bent(logits: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """Logits with a model's scale and soft-cap."""
    if scale != 1:
        logits = logits * scale
    return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap


class TeacherOutputs:
    """What the teacher gives at `n` positions.

    Attributes:
        hidden: `[n, H]` final hidden states (where they cannot be had: the logits).
        head: makes logits of them.
    """

    def __init__(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        self.hidden = hidden
        self.head = head

    @classmethod
    def of(cls, logits: Tensor) -> TeacherOutputs:
        """Logits `[n, V]` alone."""
        return cls(logits, lambda same: same)

    @functools.cached_property
    def logits(self) -> Tensor:
        """`[n, V]` at T = 1: made when first asked for."""
        return self.head(self.hidden)

    def __len__(self) -> int:
        return self.hidden.shape[0]
