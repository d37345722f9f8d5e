"""Token ids as their low 16 bits and, above a vocabulary of 65,536, a plane for each bit more."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdframe_codecs.topk_layout import LOW_BITS


def low_bytes(ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """`[n, k]` ids to the low halves, `[n, 2k]`."""
    return ids.astype("<u2").view(np.uint8)


def high_bytes(ids: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """`[n, k]` ids to their bits above the low 16, `[n, ceil(k * bits / 8)]`."""
    planes = [(ids >> (LOW_BITS + bit) & 1).astype(np.uint8) for bit in range(bits)]
    return np.packbits(np.concatenate(planes, axis=1), axis=1)


def unpacked(low: NDArray[np.uint8], high: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """What `low_bytes` and `high_bytes` packed, `[n, k]`."""
    ids = np.ascontiguousarray(low).view("<u2").astype(np.int64)
    if bits:
        k = ids.shape[1]
        planes = np.unpackbits(high, axis=1, count=k * bits).reshape(-1, bits, k)
        for bit in range(bits):
            ids += planes[:, bit].astype(np.int64) << (LOW_BITS + bit)
    return ids
