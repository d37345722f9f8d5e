"""The loss engine: everything about a loss that must not depend on who wrote it.

It picks the counted positions, cuts them into chunks, makes the logits of one chunk, takes the
gradients inside the chunk, and sums. A loss therefore never sees padding or `[B, T, V]`, and
padding, packing, chunk size and accumulation cannot change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdframe.output_layer import Halves
from kdframe.parts import Loss, LossTerms
from kdframe.targets import TeacherTargets, met

_HALF_SCALE = 1024.0  # keeps float16 gradients of a chunk above the smallest float16


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

        def at(chunk_hidden: Tensor, chunk: slice) -> LossTerms:
            logits = self.halves.head(chunk_hidden)
            if targets is None:
                hard = F.cross_entropy(logits, labels[chunk], reduction="none")
                return LossTerms(hard, {"hard": hard})
            found = self.loss(logits, met(targets.select(chunk)), labels[chunk])
            if "hard" in found.terms:
                return found
            hard = F.cross_entropy(logits.detach(), labels[chunk], reduction="none")
            return LossTerms(found.total, {**found.terms, "hard": hard})

        total, more = chunked(at, hidden, self.halves.head_parameters, self.halves.chunk())
        for name, value in more.items():
            terms[name] = terms[name] + value if name in terms else value
        return total


ChunkLoss = Callable[[Tensor, slice], LossTerms]


def chunked(
    loss: ChunkLoss, hidden: Tensor, parameters: Sequence[Tensor], chunk: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum a loss over positions, `chunk` at a time, with the gradients taken inside each chunk.

    Args:
        loss: from hidden states `[c, H]` and the slice that they stand for to LossTerms `[c]`.
        hidden: `[n, H]`.
        parameters: everything with a gradient that `loss` uses besides `hidden`.
        chunk: positions at a time.

    Returns:
        the sum (a scalar that carries gradients to `hidden` and `parameters`), and detached sums
        of the named terms.
    """
    terms: dict[str, Tensor] = {}
    total: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        loss, chunk, terms, hidden, *parameters
    )
    return total, terms


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: ChunkLoss,
        chunk: int,
        terms: dict[str, Tensor],
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=_sum_type(hidden), device=hidden.device)
        wants = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if wants else hidden
        gradients = [torch.zeros_like(p, dtype=_sum_type(p)) for p in parameters] if wants else []
        scale = _scale(hidden.device.type)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wants):
                piece = hidden[part].detach().requires_grad_(wants)
                found = loss(piece, part)
                summed = found.total.sum()
                scaled = summed * scale
            if wants:
                grads = torch.autograd.grad(scaled, [piece, *parameters])
                grad_hidden[part] = grads[0] / scale
                for gradient, more in zip(gradients, grads[1:], strict=True):
                    gradient.add_(more, alpha=1 / scale)
            total += summed.detach()
            for name, value in found.terms.items():
                value = value.detach().sum()
                terms[name] = terms[name] + value if name in terms else value
        ctx.gradients = (grad_hidden, *gradients) if wants else ()
        ctx.dtypes = [hidden.dtype, *(p.dtype for p in parameters)]
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, ()
        scaled = [
            gradient.mul_(above[0]).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (None, None, None, *scaled)


def _sum_type(tensor: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _scale(device: str) -> float:
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return _HALF_SCALE if half else 1.0
