"""The codec `dense`: every id's log-probability."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kdframe.api import DenseTargets, TeacherOutputs, TeacherShape

if TYPE_CHECKING:
    from kdframe_codecs import Dense


class DenseCodec:
    """`V` log-probabilities at T = 1 for each position, little-endian, in the chosen precision.

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
