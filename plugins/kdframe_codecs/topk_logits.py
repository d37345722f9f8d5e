"""What the codec `topk` needs to know of logits: the largest, and sums over the vocabulary.

Rows are worked on a few at a time, so that the processor's cache holds the intermediate results;
each thread takes rows of its own. Letters: `n` positions, `k` kept ids, `V` the vocabulary, `g`
temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 18  # logits worked on at once
_WIDE_BLOCK = 1 << 26  # the same on an accelerator


@dataclass(frozen=True)
class Power:
    """`exp(x / T)`: computed, or the product of two that are there already.

    Attributes:
        factors: indices of the two; none: by an exponential.
    """

    temperature: float
    factors: tuple[int, int] | None


def powers_of(grid: Sequence[float]) -> list[Power]:
    """A way to all temperatures of a grid, from the highest, with few exponentials.

    A product costs a tenth of an exponential. 1/6 gives 1/3, 1/2, 2/3 and 1: one exponential.
    """
    plan: list[Power] = []
    for temperature in sorted(grid, reverse=True):
        pairs = [
            (i, j)
            for j in range(len(plan))
            for i in range(j + 1)
            if math.isclose(
                1 / plan[i].temperature + 1 / plan[j].temperature, 1 / temperature, rel_tol=1e-12
            )
        ]
        plan.append(Power(temperature, pairs[-1] if pairs else None))
    return plan


def power_sums(x: Tensor, lift: Tensor | None, plan: Sequence[Power], scratch: Tensor) -> Tensor:
    """`[n, g]`: the sums over a row of `exp((x - lift) / T)`, in the order of the plan.

    Args:
        x: `[n, m]`; lift: `[n, 1]`, or None for 0.
        scratch: `[g, n or more, m]`: memory used again is several times faster than new memory.
    """
    sums = x.new_empty((len(x), len(plan)))
    found = scratch[:, : len(x)].unbind(0)
    for i, power in enumerate(plan):
        if power.factors is not None:
            a, b = power.factors
            torch.mul(found[a], found[b], out=found[i])
        else:
            # The lift first, which is exact: a product would be rounded at the logits' own size.
            lifted = x if lift is None else torch.sub(x, lift, out=found[i])
            _exp(torch.mul(lifted, 1 / power.temperature, out=found[i]))
        torch.sum(found[i], dim=-1, out=sums[:, i])
    return sums


def _exp(x: Tensor) -> None:
    """In place; numpy's exponential takes half the time of torch's, and one thread."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        np.exp(x.numpy(), out=x.numpy())
    else:
        x.exp_()


def read(logits: Tensor, k: int, plan: Sequence[Power]) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` largest logits `[n, k]`, falling, their ids, and `[n, g]` power sums.

    The sums are of `exp((logits - largest) / T)`: each is at least 1.
    """
    n, vocab_size = logits.shape
    values = logits.new_empty((n, k))
    ids = logits.new_empty((n, k), dtype=torch.int64)
    sums = logits.new_empty((n, len(plan)))

    def work(rows: range, step: int) -> None:
        scratch = logits.new_empty((len(plan), min(step, len(rows)), vocab_size))
        for i in range(rows.start, rows.stop, step):
            part = slice(i, min(i + step, rows.stop))
            values[part], ids[part] = top(logits[part], k)
            sums[part] = power_sums(logits[part], values[part, :1], plan, scratch)

    if logits.device.type == "cpu":
        _in_threads(n, lambda rows: work(rows, max(1, _BLOCK // vocab_size)))
    else:
        work(range(n), max(1, _WIDE_BLOCK // vocab_size))
    return values, ids, sums


def _in_threads(n: int, work: Callable[[range], None]) -> None:
    """Share `n` rows among as many threads as torch would use, each with torch to itself.

    Small operations that torch itself divides among threads wait for the slowest at the end of
    each, which takes many times their own time as soon as another program wants a processor.
    """
    threads = min(torch.get_num_threads(), n)
    if threads < 2:
        work(range(n))
        return
    grad = torch.is_grad_enabled()

    def alone(rows: range) -> None:
        torch.set_num_threads(1)  # of this thread, and of threads that are yet to begin
        with torch.set_grad_enabled(grad):
            work(rows)

    shares = [range(n * i // threads, n * (i + 1) // threads) for i in range(threads)]
    whole = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(alone, shares))
    finally:
        torch.set_num_threads(whole)


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
