"""The loss engine: everything about a loss that must not depend on who wrote it.

It picks the counted positions, cuts them into chunks, makes the logits of one chunk, takes the
gradients inside the chunk, and sums. A loss therefore never sees padding or `[B, T, V]`, and
padding, packing, chunk size and accumulation cannot change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdframe.chunks import ChunkLoss, add_terms, chunked
from kdframe.output_layer import Halves
from kdframe.parts import AnalyticLoss, Loss, LossTerms
from kdframe.targets import TeacherTargets, met


@dataclass(frozen=True)
class LossSums:
    """Sums over the counted positions of a micro-batch, in nats.

    Attributes:
        total: what is minimised, with its gradient.
        terms: named parts, detached; `hard` is always there.
        counted: number of positions; `taught`: of those, how many have a teacher.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    counted: int
    taught: int


class StudentWithLoss(nn.Module):
    """The student and the loss engine as one module: `forward(batch) -> LossSums`."""

    def __init__(self, student: nn.Module, halves: Halves, loss: Loss) -> None:
        super().__init__()
        self.student = student
        self.halves = halves
        self.loss = loss

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        positions: Tensor,
        labels: Tensor,
        taught: Tensor,
        targets: TeacherTargets | None,
    ) -> LossSums:
        """The loss of one micro-batch.

        Args:
            inputs: what the backbone takes: `input_ids [B, T]` and so on.
            positions: `[n]` int64, the counted positions in the flattened `[B * T]`.
            labels: `[n]` int64, the token that comes next at each.
            taught: `[n]` bool, whether the teacher read the position.
            targets: the teacher's predictions for the taught positions, in their order.
        """
        hidden = self.halves.hidden(**inputs)
        hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
        total = hidden[:0].sum()  # keeps the graph where nothing counts
        terms: dict[str, Tensor] = {}
        if targets is not None:
            total = total + self._add(terms, hidden[taught], labels[taught], targets)
        if not bool(taught.all()):
            total = total + self._add(terms, hidden[~taught], labels[~taught], None)
        return LossSums(total, terms, len(labels), 0 if targets is None else len(targets))

    def _add(
        self,
        terms: dict[str, Tensor],
        hidden: Tensor,
        labels: Tensor,
        targets: TeacherTargets | None,
    ) -> Tensor:
        """The summed loss of some positions; its named terms are added to `terms`."""
        loss: ChunkLoss = _Hard(labels) if targets is None else _Taught(self.loss, targets, labels)
        total, more = chunked(loss, hidden, self.halves.chunk_head(), self.halves.chunk())
        add_terms(terms, more)
        return total


class _Hard:
    """Cross-entropy, where there is no teacher."""

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels

    def __call__(self, logits: Tensor, part: slice) -> LossTerms:
        hard = F.cross_entropy(logits, self._labels[part], reduction="none")
        return LossTerms(hard, {"hard": hard})

    def with_gradient(self, logits: Tensor, part: slice) -> LossTerms:
        """`softmax - one-hot`, in place of the logits."""
        labels = self._labels[part].unsqueeze(-1)
        hard = -logits.gather(-1, labels).squeeze(-1)
        log_z = torch.logsumexp(logits, dim=-1)
        logits.sub_(log_z.unsqueeze(-1)).exp_()
        logits.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=logits.dtype))
        hard += log_z
        return LossTerms(hard, {"hard": hard})


class _Taught:
    """A plugin's loss on its chunk of targets and labels; `hard` is always among the terms."""

    def __init__(self, loss: Loss, targets: TeacherTargets, labels: Tensor) -> None:
        self._loss, self._targets, self._labels = loss, targets, labels

    def __call__(self, logits: Tensor, part: slice) -> LossTerms:
        labels = self._labels[part]
        found = self._loss(logits, met(self._targets.select(part)), labels)
        if "hard" in found.terms:
            return found
        hard = F.cross_entropy(logits.detach(), labels, reduction="none")
        return LossTerms(found.total, {**found.terms, "hard": hard})

    def with_gradient(self, logits: Tensor, part: slice) -> LossTerms | None:
        """The plugin's own gradient, where it gives one."""
        if not isinstance(self._loss, AnalyticLoss):
            return None
        return self._loss.with_gradient(logits, met(self._targets.select(part)), self._labels[part])
