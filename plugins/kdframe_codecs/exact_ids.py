"""A few token ids with their log-probabilities, in bytes.

A record holds the ids' low 16 bits; one plane of `k` bits for each higher bit that the
vocabulary has; the logarithm of the mass of all other ids (float16); and for each id but the
first a byte for its share of the first's probability: `(byte / 255) ** 4`. That is within 0.8 %
of a probability near the first, and reaches down to a factor of `e ** -22`; below it is 0, and
the id counts among the others. Letters: `n` positions, `k` ids, `V` the vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdframe_codecs import topk_ids
from kdframe_codecs.topk_layout import LOW_BITS

_ROOT = 4
_LOG_SHARES = torch.arange(256).div(255).log().mul(_ROOT)
_SMALLEST = 2.0**-126  # float32's smallest with all its digits
_BLOCK = 1 << 18  # logits worked on at once: a few buffers of them fit the processor's cache


def encode(logits: Tensor, k: int) -> NDArray[np.uint8]:
    """The `k` likeliest ids of logits `[n, V]`, to records."""
    n, vocab_size = logits.shape
    ids = logits.new_empty((n, k), dtype=torch.int64)
    steps = logits.new_empty((n, k))
    log_rest = logits.new_empty(n)
    step = max(1, _BLOCK // vocab_size)
    for i in range(0, n, step):
        part = slice(i, i + step)
        highest, ids[part] = logits[part].topk(k)
        steps[part] = torch.exp((highest - highest[:, :1]) / _ROOT).mul(255).round()
        powers = torch.exp(logits[part] - highest[:, :1])
        kept = powers.gather(-1, ids[part]).where(steps[part] > 0, 0)
        rest = powers.scatter_(-1, ids[part], powers.gather(-1, ids[part]) - kept).sum(-1)
        rest = rest.clamp(min=_SMALLEST)  # an id that is possible stays so
        log_rest[part] = torch.log(rest) - torch.log(rest + kept.sum(-1))
    found, high_bits = ids.cpu().numpy(), _high_bits(vocab_size)
    parts = [
        topk_ids.low_bytes(found),
        *([topk_ids.high_bytes(found, high_bits)] if high_bits else []),
        log_rest.clamp(max=0).cpu().numpy().astype("<f2")[:, None].view(np.uint8),
        steps[:, 1:].to(torch.uint8).cpu().numpy(),
    ]
    return np.concatenate(parts, axis=1)


def decode(records: NDArray[np.uint8], k: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Records back.

    Returns:
        `[n, k]` int64 ids; `[n, k]` log p, `-inf` where it is not told; `[n]`, log of the mass of
        all other ids. The masses add up to 1.
    """
    high_bits = _high_bits(vocab_size)
    ends = np.cumsum([2 * k, (k * high_bits + 7) // 8, 2])
    low, high, rest, steps = np.split(records, ends, axis=1)
    log_rest = torch.from_numpy(np.ascontiguousarray(rest).view("<f2")[:, 0].astype(np.float32))
    log_shares = torch.zeros(len(records), k)
    log_shares[:, 1:] = _LOG_SHARES[torch.from_numpy(steps.astype(np.int64))]
    log_kept = torch.log(-torch.expm1(log_rest))
    log_probs = log_shares.log_softmax(-1) + log_kept.unsqueeze(-1)
    return torch.from_numpy(topk_ids.unpacked(low, high, high_bits)), log_probs, log_rest


def _high_bits(vocab_size: int) -> int:
    return max(0, (vocab_size - 1).bit_length() - LOW_BITS)
