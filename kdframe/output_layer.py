"""A causal language model in two halves: the backbone, and the layer that makes logits.

The halves let a loss or a codec meet logits chunk by chunk, so that `[tokens, V]` never exists.
Letters: `n` positions, `H` hidden width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits."""


class OutputLayer:
    """Hidden states to logits, with the scale and soft-cap of the model's configuration."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.linear: nn.Module = model.get_output_embeddings()
        self.parameters = [p for p in self.linear.parameters() if p.requires_grad]
        self.multiply: float = getattr(config, "logit_scale", None) or 1.0
        self.divide: float = getattr(config, "logits_scaling", None) or 1.0
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[n, H]` to float32 logits `[n, V]`."""
        logits: Tensor = self.linear(hidden)
        logits = logits.float()
        if self.multiply != self.divide:
            logits = logits * (self.multiply / self.divide)
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits


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
        layer = OutputLayer(model)
        self.whole = not _adds_up(model, layer)
        self.head: Callable[[Tensor], Tensor] = Tensor.float if self.whole else layer
        self.head_parameters = [] if self.whole else layer.parameters

    def hidden(self, **inputs: Any) -> Tensor:
        """Final hidden states `[B, T, H]` of a batch (logits, for a model taken whole)."""
        if self.whole:
            logits: Tensor = self.model(**{"use_cache": False, **inputs}).logits
            return logits
        states: Tensor = self.model.base_model(**{"use_cache": False, **inputs}).last_hidden_state
        return states

    def chunk(self) -> int:
        """Positions of one chunk of logits."""
        return max(16, min(1024, CHUNK_BYTES // (4 * self.vocab_size)))


@torch.no_grad()
def _adds_up(model: PreTrainedModel, layer: OutputLayer) -> bool:
    """Whether backbone and output layer give the model's own logits, on a probe."""
    training = model.training
    model.eval()
    try:
        ids = torch.arange(1, 5, device=model.device).unsqueeze(0) % model.config.vocab_size
        whole = model(input_ids=ids, use_cache=False).logits.float()
        halves = layer(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError):
        return False
    finally:
        model.train(training)
    return whole.shape == halves.shape and torch.allclose(whole, halves, rtol=1e-3, atol=1e-3)
