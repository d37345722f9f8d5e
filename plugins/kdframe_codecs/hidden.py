"""The codec `hidden`: the teacher's final hidden state, whole.

A record is a scale (float32) and `H` numbers, float16 or int8, little-endian: the state is their
product. The scale brings the largest number of a row near the top of the type, so that nothing
overflows; for float16 it is a power of two, so that it rounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdframe.api import HiddenTargets, TeacherOutputs, TeacherShape
from kdframe_codecs.heads import kept_head

if TYPE_CHECKING:
    from kdframe_codecs import Hidden

_LARGEST = {"float16": 2.0**15, "int8": 127.0}
_SMALLEST = 2.0**-126  # float32's smallest with all its digits


class HiddenCodec:
    """`H` numbers and their scale for each position.

    Attributes:
        record_bytes: size of one record.
    """

    def __init__(self, config: Hidden, shape: TeacherShape, fitted: Mapping[str, Tensor]) -> None:
        self.record_bytes = config.record_bytes(shape)
        self._head = kept_head(shape, fitted)
        self._precision = config.precision
        self._dtype = np.dtype("<f2" if config.precision == "float16" else "i1")

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """The hidden states at `n` positions to records `[n, B]`."""
        hidden = outputs.hidden.float()
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
        return HiddenTargets(numbers.float().mul_(scale), self._head)

    def _scale(self, hidden: Tensor) -> Tensor:
        """`[n, 1]`: brings the largest of a row to the top of the type."""
        scale = hidden.abs().amax(-1, keepdim=True) / _LARGEST[self._precision]
        if self._precision == "float16":
            scale = torch.exp2(torch.frexp(scale).exponent.float())
        return torch.where(scale > 0, scale.clamp(min=_SMALLEST), 1)
