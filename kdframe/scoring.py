"""Run a model over held-out rows, and measure it at every counted position."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from kdframe import batching
from kdframe.batching import TokenRows
from kdframe.output_layer import Halves
from kdframe.parts import Measure
from kdframe.progress import Bar
from kdframe.targets import met
from kdframe.teacher_cache import TeacherCache


@torch.no_grad()
def score(
    halves: Halves,
    rows: TokenRows,
    measure: Measure,
    *,
    pad_id: int,
    batch_tokens: int,
    cache: TeacherCache | None = None,
    bar: Bar | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Sums of measured values over each row's counted positions.

    The model runs in evaluation mode on length-sorted batches; the output layer runs on counted
    positions alone, in chunks.

    Args:
        measure: from float32 logits `[n, V]`, labels `[n]` and targets to values `[n]` by name.
        cache: where the targets come from; without it the measure gets None.

    Returns:
        `[rows]` float64 for each name.
    """
    model = halves.model
    training = model.training
    model.eval()
    sums: dict[str, NDArray[np.float64]] = {}
    try:
        for batch in batching.planned(rows.lengths, np.arange(len(rows)), tokens=batch_tokens):
            for name, row, values in _one_batch(
                halves, rows, measure, batch, pad_id=pad_id, cache=cache
            ):
                total = sums.setdefault(name, np.zeros(len(rows), dtype=np.float64))
                total += np.bincount(row, weights=values, minlength=len(rows))
            if bar is not None:
                bar.advance(float(rows.lengths[batch].sum()))
    finally:
        model.train(training)
    return sums


def _one_batch(
    halves: Halves,
    rows: TokenRows,
    measure: Measure,
    batch: list[int],
    *,
    pad_id: int,
    cache: TeacherCache | None,
) -> list[tuple[str, NDArray[np.int64], NDArray[np.float64]]]:
    """`(name, row of each position, value at each position)` for every name and chunk."""
    one = batching.collate(rows, tuple((i,) for i in batch), pad_id=pad_id)
    device = halves.model.device
    hidden = halves.hidden(
        input_ids=torch.from_numpy(one.input_ids).to(device),
        attention_mask=torch.from_numpy(one.attention_mask).to(device),
    )
    states = hidden.flatten(0, 1)[torch.from_numpy(one.counted).to(device)]
    labels = torch.from_numpy(one.labels).to(device)
    row_of = np.asarray(one.rows, dtype=np.int64)[one.row_of]
    targets = None
    if cache is not None:
        targets = cache.targets([rows.request(i) for i in one.rows], halves.vocab_size)
    found = []
    for start in range(0, len(labels), halves.chunk()):
        part = slice(start, start + halves.chunk())
        some = None if targets is None else met(targets.select(part).to(device))
        values: Mapping[str, torch.Tensor] = measure(halves.head(states[part]), labels[part], some)
        found += [(n, row_of[part], v.double().cpu().numpy()) for n, v in values.items()]
    return found
