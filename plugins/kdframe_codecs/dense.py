"""The codec `dense`: every id's log-probability."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kdframe.api import DenseTargets, TeacherOutputs, TeacherShape

if TYPE_CHECKING:
    from kdframe_codecs import Dense


_IMPOSSIBLE = 255  # the code of probability zero
_STEP_BYTES = 4


class DenseCodec:
    """`V` log-probabilities at T = 1 for each position, little-endian, in a type of torch.

    Attributes:
        record_bytes: size of one record.
    """

    def __init__(self, config: Dense, shape: TeacherShape) -> None:
        vocab_size = shape.vocab_size
        self.record_bytes = config.record_bytes(shape)
        self._vocab_size = vocab_size
        self._dtype: torch.dtype = getattr(torch, config.precision)

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """The logits at `n` positions to records `[n, B]`.

        Stores `log_softmax(logits)`, so that large logits do not overflow. In float16 a
        log-probability below -65,504 becomes `-inf`.
        """
        stored = torch.log_softmax(outputs.logits.float(), dim=-1).to(self._dtype).contiguous()
        return stored.view(torch.uint8).cpu().numpy()

    def decode(self, records: NDArray[np.uint8]) -> DenseTargets:
        """Records `[n, B]` to targets.

        Rounding to 16 bits leaves a sum of probabilities that is not 1; the targets are
        normalised again in float32.
        """
        # A copy: torch does not take a read-only map.
        stored = torch.from_numpy(np.array(records, order="C").reshape(-1)).view(self._dtype)
        return DenseTargets.from_logits(stored.view(len(records), self._vocab_size))


class Int8Codec:
    """How many equal steps each id lies under the likeliest, `V` bytes, and the step in float32.

    A position has steps of its own: 254 lead to its least likely id, so that a log-probability
    errs by at most 1/508 of the distance between the two, and by what normalising moves. Code
    255 is probability zero.

    Attributes:
        record_bytes: size of one record.
    """

    def __init__(self, config: Dense, shape: TeacherShape) -> None:
        self.record_bytes = config.record_bytes(shape)

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """The logits at `n` positions to records `[n, B]`."""
        logits = outputs.logits.float()
        below = logits.amax(-1, keepdim=True) - logits
        impossible = below.isposinf()
        lowest = below.masked_fill(impossible, 0).amax(-1, keepdim=True)
        step = (lowest / (_IMPOSSIBLE - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (below / step).round_().masked_fill_(impossible, _IMPOSSIBLE).to(torch.uint8)
        steps = step.cpu().numpy().astype("<f4").view(np.uint8)
        return np.concatenate([codes.cpu().numpy(), steps], axis=1)

    def decode(self, records: NDArray[np.uint8]) -> DenseTargets:
        """Records `[n, B]` to targets, normalised in float32."""
        # Copies: torch does not take a read-only map.
        step = torch.from_numpy(np.array(records[:, -_STEP_BYTES:], order="C").view("<f4"))
        codes = torch.from_numpy(np.array(records[:, :-_STEP_BYTES], order="C"))
        steps = codes.float().masked_fill_(codes == _IMPOSSIBLE, torch.inf)
        return DenseTargets.from_logits(steps.mul_(-step))
