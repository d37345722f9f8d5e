"""How much the ids that are not kept hold at a temperature, in one byte.

Coded are the odds, tail to kept, at T: where they are high an error of the logarithm moves every
kept probability by as much; where they are low it hardly does, and the steps grow.
Letters: `n` positions, `g` temperatures.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kdframe_codecs.topk_layout import BYTE_VALUES
from kdframe_codecs.topk_values import LEAST_TAIL

_LEAST = math.log(LEAST_TAIL)
_FLOOR = 0.1  # density of the codes at low odds, to that at high ones


class TailOdds:
    """The codes of a vocabulary `V` and `k` kept ids; 0 is no tail at all.

    No id of the tail is likelier than a kept one, so that its odds are at most `(V - k) / k`,
    with as many kept ids as have a value of their own: nine at least, where the values fall gently.
    """

    def __init__(self, k: int, vocab_size: int) -> None:
        highest = math.log(vocab_size / min(k, 1 + BYTE_VALUES)) + 0.3
        logs = np.linspace(_LEAST, highest, 20_000)
        density = np.logaddexp(0, logs) + _FLOOR * logs
        even = np.linspace(density[0], density[-1], 255)
        self._logs = np.interp(even, density, logs)
        self._middles = (self._logs[1:] + self._logs[:-1]) / 2
        self._odds = np.append(0, np.exp(self._logs)).astype(np.float32)

    def packed(self, odds: NDArray[np.float64], ends: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """`[n, g]` odds to as many bytes.

        Args:
            ends: `[n]`, whether odds too low to tell are none (else they are the least there are).
        """
        logs = np.log(np.maximum(odds, LEAST_TAIL / 2))
        codes = 1 + np.searchsorted(self._middles, logs)
        return np.where((logs < _LEAST) & ends[:, None], 0, codes).astype(np.uint8)

    def unpacked(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`[n, g]` odds."""
        return self._odds.take(codes)
