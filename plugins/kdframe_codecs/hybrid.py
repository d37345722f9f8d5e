"""The codec `hybrid`: the likeliest ids exactly, all others by a coarse hidden state.

A record is that of `exact_ids`, then the state's bytes (`coded_states`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdframe.api import HiddenTargets, TeacherOutputs, TeacherShape
from kdframe_codecs import exact_ids
from kdframe_codecs.coded_states import CodedStates
from kdframe_codecs.heads import kept_head

if TYPE_CHECKING:
    from kdframe_codecs.hidden_settings import Hybrid


class HybridCodec:
    """`k` ids with log p, the mass of the others, and a coded hidden state for each position.

    Attributes:
        record_bytes: size of one record.
    """

    def __init__(self, config: Hybrid, shape: TeacherShape, fitted: Mapping[str, Tensor]) -> None:
        self.record_bytes = config.record_bytes(shape)
        self._vocab_size = shape.vocab_size
        self._k = min(config.k, shape.vocab_size)
        self._head = kept_head(shape, fitted)
        self._states = CodedStates(fitted)
        self._exact = self.record_bytes - self._states.size

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """The hidden states and logits at `n` positions to records `[n, B]`."""
        exact = exact_ids.encode(outputs.logits.float(), self._k)
        return np.concatenate([exact, self._states.encode(outputs.hidden)], axis=1)

    def decode(self, records: NDArray[np.uint8]) -> HiddenTargets:
        """Records `[n, B]` to targets."""
        states = self._states.decode(records[:, self._exact :])
        exact = exact_ids.decode(records[:, : self._exact], self._k, self._vocab_size)
        return HiddenTargets(states, self._head, *exact)
