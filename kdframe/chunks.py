"""A loss on logits, summed over positions chunk by chunk, with its gradients taken in the chunk.

`[tokens, V]` never exists: the logits of one chunk are made, become their own gradient, and are
multiplied back into the gradients of the hidden states and of the output layer.
Letters: `n` positions, `H` hidden width, `V` vocabulary, `c` positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kdframe.parts import LossTerms

_HALF_SCALE = 1024.0  # keeps float16 gradients of a chunk above the smallest float16


class ChunkLoss(Protocol):
    """A loss of some positions, `part`, from their logits `[c, V]`."""

    def __call__(self, logits: Tensor, part: slice) -> LossTerms:
        """The loss; autograd can follow it back to the logits."""

    def with_gradient(self, logits: Tensor, part: slice) -> LossTerms | None:
        """The loss, with the gradient of its summed total in place of the logits.

        None, and the logits untouched, where the loss has no gradient of its own.
        """


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states.

    Attributes:
        call: hidden states `[c, H]` to logits `[c, V]`, whatever the layer is.
        parameters: everything with a gradient that `call` uses.
        weight, bias: the same layer as matrices `[V, H]` and `[V]`, where it is no more than
            those and a scale of the logits; None where it is.
    """

    call: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0

    def plain_for(self, hidden: Tensor) -> bool:
        """Whether the matrices can be multiplied as they are: one full-precision type."""
        device = hidden.device.type
        if self.weight is None or torch.is_autocast_enabled(device):
            return False
        types = {
            hidden.dtype,
            self.weight.dtype,
            *(() if self.bias is None else (self.bias.dtype,)),
        }
        return len(types) == 1 and types <= {torch.float32, torch.float64}


