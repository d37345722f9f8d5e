"""The codec `klt`: the teacher's final hidden state, decorrelated, in a few bits a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdframe.api import HiddenTargets, TeacherOutputs, TeacherShape
from kdframe_codecs.coded_states import CodedStates
from kdframe_codecs.heads import kept_head

if TYPE_CHECKING:
    from kdframe_codecs.hidden_settings import Klt


class KltCodec:
    """A coded hidden state for each position.

    Attributes:
        record_bytes: size of one record.
    """

    def __init__(self, config: Klt, shape: TeacherShape, fitted: Mapping[str, Tensor]) -> None:
        self.record_bytes = config.record_bytes(shape)
        self._head = kept_head(shape, fitted)
        self._states = CodedStates(fitted)

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """The hidden states at `n` positions to records `[n, B]`.

        A number far outside what the sample held becomes the outermost level.
        """
        return self._states.encode(outputs.hidden)

    def decode(self, records: NDArray[np.uint8]) -> HiddenTargets:
        """Records `[n, B]` to targets."""
        return HiddenTargets(self._states.decode(records), self._head)
