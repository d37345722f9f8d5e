"""Several rows in one sequence: what a model must be told so that they do not see each other.

transformers parts the rows of a sequence where `position_ids` do not go on counting, if it gets
neither an attention mask nor a cache. Sliding windows keep their meaning, and any number of
sequences can stand in a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_LENGTHS = (5, 8, 3)
_PADDING = 2
_TOLERANCE = 1e-4


def packed_inputs(segment_ids: Tensor) -> dict[str, Any]:
    """The arguments with which `model(input_ids, **packed_inputs(ids))` keeps rows apart.

    Args:
        segment_ids: `[B, T]` int, equal within a row, another number in the next; -1 is padding.

    Returns:
        `position_ids` `[B, T]` int64 that restart with every row (and stay 0 in padding),
        `attention_mask` None, `use_cache` False.
    """
    return {
        "position_ids": _position_ids(segment_ids),
        "attention_mask": None,
        "use_cache": False,
    }


def check_packing(model: PreTrainedModel) -> bool:
    """Whether packed rows get the logits that they get alone.

    Compares random rows, padded and packed by `packed_inputs`, within 1e-4 of the largest logit
    (in 16-bit types, within eight of their steps). Recurrent models, and those that count
    positions themselves, fail. The model's mode is left as it was.
    """
    import torch

    total = sum(_LENGTHS) + _PADDING
    vocabulary = model.config.get_text_config().vocab_size
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, total), generator=seeded).to(model.device)
    segment_ids = torch.full((1, total), -1, device=ids.device)
    spans, start = [], 0
    for number, length in enumerate(_LENGTHS):
        spans.append(slice(start, start + length))
        segment_ids[:, spans[-1]] = number
        start += length
    with _evaluating(model), torch.no_grad():
        alone = [model(input_ids=ids[:, span], use_cache=False).logits for span in spans]
        try:
            packed = model(input_ids=ids, **packed_inputs(segment_ids)).logits
        except (TypeError, ValueError, RuntimeError):  # it does not take positions
            return False
    tolerance = max(_TOLERANCE, 8 * torch.finfo(packed.dtype).eps)
    scale = max(logits.abs().max().item() for logits in alone)
    return all(
        (packed[:, span] - logits).abs().max().item() <= tolerance * scale
        for span, logits in zip(spans, alone, strict=True)
    )


def _position_ids(segment_ids: Tensor) -> Tensor:
    import torch

    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins |= segment_ids == -1
    return index - torch.where(begins, index, 0).cummax(dim=1).values


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
