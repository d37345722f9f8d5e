"""The codec `topk`: the likeliest ids, and the mass of all others at a grid of temperatures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kdframe.api import InputError, TeacherOutputs, TeacherShape, TruncatedTargets
from kdframe_codecs import topk_ids, topk_values
from kdframe_codecs.topk_logits import power_sums, powers_of, read
from kdframe_codecs.topk_tails import TailOdds

if TYPE_CHECKING:
    from kdframe_codecs import TopK


class TopKCodec:
    """`k` ids and log-probabilities, and the tail's share on the grid, for each position.

    The record is described by `Layout`. Measured on a language model (docs/performance.md): a
    kept log-probability errs by 0.01 nats (root mean square), the tail's logarithm above T = 1 by
    as much. The decoded mass of the kept ids is never above the true one but for float32's error,
    and nothing is normalised again: what the rounding loses, at most 0.04 %, counts to the tail.
    Where every id is kept there is no tail; the values are float16 and normalised when read.

    Attributes:
        record_bytes: size of one record.
    """

    def __init__(self, config: TopK, shape: TeacherShape) -> None:
        self._layout = config.layout(shape)
        self.record_bytes = self._layout.size
        self._grid = config.temperatures
        self._plan = powers_of(config.temperatures)
        # Where each temperature of the grid stands in the plan.
        self._order = [[p.temperature for p in self._plan].index(t) for t in self._grid]
        self._tails = TailOdds(self._layout.k, shape.vocab_size)

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """The logits at `n` positions to records `[n, B]`."""
        found = read(outputs.logits.float(), self._layout.k, self._plan)
        logits, ids, sums = (x.cpu().numpy() for x in found)
        below = logits.astype(np.float64)
        # Logits that are no numbers make records that are thrown away, and no noise.
        with np.errstate(invalid="ignore"):
            below -= logits[:, :1]
            log_sums = np.log(sums[:, self._order])  # with the likeliest id at 1
            log_probs = np.minimum(below - log_sums[:, :1], 0)
            return self._written(log_probs, ids, log_sums + log_probs[:, :1] / self._grid)

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
        if self._layout.whole:
            raise InputError("cache.codec.k: covers the whole vocabulary; set a smaller one")
        size = min(self._layout.k, targets.ids.shape[1])
        values, places = targets.log_probs.topk(size)
        ids = np.zeros((len(targets), self._layout.k), np.int64)
        ids[:, :size] = targets.ids.gather(1, places).cpu().numpy()
        log_probs = np.full(ids.shape, -np.inf)
        log_probs[:, :size] = values.clamp(max=0).cpu().numpy()
        columns = [targets.grid.index(t) for t in self._grid]
        return self._written(log_probs, ids, targets.grid_log_z[:, columns].double().cpu().numpy())

    def _written(
        self, log_probs: NDArray[np.float64], ids: NDArray[np.int64], log_z: NDArray[np.float64]
    ) -> NDArray[np.uint8]:
        """Records `[n, B]` of falling log-probabilities and their ids `[n, k]`, `log_z [n, g]`."""
        records = np.empty((len(ids), self.record_bytes), np.uint8)
        low, high, first, bytewise, nibbles, whole, tails = (
            records[:, part] for part in self._layout.slices
        )
        low[:] = topk_ids.low_bytes(ids)
        if self._layout.high_bits:
            high[:] = topk_ids.high_bytes(ids, self._layout.high_bits)
        if self._layout.whole:
            whole[:] = log_probs.astype("<f2").view(np.uint8)
            return records
        first[:], bytewise[:], nibbles[:] = topk_values.packed(log_probs)
        decoded = topk_values.unpacked(first, bytewise, nibbles, self._layout.k)
        odds = np.exp(log_z) / self._sums(decoded) - 1
        tails[:] = self._tails.packed(odds, topk_values.ends(log_probs))[:, 1:]
        return records

    def decode(self, records: NDArray[np.uint8]) -> TruncatedTargets:
        """Records `[n, B]` to targets."""
        low, high, first, bytewise, nibbles, whole, tails = (
            records[:, part] for part in self._layout.slices
        )
        ids = torch.from_numpy(topk_ids.unpacked(low, high, self._layout.high_bits))
        if self._layout.whole:
            halves = torch.from_numpy(np.array(whole).view("<f2"))
            log_probs = torch.log_softmax(halves.float(), dim=-1)
            log_z = torch.stack([(log_probs / t).logsumexp(-1) for t in self._grid], dim=1)
            return TruncatedTargets(ids, log_probs, self._grid, log_z)
        values = topk_values.unpacked(first, bytewise, nibbles, self._layout.k)
        sums = self._sums(values)
        sums[:, 1:] *= 1 + self._tails.unpacked(tails)
        sums[:, 0] = 1
        log_z = torch.from_numpy(np.log(sums))
        return TruncatedTargets(ids, torch.from_numpy(values), self._grid, log_z)

    def _sums(self, log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
        """`[n, g]`: the kept ids' sums of `p ** (1/T)`."""
        x = torch.from_numpy(log_probs)
        scratch = x.new_empty((len(self._plan), *x.shape))
        found: NDArray[np.float32] = power_sums(x, None, self._plan, scratch).numpy()
        return found[:, self._order]
