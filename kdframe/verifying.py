"""Whether a cache holds what the teacher says: some rows, read by the teacher again.

The teacher reads each row twice, alone and in the company of others. How far the two readings
differ is the noise floor; how far a reading differs from itself once the codec has written it is
the codec's step. A stored row is bad where it differs by more than both explain.
Letters: `n` positions, `V` the vocabulary, `k` kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdframe import batching, caching
from kdframe.batching import TokenRows
from kdframe.cache_parts import BadRow, RowPositions
from kdframe.heads import TeacherOutputs
from kdframe.live_teacher import states
from kdframe.output_layer import Halves
from kdframe.progress import Progress
from kdframe.targets import (
    DenseTargets,
    HiddenTargets,
    TeacherTargets,
    TruncatedTargets,
    WeightedTargets,
)
from kdframe.teacher_cache import TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOISE_MULTIPLE = 4.0
STEP_MULTIPLE = 2.0
LEAST = 1e-3
"""Nats that are never held against a row: another processor rounds in another way."""

_LOWEST = -1e4  # stands for log 0
_NOTHING = 5e-7  # a share below float32's resolution of a sum near 1


@dataclass(frozen=True)
class Difference:
    """How far apart two distributions are, at most, over the positions of some rows.

    Attributes:
        log_prob: the largest difference of a log-probability, in nats. For draws: the mean total
            variation between the weights.
        kl: the largest Kullback-Leibler divergence at a position, in nats; 0 for draws.
    """

    log_prob: float = 0.0
    kl: float = 0.0

    def or_more(self, other: Difference) -> Difference:
        """The larger of each."""
        return Difference(max(self.log_prob, other.log_prob), max(self.kl, other.kl))

    def within(self, limit: Difference) -> bool:
        """Whether neither is above the limit's; what is no number never is."""
        return self.log_prob <= limit.log_prob and self.kl <= limit.kl


@dataclass(frozen=True)
class Comparison:
    """What the teacher said of stored rows.

    Attributes:
        rows: how many rows were compared.
        noise: between two readings; step: between a reading and itself, written and read.
        limit: 4 times the noise and twice the step (amplitudes: a divergence grows with the
            square), at least 0.001 nats.
        largest: between what is stored and a reading.
        bad: the rows beyond the limit, at each place that holds them.
    """

    rows: int = 0
    noise: Difference = Difference()
    step: Difference = Difference()
    limit: Difference = Difference()
    largest: Difference = Difference()
    bad: list[BadRow] = field(default_factory=list)


def recompute(
    store: TeacherCache,
    sets: Sequence[TokenRows],
    teacher: Callable[[], PreTrainedModel],
    *,
    rows: int,
    batch_tokens: int,
    progress: Progress,
    skip: Collection[str] = (),
    seed: int | None = None,
) -> Comparison:
    """Have the teacher read some of the stored rows of the data, and compare.

    Args:
        teacher: called only where there is a row to read.
        rows: how many, drawn at random; all of them if there are fewer.
        batch_tokens: size of the forward pass in which a row has company.
        skip: keys (hexadecimal) of rows that are known to be damaged.
        seed: of the draw; None draws other rows each time.

    Raises:
        DamagedError: a row that is not skipped fails its checksum.
    """
    drawn = _draw(store, sets, rows, skip, seed)
    if not drawn:
        return Comparison()
    ids = caching.token_ids(sets, {request.key: request for request in drawn})
    halves = Halves(teacher())
    found: dict[bytes, _Seen] = {}
    with progress.stage("read again", len(drawn), "rows") as bar:
        for batch in _in_company(drawn, ids, batch_tokens):
            for request, alone, together in _readings(halves, batch, ids):
                found[request.key] = _compare(store, halves, request, alone, together)
                bar.advance(1)
    return _judged(store, found)


@dataclass(frozen=True)
class _Seen:
    stored: Difference
    noise: Difference
    step: Difference


def _draw(
    store: TeacherCache,
    sets: Sequence[TokenRows],
    rows: int,
    skip: Collection[str],
    seed: int | None,
) -> list[RowPositions]:
    if rows == 0:
        return []
    wanted = [request for request in store.wanted(sets) if request.key.hex() not in skip]
    absent = set(store.cache.missing(wanted))
    there = [request for i, request in enumerate(wanted) if i not in absent]
    chosen = np.random.default_rng(seed).permutation(len(there))[:rows]
    return [there[i] for i in chosen.tolist()]


def _in_company(
    drawn: Sequence[RowPositions], ids: Mapping[bytes, NDArray[np.int32]], batch_tokens: int
) -> Iterator[list[RowPositions]]:
    """Batches of at least two rows: one that would be alone again comes twice."""
    lengths = np.array([len(ids[request.key]) for request in drawn])
    for batch in batching.planned(lengths, np.arange(len(drawn)), tokens=batch_tokens):
        yield [drawn[i] for i in batch] * (1 if len(batch) > 1 else 2)


@torch.no_grad()
def _readings(
    halves: Halves, batch: Sequence[RowPositions], ids: Mapping[bytes, NDArray[np.int32]]
) -> Iterator[tuple[RowPositions, Tensor, Tensor]]:
    """Each row of the batch with its final states `[n, H]`, read alone and together."""
    rows = [ids[request.key] for request in batch]
    together = states(halves, rows, batch)
    seen: set[bytes] = set()
    end = 0
    for request, row in zip(batch, rows, strict=True):
        begin, end = end, end + len(request.positions)
        if request.key not in seen:
            seen.add(request.key)
            yield request, states(halves, [row], [request]), together[begin:end]


