"""A causal language model in two halves: the backbone, and the layer that makes logits.

The halves let a loss or a codec meet logits chunk by chunk, so that `[tokens, V]` never exists.
Letters: `n` positions, `H` hidden width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdframe.chunks import Head
from kdframe.errors import InputError
from kdframe.heads import OutputHead, bent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits."""

_PROBE = 4  # tokens
_LOUD = 100.0  # a logit as large as any model makes


def wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class OutputLayer:
    """Hidden states to logits, with the scale and soft-cap of the model's configuration."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.linear: nn.Module = model.get_output_embeddings()
        self.parameters = [p for p in self.linear.parameters() if p.requires_grad]
        multiply: float = getattr(config, "logit_scale", None) or 1.0
        divide: float = getattr(config, "logits_scaling", None) or 1.0
        self.scale = 1.0 if multiply == divide else multiply / divide
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[n, H]` to logits `[n, V]` in float32 (float64 stays)."""
        return bent(wide(self.linear(hidden)), self.scale, self.soft_cap)

    def plain(self) -> OutputHead:
        """The layer as plain tensors, shared with the model.

        Raises:
            InputError: the layer is more than a matrix and a bias.
        """
        linear = self.linear
        if type(linear) is not nn.Linear:
            raise InputError(
                f"cache.codec: the teacher's output layer is a {type(linear).__name__}, which "
                "cannot be kept beside hidden states; use the codec 'topk'"
            )
        bias = None if linear.bias is None else linear.bias.detach()
        return OutputHead(linear.weight.detach(), bias, self.scale, self.soft_cap)


class Halves:
    """A model's backbone and output layer; where they do not add up to it, the model whole.

    Attributes:
        head: hidden states (or, for a model taken whole, logits) to float32 logits.
        head_parameters: the trainable parameters that `head` uses.
        vocab_size: `V`, the number of output rows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.layer = layer = OutputLayer(model)
        self.whole = not _adds_up(model, layer)
        self.head: Callable[[Tensor], Tensor] = wide if self.whole else layer
        self.head_parameters = [] if self.whole else layer.parameters

    def hidden(self, **inputs: Any) -> Tensor:
        """Final hidden states `[B, T, H]` of a batch (logits, for a model taken whole)."""
        if self.whole:
            logits: Tensor = self.model(**{"use_cache": False, **inputs}).logits
            return logits
        states: Tensor = self.model.base_model(**{"use_cache": False, **inputs}).last_hidden_state
        return states

    def chunk_head(self) -> Head:
        """The output layer as the loss engine runs it."""
        layer = self.layer
        linear = layer.linear
        if self.whole or layer.soft_cap is not None or type(linear) is not nn.Linear:
            return Head(self.head, self.head_parameters)
        return Head(self.head, self.head_parameters, linear.weight, linear.bias, layer.scale)

    def chunk(self) -> int:
        """Positions of one chunk of logits."""
        return max(16, min(1024, CHUNK_BYTES // (4 * self.vocab_size)))


@torch.no_grad()
def _adds_up(model: PreTrainedModel, layer: OutputLayer) -> bool:
    """Whether backbone and output layer give the model's own logits, on a probe."""
    training = model.training
    model.eval()
    try:
        loudest = _compare(model, layer, 1.0)
        # Once more with large logits: what bends them only there (a soft-cap) shows.
        return loudest is not None and _compare(model, layer, _LOUD / loudest) is not None
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ):  # it is called otherwise
        return False
    finally:
        model.train(training)


def _compare(model: PreTrainedModel, layer: OutputLayer, amplify: float) -> float | None:
    """The largest logit where both ways agree, with the linear layer's output amplified."""
    size = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + _PROBE, device=model.device).unsqueeze(0) % size
    hook = layer.linear.register_forward_hook(lambda module, given, found: found * amplify)
    try:
        whole = wide(model(input_ids=ids, use_cache=False).logits)
        halves = layer(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        hook.remove()
    loudest = float(whole.abs().max())
    tolerance = max(1e-4, 8 * torch.finfo(model.dtype).eps) * loudest
    equal = whole.shape == halves.shape and torch.allclose(whole, halves, rtol=0, atol=tolerance)
    return max(loudest, torch.finfo(torch.float32).tiny) if equal else None
