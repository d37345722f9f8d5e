"""Log-probabilities of the kept ids as codes: the first finely, the others as steps downwards.

A step is chosen against what was decoded before it, so that errors do not add up (differential
coding with the decoder in the loop, as in ADPCM). Last of all the first value is set, which moves
all others with it, so that the decoded mass is just under the true one.
Letters: `n` positions, `k` kept ids.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdframe_codecs.topk_layout import BYTE_VALUES

_FIRST = 16 / 65_535**2  # the first value is -_FIRST * code**2: finest where p is near 1

LEAST_TAIL = 1e-6
"""The least mass of a tail that is there: hardly more than float32 can tell from none."""


def _steps(codes: int, fine: float, last: float) -> NDArray[np.float32]:
    """Steps from 0 to `last` nats, even below `fine` and geometric above; then `inf`."""
    rate = np.log1p(last / fine) / (codes - 2)
    return np.append(fine * np.expm1(rate * np.arange(codes - 1)), np.inf).astype(np.float32)


def _middles(steps: NDArray[np.float32]) -> NDArray[np.float64]:
    """Bounds between the steps; what passes the last finite one by far becomes `inf`."""
    finite = steps[:-1].astype(np.float64)
    return np.append((finite[1:] + finite[:-1]) / 2, finite[-1] * 1.25)


BYTE_STEPS = _steps(256, fine=0.3, last=64.0)
NIBBLE_STEPS = _steps(16, fine=0.06, last=6.0)
_BYTE_MIDDLES, _NIBBLE_MIDDLES = _middles(BYTE_STEPS), _middles(NIBBLE_STEPS)
# Two steps for each byte, taken as one number of eight bytes.
_PAIRS = -np.stack([np.tile(NIBBLE_STEPS, 16), np.repeat(NIBBLE_STEPS, 16)], axis=1)
_PAIRS = _PAIRS.view(np.uint64).ravel()


def packed(
    log_probs: NDArray[np.float64],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """`[n, k]` falling log-probabilities to the bytes of first, bytewise and nibbles.

    The mass of what `unpacked` makes of them is not above the true mass of the same ids, or 1. An
    id so much less likely than the one before that no step says it (64 nats among the first nine
    ids, 6 after them, and a quarter more) becomes `-inf`, with all that follow: it counts to the
    tail.
    """
    codes = _step_codes(log_probs)
    bytewise, rest = codes[:, :BYTE_VALUES], codes[:, BYTE_VALUES:]
    if rest.shape[1] % 2:
        rest = np.pad(rest, ((0, 0), (0, 1)))
    nibbles: NDArray[np.uint8] = rest[:, ::2] | np.left_shift(rest[:, 1::2], 4, dtype=np.uint8)
    k = log_probs.shape[1]

    def values(first: NDArray[np.uint16]) -> NDArray[np.float64]:
        found = unpacked(first[:, None].view(np.uint8), bytewise, nibbles, k)
        return found.astype(np.float64)

    relative = values(np.zeros(len(log_probs), np.uint16))
    true = np.where(np.isfinite(relative), np.exp(log_probs), 0).sum(-1)
    true = np.minimum(true, np.where(ends(log_probs), 1, 1 - LEAST_TAIL))
    over = np.log(np.exp(relative).sum(-1) / true).clip(min=0)
    first = np.ceil(np.sqrt(over / _FIRST)).clip(max=65_535).astype(np.uint16)
    # Where float32's rounding of the values has put them above, one code less likely.
    first += (np.exp(values(first)).sum(-1) > true) & (first < 65_535)
    return first[:, None].view(np.uint8), bytewise, nibbles


def ends(log_probs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """`[n]`: whether no id that is not kept can have a probability."""
    return np.isneginf(log_probs[:, -1])


def unpacked(
    first: NDArray[np.uint8], bytewise: NDArray[np.uint8], nibbles: NDArray[np.uint8], k: int
) -> NDArray[np.float32]:
    """What `packed` packed, `[n, k]`."""
    values = np.empty((len(first), k), np.float32)
    codes = np.ascontiguousarray(first).view("<u2").astype(np.float32)
    values[:, :1] = codes * codes * np.float32(-_FIRST)
    after = 1 + bytewise.shape[1]
    values[:, 1:after] = (-BYTE_STEPS).take(bytewise)
    values[:, after:] = _PAIRS.take(nibbles).view(np.float32)[:, : k - after]
    return np.cumsum(values, axis=1, out=values)


def _step_codes(log_probs: NDArray[np.float64]) -> NDArray[np.uint8]:
    """`[n, k - 1]`: the nearest step from what is decoded so far, id after id."""
    falls = np.ascontiguousarray((log_probs[:, :1] - log_probs).T)
    codes = np.empty((len(falls) - 1, len(log_probs)), np.uint8)
    decoded = np.zeros(len(log_probs))
    with np.errstate(invalid="ignore"):  # inf - inf: not a number, which sorts last, to `inf`
        for i, fall in enumerate(falls[1:]):
            in_bytes = i < BYTE_VALUES
            middles = _BYTE_MIDDLES if in_bytes else _NIBBLE_MIDDLES
            steps = BYTE_STEPS if in_bytes else NIBBLE_STEPS
            codes[i] = np.searchsorted(middles, fall - decoded)
            decoded += steps[codes[i]]
    return codes.T
