"""A few token ids with their log-probabilities, in bytes.

Letters: `n` positions, `k` ids, `V` the vocabulary. A record holds the ids' low 16 bits; one
plane of `k` bits for each higher bit that the vocabulary has; the logarithm of the mass of all
other ids (float16); and for each id but the first a byte for its share of the first's
probability: `(byte / 255) ** 4`. That is 0.4 % of a probability near the first, and reaches down
to a factor of `e ** -22`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROOT = 4


def size(k: int, vocab_size: int) -> int:
    """Bytes of one record."""
    return 2 * k + (k * _high_bits(vocab_size) + 7) // 8 + 2 + k - 1


def encode(logits: Tensor, k: int) -> NDArray[np.uint8]:
    """The `k` likeliest ids of logits `[n, V]`, to records."""
    highest, ids = logits.topk(k)
    shares = torch.exp((highest - highest[:, :1]) / _ROOT)
    bytes_ = (255 * shares).round().to(torch.uint8)
    others = logits.scatter(-1, ids, torch.where(bytes_ > 0, -torch.inf, highest))
    log_rest = others.logsumexp(-1) - logits.logsumexp(-1)
    found = ids.cpu().numpy()
    return np.concatenate(
        [
            found.astype("<u2").view(np.uint8),
            _planes(found, _high_bits(logits.shape[1])),
            log_rest.cpu().numpy().astype("<f2")[:, None].view(np.uint8),
            bytes_[:, 1:].cpu().numpy(),
        ],
        axis=1,
    )


def decode(records: NDArray[np.uint8], k: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Records back.

    Returns:
        `[n, k]` int64 ids; `[n, k]` log p, `-inf` where it is too small for a byte; `[n]` log of
        the mass of all ids whose log p is not told. The masses add up to 1.
    """
    low, high, rest, shares = np.split(
        records, np.cumsum([2 * k, _plane_bytes(k, vocab_size), 2]), 1
    )
    ids = np.ascontiguousarray(low).view("<u2").astype(np.int64)
    bits = np.unpackbits(high, axis=1, count=k * _high_bits(vocab_size)).reshape(len(ids), -1, k)
    for i in range(bits.shape[1]):
        ids |= bits[:, i].astype(np.int64) << (16 + i)
    log_rest = np.ascontiguousarray(rest).view("<f2")[:, 0].astype(np.float32)
    log_shares = np.zeros(ids.shape, np.float32)
    log_shares[:, 1:] = _LOG_SHARES[shares]
    shares_of_kept = torch.from_numpy(log_shares).log_softmax(-1)
    log_rest_ = torch.from_numpy(log_rest)
    log_kept = torch.log(-torch.expm1(log_rest_))
    return torch.from_numpy(ids), shares_of_kept + log_kept.unsqueeze(-1), log_rest_


with np.errstate(divide="ignore"):
    _LOG_SHARES = _ROOT * np.log(np.arange(256, dtype=np.float32) / 255)


def _planes(ids: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    planes = [(ids >> (16 + i) & 1).astype(np.uint8) for i in range(bits)]
    return np.packbits(np.concatenate([ids[:, :0].astype(np.uint8), *planes], axis=1), axis=1)


def _plane_bytes(k: int, vocab_size: int) -> int:
    return (k * _high_bits(vocab_size) + 7) // 8


def _high_bits(vocab_size: int) -> int:
    return max(0, (vocab_size - 1).bit_length() - 16)