def chunked(
    loss: ChunkLoss, hidden: Tensor, head: Head, chunk: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum a loss over positions, `chunk` at a time, with the gradients taken inside each chunk.

    Args:
        loss: of some positions, from their logits.
        hidden: `[n, H]`.
        head: makes the logits.
        chunk: positions at a time.

    Returns:
        the sum (a scalar that carries gradients to `hidden` and the head's parameters), and
        detached sums of the named terms.
    """
    terms: dict[str, Tensor] = {}
    job = _Job(loss, head, chunk)
    total: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        job, terms, hidden, *head.parameters
    )
    return total, terms


@dataclass(frozen=True)
class _Job:
    loss: ChunkLoss
    head: Head
    chunk: int

    def work(self, hidden: Tensor, wants_gradient: bool) -> _Work:
        if not wants_gradient:
            return _NoGradient(self.loss, self.head, hidden)
        if self.head.plain_for(hidden):
            return _ByMatrices(self.loss, self.head, hidden, self.chunk)
        return _ByAutograd(self.loss, self.head, hidden)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        job: _Job,
        terms: dict[str, Tensor],
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wants = any(ctx.needs_input_grad)
        work, chunk = job.work(hidden, wants), job.chunk
        total = torch.zeros((), dtype=sum_type(hidden), device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            found = work.on(slice(start, min(start + chunk, hidden.shape[0])))
            total += found.total.detach().sum(dtype=total.dtype)
            add_terms(terms, {name: value.detach().sum() for name, value in found.terms.items()})
        ctx.gradients = work.gradients() if wants else ()
        ctx.dtypes = [hidden.dtype, *(p.dtype for p in parameters)]
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, ()
        # On a processor the look is free, and saves a pass over the output layer's gradient.
        one = above[0].device.type == "cpu" and float(above[0]) == 1
        scaled = [
            (gradient if one else gradient.mul_(above[0])).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (None, None, *scaled)


class _Work(Protocol):
    def on(self, part: slice) -> LossTerms: ...

    def gradients(self) -> tuple[Tensor, ...]:
        """Of hidden, and of each of the head's parameters."""


class _NoGradient:
    def __init__(self, loss: ChunkLoss, head: Head, hidden: Tensor) -> None:
        self._loss, self._head, self._hidden = loss, head, hidden

    def on(self, part: slice) -> LossTerms:
        return self._loss(self._head.call(self._hidden[part]), part)

    def gradients(self) -> tuple[Tensor, ...]:
        return ()


class _ByMatrices:
    """The three products by hand, into memory that is taken once."""

    def __init__(self, loss: ChunkLoss, head: Head, hidden: Tensor, chunk: int) -> None:
        assert head.weight is not None
        self._loss, self._head, self._hidden = loss, head, hidden.detach()
        self._weight = head.weight.detach()
        rows = min(chunk, hidden.shape[0])
        self._logits = hidden.new_empty((rows, self._weight.shape[0]))
        self._grad_hidden = torch.empty_like(hidden)
        self._begun = False
        self._grads = [
            (torch.empty_like if p.ndim > 1 else torch.zeros_like)(p) for p in head.parameters
        ]
        self._of = {id(p): grad for p, grad in zip(head.parameters, self._grads, strict=True)}

    def on(self, part: slice) -> LossTerms:
        head, weight = self._head, self._weight
        hidden = self._hidden[part]
        if head.scale != 1:
            hidden = hidden * head.scale
        logits = torch.mm(hidden, weight.T, out=self._logits[: len(hidden)])
        if head.bias is not None:
            logits.add_(head.bias.detach(), alpha=head.scale)
        found, gradient = _gradient(self._loss, logits, part)
        torch.mm(gradient, weight, out=self._grad_hidden[part])
        if head.scale != 1:
            self._grad_hidden[part].mul_(head.scale)
        # The first chunk fills the memory: zeros would be a pass of their own.
        again = int(self._begun)
        self._begun = True
        if (grad := self._of.get(id(head.weight))) is not None:
            torch.addmm(grad, gradient.T, hidden, beta=again, out=grad)
        if head.bias is not None and (grad := self._of.get(id(head.bias))) is not None:
            grad.add_(gradient.sum(0), alpha=head.scale)
        return found

    def gradients(self) -> tuple[Tensor, ...]:
        if not self._begun:
            self._grads = [grad.zero_() for grad in self._grads]
        return (self._grad_hidden, *self._grads)


class _ByAutograd:
    """Autograd through the head of one chunk: any layer, any precision."""

    def __init__(self, loss: ChunkLoss, head: Head, hidden: Tensor) -> None:
        self._loss, self._head, self._hidden = loss, head, hidden
        self._grad_hidden = torch.empty_like(hidden)
        self._grads = [torch.zeros_like(p, dtype=sum_type(p)) for p in head.parameters]
        self._scale = _scale(hidden.device.type)

    def on(self, part: slice) -> LossTerms:
        piece = self._hidden[part].detach().requires_grad_()
        with torch.enable_grad():
            logits = self._head.call(piece)
        # A copy: the head's own gradient may need the logits as they were.
        found, gradient = _gradient(self._loss, logits.detach().clone(), part)
        wanted = [piece, *self._head.parameters]
        grads = torch.autograd.grad(logits, wanted, gradient.mul_(self._scale))
        self._grad_hidden[part] = grads[0] / self._scale
        for grad, more in zip(self._grads, grads[1:], strict=True):
            grad.add_(more, alpha=1 / self._scale)
        return found

    def gradients(self) -> tuple[Tensor, ...]:
        return (self._grad_hidden, *self._grads)


def _gradient(loss: ChunkLoss, logits: Tensor, part: slice) -> tuple[LossTerms, Tensor]:
    """The loss, and the gradient of its summed total `[c, V]` (often in the logits' memory)."""
    found = loss.with_gradient(logits, part)
    if found is not None:
        return found, logits
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        found = loss(leaf, part)
        total = found.total.sum()
    return found, torch.autograd.grad(total, leaf)[0]


def add_terms(terms: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add sums by name."""
    for name, value in more.items():
        terms[name] = terms[name] + value if name in terms else value


def sum_type(tensor: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _scale(device: str) -> float:
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return _HALF_SCALE if half else 1.0
