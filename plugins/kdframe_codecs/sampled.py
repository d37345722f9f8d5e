"""The codec `sampled`: ids drawn from the teacher's distribution at one temperature.

Ids of a probability above some θ are kept for certain, with their own weight. The others are drawn
with a probability in proportion to p and share one weight. The least likely are drawn within one
of 16 groups of the vocabulary, itself drawn with 1/16, and weigh 16 times as much there: as long as
16 p < θ their probability, and so their variance, is what it was, but an id takes 4 bits less.
(The parts and their sources are in `drawn` and `drawn_records`.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdframe.api import TeacherOutputs, TeacherShape, WeightedTargets
from kdframe_codecs import drawn
from kdframe_codecs.drawn_records import COMMON_GRID, OWN_GRID, Drawn, Layout

if TYPE_CHECKING:
    from kdframe_codecs import Sampled

_CHUNK = 1 << 20  # values worked on at once
_TELLING, _STEP = 4, 0.5  # so many ids, and their logits to half a nat, tell a row from another
_OF_ID = 8  # from here on, random numbers belong to ids


@dataclass(frozen=True)
class _Parts:
    """Distributions, parted. Values are in units of a row's largest probability.

    Attributes:
        total: `[n]`, the sum of all values; key: `[n]`, what random numbers come from.
        ids: `[n, K]`, the likely ids, ascending; found: `[n, K]`, their values, 0 past the last.
        certain: `[n, K]`, which of them are kept for certain.
        group: `[n]`, the group in which unlikely ids are drawn; members: `[n, members]`, the
            values of its ids, 0 for the likely.
    """

    total: Tensor
    key: NDArray[np.uint64]
    ids: Tensor
    found: Tensor
    certain: Tensor
    group: NDArray[np.int64]
    members: Tensor


class SampledCodec:
    """Draws whose expected weight is `p_T(v)` for every id `v`, their rounding included.

    The draw is a function of the seed and of the position's own logits: equal logits give an equal
    record in any batch. What differs from batch to batch in the last bits of a forward pass
    changes hardly any draw, since the random numbers do not hang on those bits.

    Attributes:
        record_bytes: size of one record.
    """

    def __init__(self, config: Sampled, shape: TeacherShape) -> None:
        self._layout = Layout(shape.vocab_size, config.entries)
        self.record_bytes = self._layout.record_bytes
        self._vocab_size = shape.vocab_size
        self._temperature = config.temperature
        self._seed = config.seed

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """The logits at `n` positions to records `[n, B]`."""
        logits = outputs.logits.float()
        records = np.empty((len(logits), self.record_bytes), np.uint8)
        step = max(1, _CHUNK // self._vocab_size)
        for i in range(0, len(logits), step):
            records[i : i + step] = self._layout.pack(
                self._drawn(self._parts(logits[i : i + step]))
            )
        return records

    def decode(self, records: NDArray[np.uint8]) -> WeightedTargets:
        """Records `[n, B]` to targets."""
        ids, weights = self._layout.unpack(records)
        return WeightedTargets(torch.from_numpy(ids), torch.from_numpy(weights), self._temperature)

    def _parts(self, logits: Tensor) -> _Parts:
        """The distributions parted, and the group chosen."""
        prices, groups = self._layout.prices, self._layout.groups
        values = logits - logits.amax(-1, keepdim=True)
        values = values.div_(self._temperature).exp_()
        total = values.sum(-1).double()
        top, best = _largest(values, prices.most_certain + 1)
        key = drawn.keys(self._seed, _told_apart(logits, best))
        cuts = drawn.cuts(top, total, prices, groups)
        ids, count = _places(values > cuts.unlikely.unsqueeze(-1))
        found = _past(values.gather(-1, ids), count)
        group = (drawn.uniform(key, 0) * groups).astype(np.int64)
        members = self._members(values, torch.from_numpy(group).to(values.device))
        return _Parts(
            total=total,
            key=key,
            ids=ids,
            found=found,
            certain=found > cuts.certain.unsqueeze(-1),
            group=group,
            members=members.masked_fill(members > cuts.unlikely.unsqueeze(-1), 0).double(),
        )

    def _drawn(self, parts: _Parts) -> Drawn:
        """What the random numbers take of them."""
        key, certain, total = parts.key, parts.certain, parts.total
        likely = parts.found.masked_fill(certain, 0).double()
        unlikely = (total - parts.found.double().sum(-1)).clamp(min=0)
        masses = (likely.sum(-1), unlikely, parts.members.sum(-1))
        largest = (likely.amax(-1), parts.members.amax(-1))
        h, t = drawn.shares(masses, largest, certain.sum(-1), self._layout.prices)
        starts = [torch.from_numpy(drawn.uniform(key, i)).to(total.device) for i in (1, 2)]
        taken, a = _places(_marked(certain, drawn.systematic(likely, h, starts[0]), h))
        alike = (masses[0] / h.clamp(min=1), masses[2] * self._layout.groups / t.clamp(min=1))
        weights = torch.stack(alike, dim=-1) / total[:, None]
        own = parts.found.gather(-1, taken) / total[:, None]
        ids = parts.ids.gather(-1, taken).cpu().numpy()
        return Drawn(
            group=parts.group,
            counts=torch.stack([a, t], dim=-1).cpu().numpy(),
            weights=_levels(weights, COMMON_GRID, drawn.uniform(key[:, None], np.array([3, 4]))),
            likely=ids,
            certain=certain.gather(-1, taken).cpu().numpy(),
            own=_levels(own, OWN_GRID, drawn.uniform(key[:, None], _OF_ID + ids)),
            unlikely=drawn.systematic(parts.members, t, starts[1]).cpu().numpy(),
        )

    def _members(self, values: Tensor, group: Tensor) -> Tensor:
        """The values of a group's ids, `[n, members]`, 0 past the last id of the vocabulary."""
        ids = torch.arange(self._layout.members, device=values.device) * self._layout.groups
        ids = ids + group.unsqueeze(-1)
        inside = ids < self._vocab_size
        return values.gather(-1, ids.where(inside, 0)).where(inside, 0)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`[n, count]`, falling, zeros where there are no more; and `[n, 1 or more]` their ids."""
    size = min(max(count, _TELLING), values.shape[1])
    found, ids = values.topk(size, dim=-1)
    return torch.nn.functional.pad(found, (0, max(0, count - size)))[:, :count], ids


def _told_apart(logits: Tensor, best: Tensor) -> NDArray[np.int64]:
    """`[n, m]`: what tells a position from others, but not from itself read with other rounding.

    The likeliest ids in their order, and roughly their logits.
    """
    best = best[:, :_TELLING]
    steps = logits.gather(-1, best).div(_STEP).round().clamp(min=-(2**40), max=2**40)
    return torch.cat([best, steps.long()], dim=-1).cpu().numpy()


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask is set, `[n, most of a row]` ascending, and how often in each row."""
    row, column = mask.nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(mask))  # faster than a sum over the whole mask
    rank = torch.arange(len(row), device=mask.device) - (count.cumsum(0) - count)[row]
    places = count.new_zeros(len(mask), max(1, int(count.max())))
    places[row, rank] = column
    return places, count


def _past(values: Tensor, count: Tensor) -> Tensor:
    """`values [n, m]` with zeros from a row's `count` on."""
    return values.where(torch.arange(values.shape[1], device=values.device) < count[:, None], 0)


def _marked(mask: Tensor, places: Tensor, count: Tensor) -> Tensor:
    """`mask [n, K]`, set also at the first `count` of a row's places."""
    own = torch.arange(places.shape[1], device=mask.device) < count[:, None]
    return mask.int().scatter_add(-1, places, own.int()) > 0


def _levels(
    values: Tensor, grid: NDArray[np.float64], chance: NDArray[np.float64]
) -> NDArray[np.int64]:
    return drawn.rounded(values.double().cpu().numpy(), grid, chance)