@torch.no_grad()
def _compare(
    store: TeacherCache, halves: Halves, request: RowPositions, alone: Tensor, together: Tensor
) -> _Seen:
    records = store.cache.read([request])
    size = halves.chunk()
    seen = []
    for start in range(0, len(records), size):
        part = slice(start, start + size)
        reading, other = (TeacherOutputs(x[part], halves.head) for x in (alone, together))
        exact = torch.log_softmax(reading.logits.float(), dim=-1).cpu()
        again = store.codec.decode(store.codec.encode(reading))
        if isinstance(again, WeightedTargets):
            noisy: TeacherTargets = store.codec.decode(store.codec.encode(other))
        else:
            noisy = _as(again, torch.log_softmax(other.logits.float(), dim=-1).cpu())
        stored = store.codec.decode(records[part])
        seen.append([_difference(x, exact, again) for x in (stored, noisy, again)])
    draws = isinstance(again, WeightedTargets)
    stored_, noise, step = (_over(column, draws) for column in zip(*seen, strict=True))
    if isinstance(again, WeightedTargets):
        step = Difference(1 / again.ids.shape[1])  # one draw
    return _Seen(stored_, noise, step)


def _over(parts: Sequence[tuple[Tensor, Tensor]], draws: bool) -> Difference:
    """The largest of all positions; of draws the mean, since one may fall to a neighbour."""
    log_prob, kl = (torch.cat(column) for column in zip(*parts, strict=True))
    return Difference(float(log_prob.mean() if draws else log_prob.max()), float(kl.max()))


def _as(targets: TeacherTargets, exact: Tensor) -> TeacherTargets:
    """`exact [n, V]` log-probabilities in the form of `targets`, with its ids."""
    if not isinstance(targets, TruncatedTargets):
        return DenseTargets(exact)
    log_z = torch.stack([torch.logsumexp(exact / t, dim=-1) for t in targets.grid], dim=-1)
    return TruncatedTargets(targets.ids, exact.gather(-1, targets.ids), targets.grid, log_z)


def _difference(
    targets: TeacherTargets, exact: Tensor, again: TeacherTargets
) -> tuple[Tensor, Tensor]:
    """`[n]` each: the largest difference of a log-probability, and the divergence.

    Args:
        exact: `[n, V]`, the reading's log-probabilities; again: the reading as the codec has it.
    """
    if isinstance(targets, HiddenTargets):
        targets = targets.dense()
    if isinstance(targets, DenseTargets):
        return _apart(targets.log_probs.cpu(), exact)
    if isinstance(targets, TruncatedTargets):
        return _truncated_apart(targets, exact)
    assert isinstance(again, WeightedTargets)
    size = exact.shape[-1]
    variation = (_spread(targets, size) - _spread(again, size)).abs().sum(-1) / 2
    return variation, torch.zeros_like(variation)


def _apart(found: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    found, exact = found.clamp(min=_LOWEST), exact.clamp(min=_LOWEST)
    difference = exact - found
    return difference.abs().amax(-1), (exact.exp() * difference).sum(-1)


def _truncated_apart(targets: TruncatedTargets, exact: Tensor) -> tuple[Tensor, Tensor]:
    """The kept ids, and the tail: its mass at T = 1, and `log_z` at the other temperatures."""
    kept = ~targets.log_probs.isneginf()
    found = targets.log_probs.masked_fill(~kept, 0)
    wanted = exact.gather(-1, targets.ids).clamp(min=_LOWEST).masked_fill(~kept, 0)
    shares = [x.exp().masked_fill(~kept, 0) for x in (wanted, found)]
    rest, guessed = ((1 - share.sum(-1)).clamp(min=_NOTHING) for share in shares)
    kl = (shares[0] * (wanted - found)).sum(-1) + rest * (rest / guessed).log()
    log_z = torch.stack([torch.logsumexp(exact / t, dim=-1) for t in targets.grid], dim=-1)
    tail = (log_z - targets.grid_log_z).abs().amax(-1)
    return torch.maximum((wanted - found).abs().amax(-1), tail), kl


def _spread(targets: WeightedTargets, size: int) -> Tensor:
    return torch.zeros(len(targets), size).scatter_add(-1, targets.ids, targets.weights)


def _judged(store: TeacherCache, found: Mapping[bytes, _Seen]) -> Comparison:
    noise, step, largest = Difference(), Difference(), Difference()
    for seen in found.values():
        noise, step = noise.or_more(seen.noise), step.or_more(seen.step)
        largest = largest.or_more(seen.stored)
    limit = _limit(noise, step)
    bad = [
        BadRow(key.hex(), place, _reason(seen.stored, limit))
        for key, seen in found.items()
        if not seen.stored.within(limit)
        for place in store.cache.places(key)
    ]
    return Comparison(len(found), noise, step, limit, largest, bad)


def _limit(noise: Difference, step: Difference) -> Difference:
    def amplitude(noise: float, step: float) -> float:
        return max(LEAST, NOISE_MULTIPLE * noise + STEP_MULTIPLE * step)

    kl = amplitude(max(0.0, noise.kl) ** 0.5, max(0.0, step.kl) ** 0.5)
    return Difference(amplitude(noise.log_prob, step.log_prob), max(LEAST, kl**2))


def _reason(stored: Difference, limit: Difference) -> str:
    return (
        f"the teacher says something else: {stored.log_prob:.3g} nats from it, divergence "
        f"{stored.kl:.3g} (noise and codec explain {limit.log_prob:.3g} and {limit.kl:.3g})"
    )
