"""Ids drawn from the teacher's distribution, before they become bytes.

Letters: `n` positions, `V` the vocabulary, `F` groups of it (the ids that are equal modulo `F`),
`K` likely ids that a row has, `h` and `t` draws among the likely and among the unlikely.

Every estimate here is that of Horvitz and Thompson (JASA 47, 1952): an id drawn with probability
π weighs p / π, so that its expected weight is p whatever π is. With π = min(1, p / θ) the sum of
the variances is the least that so many entries allow (Duffield, Lund and Thorup, "Learn more,
sample less", IEEE Transactions on Information Theory 51, 2005); systematic draws reach it with a
fixed number of them (Madow, Annals of Mathematical Statistics 20, 1949).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MARGIN = 1 - 1e-9  # under one draw for an id, by more than float64's rounding
_LEAST = 1e-6  # a rest of this mass or less is not told from float32's rounding


@dataclass(frozen=True)
class Prices:
    """What an entry takes of a record, in bits, and the bits that there are.

    Attributes:
        certain: an id with its own weight; likely: a drawn id; unlikely: one in a known group.
    """

    room: int
    certain: int
    likely: int
    unlikely: int

    @property
    def most_certain(self) -> int:
        """So many certain ids leave room for one of either drawn kind."""
        return max(0, (self.room - self.likely - self.unlikely) // self.certain)


@dataclass(frozen=True)
class Cuts:
    """`[n]` each: ids above `certain` are kept, those at `unlikely` or below are drawn in groups.

    In units of the row's largest probability, float32 like the values that they part.
    """

    certain: Tensor
    unlikely: Tensor


def cuts(top: Tensor, total: Tensor, prices: Prices, groups: int) -> Cuts:
    """Where the distribution is parted, so that the record is used best. No bias hangs on it.

    Args:
        top: `[n, prices.most_certain + 1]`, the largest values, falling, zeros after the last.
        total: `[n]`, float64, the sum of all values.
    """
    values = top.double()
    certain = torch.arange(top.shape[1], device=top.device)
    before = values.cumsum(-1) - values
    rest = torch.maximum(total.unsqueeze(-1) - before, _LEAST * total.unsqueeze(-1))
    price = (prices.likely + prices.unlikely) / 2
    # One drawn entry's weight, if the `certain` first are kept and the others are drawn.
    step = rest * price / (prices.room - certain * prices.certain)
    settled = values <= step
    settled[:, -1] = True
    step = step.gather(-1, settled.int().argmax(-1, keepdim=True)).squeeze(-1)
    # An id of a group is drawn with F times its probability, which must stay below 1. (Parted at
    # two thirds of this, or at five thirds, the variance was larger.)
    unlikely = step * (prices.unlikely / prices.likely) ** 0.5 / groups
    return Cuts(torch.maximum(step.float(), top[:, -1]), unlikely.float())


def shares(
    mass: tuple[Tensor, Tensor, Tensor],
    largest: tuple[Tensor, Tensor],
    certain: Tensor,
    prices: Prices,
) -> tuple[Tensor, Tensor]:
    """How many ids are drawn among the likely and in the group, `[n]` each.

    At least one where there is any mass; so few that none is drawn twice.

    Args:
        mass: `[n]` each, of the likely that are not certain, of all unlikely, and of the
            group's unlikely.
        largest: `[n]` each, the greatest value among the first and among the last of these.
        certain: `[n]`, how many ids are kept for certain.
    """
    likely, unlikely, group = mass
    left = prices.room - certain * prices.certain
    cheap = (prices.unlikely / prices.likely) ** 0.5  # cheaper entries, smaller weights
    wanted = likely * prices.likely + unlikely * (prices.unlikely / cheap)
    h = (likely * left / wanted.clamp(min=torch.finfo(wanted.dtype).tiny)).round()
    h = h.minimum((left - prices.unlikely).div(prices.likely, rounding_mode="floor"))
    h = _possible(h, likely, largest[0])
    t = (left - h * prices.likely).div(prices.unlikely, rounding_mode="floor")
    return h, _possible(t, group, largest[1])


def _possible(draws: Tensor, mass: Tensor, largest: Tensor) -> Tensor:
    most = (mass * _MARGIN / largest.clamp(min=torch.finfo(mass.dtype).tiny)).floor()
    return torch.where(mass > 0, draws.minimum(most).clamp(min=1), 0).long()


def systematic(values: Tensor, draws: Tensor, start: Tensor) -> Tensor:
    """Places drawn with probability `draws * value / sum`, ascending: `[n, most draws]`.

    Equidistant points along the running sum, the first at a random place. Nothing of value 0 is
    ever drawn. Past a row's own number of draws the places mean nothing.

    Args:
        values: `[n, K]` float64, not negative, each at most `sum / draws`.
        draws: `[n]` int64; start: `[n]` float64, uniform in [0, 1).
    """
    running = values.cumsum(-1)
    each = running[:, -1:] / draws.clamp(min=1).unsqueeze(-1)
    points = torch.arange(int(draws.max()), device=values.device) + start.unsqueeze(-1)
    places = torch.searchsorted(running, points * each, right=True)
    return places.clamp(max=values.shape[1] - 1)


def keys(seed: int, telling: NDArray[np.int64]) -> NDArray[np.uint64]:
    """`[n]`: what all of a row's random numbers come from; a function of seed and row alone.

    Args:
        telling: `[n, m]`, numbers that tell two rows from each other.
    """
    bits = telling.astype(np.uint64)
    odd = _mixed(np.arange(1, bits.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return _mixed(
        (bits * odd).sum(-1, dtype=np.uint64)
        ^ _mixed(np.array([seed % 2**64]).astype(np.uint64) * _GOLDEN)
    )


def uniform(key: NDArray[np.uint64], which: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Numbers in [0, 1): one for each key and each `which`, broadcast against each other."""
    counter = np.asarray(which).astype(np.uint64) * _GOLDEN
    return (_mixed(key + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rounded(
    values: NDArray[np.float64], grid: NDArray[np.float64], chance: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Places of values on an ascending grid, up or down by chance: the expectation is the value.

    Args:
        values: within the grid; chance: uniform in [0, 1), of the same shape.
    """
    above = np.searchsorted(grid, values, side="right").clip(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    places: NDArray[np.int64] = above - 1 + (chance * (high - low) < values - low)
    return places
