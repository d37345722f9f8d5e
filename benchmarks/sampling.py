"""The variance of drawn targets at equal bytes: `python benchmarks/sampling.py --help`.

The gradient's error is `p̂ - p` (`kdframe.fidelity`); an unbiased p̂ has nothing but variance. Its
sum over the vocabulary is computed where a formula tells it (p, T as in the loss, m entries):

- Random Sampling KD (Anshumann et al., arXiv 2503.16870: n draws with replacement,
  each distinct id a weight of its count / n): (1 - Σp²) / n, and Σ 1 - (1-p)^n distinct ids, of
  24 bits each as in the paper.
- the least that any unbiased m entries allow: those above θ kept exactly, the others drawn with
  p / θ: Σ pθ - p² over the others. Its ids and weights cost nothing here: it is a bound, not a
  codec.

The codec itself is measured by its draws. Intervals: 95 %, bootstrap over rows of 512 tokens.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import stand_ins
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdframe.api import Codec, TeacherOutputs, TeacherShape
from kdframe_codecs import Sampled

CHUNK = 64
PAPER_BITS = 24


@dataclass
class Sums:
    """Of one row of text: squared errors of each way, and what they are compared with."""

    true: float = 0.0
    random: float = 0.0
    codec: float = 0.0
    together: float = 0.0  # squared error of the codec's sum over the row
    bound: float = 0.0
    distinct: float = 0.0
    entries: float = 0.0
    tokens: float = 0.0


def least(p: Tensor, m: int) -> Tensor:
    """`[n]`: the least variance of `m` entries without bias."""
    top = p.topk(m, dim=-1).values.double()
    kept = torch.nn.functional.pad(top.cumsum(-1), (1, 0))[:, :m]
    theta = (1 - kept).clamp(min=0) / (m - torch.arange(m))
    c = (top <= theta).int().argmax(-1, keepdim=True)
    squares = p.double().square().sum(-1) - _first(top.square(), c)
    return ((1 - kept) * theta).gather(-1, c)[:, 0] - squares


def _first(values: Tensor, count: Tensor) -> Tensor:
    return values.masked_fill(torch.arange(values.shape[1]) >= count, 0).sum(-1)


def distinct(p: Tensor, n: int) -> Tensor:
    """`[n]`: distinct ids expected of n draws with replacement."""
    return -torch.expm1(n * torch.log1p(-p.double().clamp(max=1 - 1e-12))).sum(-1)


def draws_of(stands: stand_ins.StandIns, temperature: float, record_bytes: int) -> int:
    """How many draws with replacement take at least so many bytes a token."""
    sample = slice(0, len(stands), max(1, len(stands) // 600))
    p = torch.softmax(stands.head(stands.hidden[sample]) / temperature, dim=-1)

    def size(n: int) -> float:
        return float(distinct(p, n).mean()) * PAPER_BITS / 8

    return bisect.bisect_left(range(1, 10_000), record_bytes, key=size) + 1


@torch.no_grad()
def measured(
    stands: stand_ins.StandIns, config: Sampled, n: int, m: int
) -> tuple[list[Sums], float, float]:
    """Sums of each row, and the codec's CPU seconds a token for encoding and decoding."""
    codec = config.build(TeacherShape(stands.head.vocab_size))
    rows, kept, encoding = [], [], 0.0
    for i in range(0, len(stands), CHUNK):
        if i % stand_ins.ROW == 0:
            rows.append(Sums())
            together = torch.zeros(stands.head.vocab_size)
        teacher, student = stands.logits(slice(i, i + CHUNK))
        p = torch.softmax(teacher / config.temperature, dim=-1)
        q = torch.softmax(student / config.temperature, dim=-1)
        at = time.process_time()
        records = codec.encode(TeacherOutputs.of(teacher))
        encoding += time.process_time() - at
        kept.append(records)
        targets = codec.decode(records)
        weights = targets.at(config.temperature)
        error = p.scatter_add(-1, targets.ids, -weights)
        rows[-1].true += float((q - p).square().sum(dtype=torch.float64))
        rows[-1].codec += float(error.square().sum(dtype=torch.float64))
        together += error.sum(0)
        rows[-1].together = float(together.square().sum(dtype=torch.float64))
        rows[-1].random += float((1 - p.double().square().sum(-1)).sum()) / n
        rows[-1].bound += float(least(p, m).sum())
        rows[-1].distinct += float(distinct(p, n).sum())
        rows[-1].entries += float((weights > 0).sum())
        rows[-1].tokens += len(p)
    return rows, encoding / len(stands), decoding_time(codec, np.concatenate(kept))


def decoding_time(codec: Codec, records: NDArray[np.uint8]) -> float:
    """CPU seconds a token, a row of 512 at a time: the median of the rows' best of five."""
    best = []
    for i in range(0, len(records) - stand_ins.ROW + 1, stand_ins.ROW):
        row, times = records[i : i + stand_ins.ROW], []
        for _ in range(5):
            at = time.process_time_ns()
            codec.decode(row)
            times.append((time.process_time_ns() - at) / 1e9)
        best.append(min(times))
    return float(np.median(best)) / stand_ins.ROW


def ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> str:
    """The ratio of two sums over rows, with its interval."""
    chosen = np.random.default_rng(0).integers(len(above), size=(10_000, len(above)))
    drawn = above[chosen].sum(-1) / below[chosen].sum(-1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{above.sum() / below.sum():.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="a folder")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help=".jsonl with `text`")
    parser.add_argument("--rows", type=int, default=18, help="rows of 512 tokens")
    parser.add_argument("--memory", type=Path, default=Path("/tmp/kdframe-stand-ins"))
    parser.add_argument("--entries", type=int, default=Sampled().entries)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    stands = stand_ins.load(given.teacher, given.texts, given.rows, given.memory)
    shape = TeacherShape(stands.head.vocab_size)
    for temperature in given.temperatures:
        config = Sampled(entries=given.entries, temperature=temperature)
        size = config.record_bytes(shape)
        n = draws_of(stands, temperature, size)
        m = size * 8 // 16
        rows, encoding, decoding = measured(stands, config, n, m)
        sums = {
            f.name: np.array([getattr(row, f.name) for row in rows])
            for f in dataclasses.fields(Sums)
        }
        tokens = sums["tokens"].sum()
        bytes_of_random = sums["distinct"].sum() / tokens * PAPER_BITS / 8
        print(f"T = {temperature:g}, {size} bytes, {sums['entries'].sum() / tokens:.1f} entries")
        for name in ("random", "codec", "bound"):
            print(f"  gradient error, {name}: {(sums[name].sum() / sums['true'].sum()) ** 0.5:.3f}")
        print(f"  random: {n} draws, {bytes_of_random:.1f} bytes; bound: {m} entries")
        print(f"  variance, codec / random: {ratio(sums['codec'], sums['random'])}")
        print(f"  variance, codec / bound: {ratio(sums['codec'], sums['bound'])}")
        print(f"  positions together / apart: {ratio(sums['together'], sums['codec'])}")
        print(f"  encode {encoding * 1e6:.0f} us, decode {decoding * 1e6:.2f} us a token (CPU)")


if __name__ == "__main__":
    main()
