"""Hidden states in a few bits a number: fitted, encoded and decoded. What `klt` and `hybrid` share.

Letters: `n` positions, `H` the hidden width, `D` numbers that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdframe.api import TeacherOutputs
from kdframe_codecs.byte_groups import BytePacker, allocate, order
from kdframe_codecs.decorrelation import decorrelating
from kdframe_codecs.heads import plain_head
from kdframe_codecs.output_fisher import fisher

_METRIC_POSITIONS = 1024
_BLOCK = 128  # positions whose numbers stay in the processor's cache


def fit_states(sample: TeacherOutputs, bits: int, known: int = 0) -> dict[str, Tensor]:
    """What `CodedStates` needs, and the output layer.

    Args:
        bits: for each number of a state, on average.
        known: how many of the likeliest ids are kept beside it.
    """
    head = plain_head(sample)
    some = sample.hidden[:: max(1, -(-len(sample) // _METRIC_POSITIONS))]
    transform = decorrelating(sample.hidden, fisher(head, some, known))
    groups = allocate(transform.variances.numpy(), (head.hidden_size * bits + 7) // 8)
    packer = BytePacker.fitted(groups)
    ranks = torch.from_numpy(order(groups, len(transform.mean)))
    used = (ranks >= 0).double()
    return {
        **head.tensors(),
        **packer.tensors(),
        "mean": transform.mean.float(),
        "analysis": (transform.analysis[:, ranks] * used).float(),
        "synthesis": (transform.synthesis[ranks] * used[:, None]).float(),
    }


class CodedStates:
    """Hidden states `[n, H]` to bytes `[n, size]` and back.

    Attributes:
        size: bytes of one state.
    """

    def __init__(self, fitted: Mapping[str, Tensor]) -> None:
        self._mean, self._analysis = fitted["mean"], fitted["analysis"]
        self._synthesis = fitted["synthesis"]
        self._packer = BytePacker.from_tensors(fitted)
        self.size = self._packer.size

    def encode(self, hidden: Tensor) -> NDArray[np.uint8]:
        """`[n, H]` on any device to bytes."""
        mean, analysis = (x.to(hidden.device) for x in (self._mean, self._analysis))
        return self._packer.pack(((hidden.float() - mean) @ analysis).cpu().numpy())

    def decode(self, packed: NDArray[np.uint8]) -> Tensor:
        """Bytes to `[n, H]` float32."""
        states = torch.empty(len(packed), len(self._mean))
        numbers = np.empty((min(_BLOCK, len(packed)), self._packer.places), np.float32)
        for i in range(0, len(packed), _BLOCK):
            block = packed[i : i + _BLOCK]
            self._packer.unpack(block, numbers[: len(block)])
            some = torch.from_numpy(numbers[: len(block)])
            torch.addmm(self._mean, some, self._synthesis, out=states[i : i + _BLOCK])
        return states
