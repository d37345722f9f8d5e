"""The codec `hidden`: the teacher's final hidden state, whole.

A record is a scale (float32) and `H` numbers, float16 or int8, little-endian. Their product is the
state, in int8 after each number is divided by how far it usually spreads. The scale brings the
largest number of a row near the top of the type, so that nothing overflows; for float16 it is a
power of two, which rounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdframe.api import HiddenTargets, TeacherOutputs, TeacherShape
from kdframe_codecs.heads import kept_head, plain_head

if TYPE_CHECKING:
    from kdframe_codecs.hidden_settings import Hidden

_LARGEST = {"float16": 2.0**15, "int8": 127.0}
_NARROWEST = 1e-3  # of the widest spread: a sample may hold hardly any of a number
_SMALLEST = 2.0**-126  # float32's smallest with all its digits


def fit_hidden(sample: TeacherOutputs, precision: str) -> dict[str, Tensor]:
    """The output layer and, for int8, `spread [H]`.

    It is the root of each number's root mean square: with a row's own scale alone, the few
    numbers that are always large would take all levels from the others.
    """
    found = plain_head(sample).tensors()
    if precision == "float16" or not len(sample):
        return found
    square = sample.hidden.float().square().mean(0)
    widest = square.max().clamp(min=_SMALLEST)
    return {**found, "spread": square.clamp(min=widest * _NARROWEST**2) ** 0.25}


class HiddenCodec:
    """`H` numbers and their scale for each position.

    Attributes:
        record_bytes: size of one record.
    """

    def __init__(self, config: Hidden, shape: TeacherShape, fitted: Mapping[str, Tensor]) -> None:
        self.record_bytes = config.record_bytes(shape)
        self._head = kept_head(shape, fitted)
        self._spread = fitted.get("spread")
        self._precision = config.precision
        self._dtype = np.dtype("<f2" if config.precision == "float16" else "i1")

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """The hidden states at `n` positions to records `[n, B]`."""
        hidden = outputs.hidden.float()
        if self._spread is not None:
            hidden = hidden / self._spread.to(hidden.device)
        scale = self._scale(hidden)
        scaled = hidden / scale
        if self._precision == "int8":
            scaled = scaled.round().to(torch.int8)
        numbers = scaled.cpu().numpy().astype(self._dtype)
        scales = scale.cpu().numpy().astype("<f4")
        return np.concatenate([scales.view(np.uint8), numbers.view(np.uint8)], axis=1)

    def decode(self, records: NDArray[np.uint8]) -> HiddenTargets:
        """Records `[n, B]` to targets."""
        records = np.ascontiguousarray(records)
        scale = torch.from_numpy(records[:, :4].copy().view("<f4"))
        numbers = torch.from_numpy(records[:, 4:].copy().view(self._dtype))
        hidden = numbers.float().mul_(scale)
        return HiddenTargets(
            hidden if self._spread is None else hidden.mul_(self._spread), self._head
        )

    def _scale(self, hidden: Tensor) -> Tensor:
        """`[n, 1]`: brings the largest of a row to the top of the type."""
        scale = hidden.abs().amax(-1, keepdim=True) / _LARGEST[self._precision]
        if self._precision == "float16":
            scale = torch.exp2(torch.frexp(scale).exponent.float())
        return torch.where(scale > 0, scale.clamp(min=_SMALLEST), 1)
