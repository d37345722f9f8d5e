"""A teacher that is asked, not read from a cache: it answers in the same targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kdframe.cache_parts import Codec, RowPositions
from kdframe.heads import TeacherOutputs
from kdframe.output_layer import Halves, OutputLayer
from kdframe.targets import DenseTargets, HiddenTargets, TeacherTargets, resized


@dataclass(frozen=True)
class LiveTeacher:
    """A loaded teacher.

    Attributes:
        halves: the model; codec: answer as a cache with this codec would, not exactly.
    """

    halves: Halves
    codec: Codec | None = None

    @torch.no_grad()
    def targets(
        self,
        rows: Sequence[NDArray[np.int32]],
        requests: Sequence[RowPositions],
        vocab_size: int,
    ) -> TeacherTargets:
        """The predictions at all positions of the rows, in order, over the student's `vocab_size`.

        Args:
            rows: token ids of each row; requests: which of its positions.

        Returns:
            what the codec decodes; without one, hidden states (dense, for a model taken whole).
        """
        found = states(self.halves, rows, requests)
        if self.codec is not None:
            outputs = TeacherOutputs(found, self.halves.head)
            return resized(self.codec.decode(self.codec.encode(outputs)), vocab_size)
        if self.halves.whole:
            return resized(DenseTargets.from_logits(found), vocab_size)
        head = OutputLayer(self.halves.model).plain()
        return resized(HiddenTargets(found.float(), head), vocab_size)


@torch.no_grad()
def states(
    halves: Halves, rows: Sequence[NDArray[np.int32]], requests: Sequence[RowPositions]
) -> torch.Tensor:
    """`[n, H]`: final hidden states at the asked positions of all rows."""
    longest = max(len(row) for row in rows)
    padded = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
        mask[i, : len(row)] = 1
    device = halves.model.device
    hidden = halves.hidden(
        input_ids=torch.from_numpy(padded).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
    )
    flat = np.concatenate([i * longest + r.positions for i, r in enumerate(requests)])
    return hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(flat).to(device)]
