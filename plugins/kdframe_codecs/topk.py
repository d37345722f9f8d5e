"""The codec `topk`: the likeliest ids, and the exact mass of all others at a grid of temperatures.

A record is `k` ids (uint16 up to 65,536 of them, else uint32), `k` values (float16, log p at
T = 1) and one `log_z` (float32) for each temperature above 1; little-endian, no padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdframe.api import InputError, TeacherOutputs, TeacherShape, TruncatedTargets

if TYPE_CHECKING:
    from kdframe_codecs import TopK

_CHUNK = 1 << 18  # logits worked on at once: a few buffers of them fit the processor's cache
_SLACK = 1e-6  # mass held back for float32's own rounding, so that no sum passes 1


class TopKCodec:
    """`k` ids and log-probabilities, and `log_z` on the grid, for each position.

    The values are rounded to float16 so that their mass is never above the true mass of the
    kept ids and hardly below it: what is left, the tail, would otherwise hold the sum of all
    roundings.

    Attributes:
        record_bytes: size of one record.
    """

    def __init__(self, config: TopK, shape: TeacherShape) -> None:
        vocab_size = shape.vocab_size
        self.record_bytes = config.record_bytes(shape)
        self._vocab_size = vocab_size
        self._k = min(config.k, vocab_size)
        self._grid = config.temperatures
        self._chains = _chains(config.temperatures)
        fields = [
            ("ids", "<u2" if vocab_size <= 65_536 else "<u4", (self._k,)),
            ("values", "<f2", (self._k,)),
            ("log_z", "<f4", (len(self._grid) - 1,)),
        ]
        self._dtype = np.dtype(fields)

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """The logits at `n` positions to records `[n, B]`."""
        logits = outputs.logits.float()
        n = len(logits)
        ids = logits.new_empty((n, self._k), dtype=torch.int64)
        values = logits.new_empty((n, self._k), dtype=torch.float64)
        log_z = logits.new_empty((n, len(self._grid)), dtype=torch.float64)
        step = max(1, _CHUNK // self._vocab_size)
        scratch = logits.new_empty((2, min(step, n), self._vocab_size))
        for i in range(0, n, step):
            part = slice(i, i + step)
            highest, ids[part] = _top(logits[part], self._k)
            sums = _power_sums(logits[part], highest[:, :1], self._chains, scratch)
            log_z[part] = torch.stack([sums[t] for t in self._grid], dim=1)
            values[part] = highest - highest[:, :1]
        log_z = log_z.log_()
        values -= log_z[:, :1]
        log_z -= log_z[:, :1] / log_z.new_tensor(self._grid)
        records = np.empty(n, self._dtype)
        records["ids"] = ids.cpu().numpy()
        records["values"] = _to_float16(values.clamp_(max=0).cpu().numpy())
        records["log_z"] = log_z[:, 1:].cpu().numpy()
        return records.view(np.uint8).reshape(n, self.record_bytes)

    def encode_truncated(self, targets: TruncatedTargets) -> NDArray[np.uint8]:
        """Targets of any number of ids to records `[n, B]`: the `k` likeliest, fewer as `-inf`.

        Raises:
            InputError: the tail is not known at all temperatures of the grid, or `k` leaves none.
        """
        unknown = [f"{t:g}" for t in self._grid if t not in targets.grid]
        if unknown:
            raise InputError(
                f"cache.codec.temperatures: the tail at T = {', '.join(unknown)} does not follow "
                f"from predictions at T = {', '.join(f'{t:g}' for t in targets.grid)}; set "
                f"cache.codec.temperatures to {[float(t) for t in targets.grid]}"
            )
        if self._k == self._vocab_size:
            raise InputError("cache.codec.k: covers the whole vocabulary; set a smaller one")
        size = min(self._k, targets.ids.shape[1])
        values, places = targets.log_probs.topk(size)
        records = np.zeros(len(targets), self._dtype)
        records["ids"][:, :size] = targets.ids.gather(1, places).cpu().numpy()
        records["values"][:, size:] = -np.inf
        records["values"][:, :size] = _to_float16(values.double().clamp(max=0).cpu().numpy())
        columns = [targets.grid.index(t) for t in self._grid[1:]]
        records["log_z"] = targets.grid_log_z[:, columns].cpu().numpy()
        return records.view(np.uint8).reshape(len(targets), self.record_bytes)

    def decode(self, records: NDArray[np.uint8]) -> TruncatedTargets:
        """Records `[n, B]` to targets.

        Where every id is kept nothing is left for a tail, and the values are normalised again
        after their rounding, as the codec `dense` does.
        """
        fields = np.ascontiguousarray(records).view(self._dtype)[:, 0]
        ids = torch.from_numpy(fields["ids"].astype(np.int64))
        log_probs = torch.from_numpy(fields["values"].copy()).float()
        if self._k == self._vocab_size:
            log_probs = torch.log_softmax(log_probs, dim=-1)
            log_z = torch.stack([(log_probs / t).logsumexp(-1) for t in self._grid], dim=1)
            return TruncatedTargets(ids, log_probs, self._grid, log_z)
        log_z = torch.zeros(len(records), len(self._grid))
        log_z[:, 1:] = torch.from_numpy(fields["log_z"].astype(np.float32))
        return TruncatedTargets(ids, log_probs, self._grid, log_z)


def _chains(grid: Sequence[float]) -> list[list[float]]:
    """Temperatures in chains where each is half of the one before: 4, 2, 1; 3, 1.5; 5.

    Down a chain `exp(x / T)` comes by squaring, which costs a fraction of an exponential.
    """
    left = sorted(grid, reverse=True)
    chains = []
    while left:
        chain = [left.pop(0)]
        while chain[-1] / 2 in left:
            left.remove(chain[-1] / 2)
            chain.append(chain[-1] / 2)
        chains.append(chain)
    return chains


def _power_sums(
    logits: Tensor, highest: Tensor, chains: Sequence[Sequence[float]], scratch: Tensor
) -> dict[float, Tensor]:
    """`[n]` for each temperature: the sum over the vocabulary of `exp((logits - highest) / T)`.

    With `highest [n, 1]`, each row's maximum, every sum is at least 1. `scratch` is
    `[2, n or more, V]`: memory used again is several times faster than new memory.
    """
    shifted, powers = scratch[:, : len(logits)]
    torch.sub(logits, highest, out=shifted)
    sums = {}
    for chain in chains:
        torch.mul(shifted, 1 / chain[0], out=powers)
        powers.exp_()
        for i, temperature in enumerate(chain):
            if i:
                powers.mul_(powers)
            sums[temperature] = powers.sum(-1)
    return sums


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`[n, k]` each: the largest logits and their ids, falling.

    The vocabulary is cut into columns; the `k` largest logits lie in the `k` columns of the
    largest maxima, so that the costly selection runs over a small part.
    """
    vocab_size = logits.shape[1]
    depth = math.isqrt(vocab_size // k)
    if depth < 4:
        values, ids = logits.topk(k)
        return values, ids
    columns = vocab_size // depth
    best = logits[:, : depth * columns].reshape(-1, depth, columns).amax(1)
    best = best.topk(k, sorted=False).indices
    level = torch.arange(depth, device=logits.device).unsqueeze(-1) * columns
    rest = torch.arange(depth * columns, vocab_size, device=logits.device)
    ids = torch.cat([(level + best.unsqueeze(1)).flatten(1), rest.expand(len(logits), -1)], dim=1)
    values, places = logits.gather(1, ids).topk(k)
    return values, ids.gather(1, places)


def _to_float16(log_probs: NDArray[np.float64]) -> NDArray[np.float16]:
    """Round `[n, k]` log-probabilities, falling, so that their mass stays just under the true one.

    Each is rounded down; where the mass lost so far pays for it, it is rounded up instead.
    """
    bits = (-log_probs).astype(np.float16).view(np.uint16)  # of the magnitude: 0 is p = 1
    bits += bits.view(np.float16) < -log_probs
    down = np.exp(-(bits.view(np.float16).astype(np.float64)))
    above = np.where((bits > 0) & (bits < 0x7C00), bits - 1, bits).astype(np.uint16)
    gain = np.exp(-(above.view(np.float16).astype(np.float64))) - down
    lost = np.exp(log_probs) - down
    gain, lost, bits, above = (np.ascontiguousarray(x.T) for x in (gain, lost, bits, above))
    owed = np.full(len(log_probs), -_SLACK)
    for i in range(len(bits)):
        owed += lost[i]
        up = owed >= gain[i]
        owed -= np.where(up, gain[i], 0)
        np.copyto(bits[i], above[i], where=up)
    return -bits.view(np.float16).T
