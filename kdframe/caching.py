"""The stage that asks the teacher: once for each row, into the cache.

The teacher sees every row alone. Rows are planned into batches before the first forward pass; a
planned batch is the unit of work and of commit, and a restart redoes whole planned batches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdframe import batching, durable, live_teacher
from kdframe.batching import TokenRows
from kdframe.cache_parts import Codec, RowPositions
from kdframe.errors import InputError
from kdframe.heads import TeacherOutputs
from kdframe.left_out import LeftOut
from kdframe.output_layer import Halves, OutputLayer
from kdframe.progress import Progress
from kdframe.teacher_cache import FittedCodec, TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAN = "plan.json"
FIT_POSITIONS = 4096
"""Positions that a codec is fitted on."""
FIT_OF_ROW = 256
"""At most so many of them from one row: what is near alike tells little."""


def fill(
    store: TeacherCache,
    sets: Sequence[TokenRows],
    teacher: Callable[[], PreTrainedModel],
    *,
    batch_tokens: int,
    progress: Progress,
    on_commit: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Have the teacher read every row that is missing; the teacher is loaded only if one is.

    A batch is written while the next one is computed.

    Returns:
        `rows`, `tokens` and `seconds` of what was computed now.

    Raises:
        InputError: the disk is too small, or a logit is not a number (the row is named).
        DamagedError: there are rows, but what their codec was fitted to is gone.
    """
    missing = {request.key: request for request in store.missing(sets)}
    done = {"rows": 0.0, "tokens": 0.0, "seconds": 0.0}
    if not missing:
        return done
    ids = token_ids(sets, missing)
    needed = sum(len(r.positions) for r in missing.values()) * store.codec.record_bytes
    store.cache.require_room(int(needed * 1.1), "the teacher cache")
    plan = _plan(store.cache.folder, missing, ids, batch_tokens)
    total = sum(len(ids[key]) for batch in plan for key in batch)
    began = time.monotonic()
    halves = Halves(teacher())
    _fit(store, halves, missing, ids)
    refused = Refusals(store)

    def finish(batch: list[bytes], written: Future[None]) -> None:
        written.result()
        tokens = sum(len(ids[key]) for key in batch)
        done["rows"] += len(batch)
        done["tokens"] += tokens
        bar.advance(tokens)
        on_commit()

    with progress.stage("cache", total, "tokens") as bar, ThreadPoolExecutor(1) as writer:
        under_way: tuple[list[bytes], Future[None]] | None = None
        for batch in plan:
            rows = [ids[key] for key in batch]
            found = capture(halves, store.codec, rows, [missing[k] for k in batch], refused)
            if under_way is not None:
                finish(*under_way)
            under_way = batch, writer.submit(store.cache.write, *found)
        if under_way is not None:
            finish(*under_way)
    (store.cache.folder / PLAN).unlink(missing_ok=True)
    refused.report(progress)
    done["seconds"] = time.monotonic() - began
    return done


class Refusals:
    """What is done with positions at which the teacher's outputs are no numbers."""

    def __init__(self, store: TeacherCache) -> None:
        self._store = store
        self._left_out = LeftOut(store.cache)
        self.found: dict[bytes, list[int]] = {}

    @property
    def reads_hidden(self) -> bool:
        """Whether numbers are looked for among the hidden states."""
        return self._store.reads_hidden

    def settle(
        self, requests: Sequence[RowPositions], bad: NDArray[np.int64], values: Sequence[float]
    ) -> list[RowPositions]:
        """The rows without the bad positions, by the setting.

        Args:
            bad: indices into the positions of all rows, ascending; values: what was found there.

        Raises:
            InputError: the setting is `error`.
        """
        ends = np.cumsum([len(r.positions) for r in requests])
        row_of = np.searchsorted(ends, bad, side="right")
        settled = list(requests)
        for i in np.unique(row_of).tolist():
            key, positions = requests[i].key, requests[i].positions
            which = bad[row_of == i] - (ends[i] - len(positions))
            if self._store.not_numbers == "error":
                raise InputError(
                    f"row {key.hex()}: the teacher's logits at position "
                    f"{int(positions[which[0]])} are not numbers (largest: {values[0]}); nothing "
                    "of the row is stored; check the teacher's weights, use another "
                    "`teacher.dtype`, or set cache.not_numbers to drop_row or mask_position"
                )
            self.found[key] = positions[which].tolist()
            whole = self._store.not_numbers == "drop_row"
            rest = positions[:0] if whole else np.delete(positions, which)
            self._left_out.add(key, None if whole else self.found[key])
            settled[i] = RowPositions(key, rest)
        return settled

    def report(self, progress: Progress) -> None:
        """Say what was left out."""
        for key, positions in self.found.items():
            what = "left out" if self._store.not_numbers == "drop_row" else "masked"
            progress.say(
                f"row {key.hex()}: the teacher's logits are not numbers at {len(positions)} "
                f"positions (first: {positions[0]}); {what}"
            )


@torch.no_grad()
def capture(
    halves: Halves,
    codec: Codec,
    rows: Sequence[NDArray[np.int32]],
    requests: Sequence[RowPositions],
    refused: Refusals,
) -> tuple[list[RowPositions], list[NDArray[np.uint8]]]:
    """One forward pass of the teacher: the rows, and records `[n_i, B]` for their positions.

    The output layer runs on the asked positions alone, in chunks. Positions at which the outputs
    are no numbers are gone from the rows, and so is a row of which nothing is left.
    """
    states = live_teacher.states(halves, rows, requests)
    records = np.zeros((len(states), codec.record_bytes), np.uint8)
    bad: list[NDArray[np.int64]] = []
    values: list[float] = []
    step = halves.chunk()
    for start in range(0, len(states), step):
        outputs = TeacherOutputs(states[start : start + step], halves.head)
        strange, found = _not_numbers(outputs, refused.reads_hidden)
        if not len(strange):
            records[start : start + step] = codec.encode(outputs)
            continue
        bad.append(start + strange)
        values += found
        good = np.delete(np.arange(len(outputs)), strange)
        if len(good):
            some = outputs.hidden[torch.from_numpy(good).to(states.device)]
            records[start + good] = codec.encode(TeacherOutputs(some, halves.head))
    if not bad:
        ends = np.cumsum([len(r.positions) for r in requests])[:-1]
        return list(requests), np.split(records, ends)
    return _kept(requests, refused.settle(requests, np.concatenate(bad), values), records)


def _kept(
    asked: Sequence[RowPositions], kept: Sequence[RowPositions], records: NDArray[np.uint8]
) -> tuple[list[RowPositions], list[NDArray[np.uint8]]]:
    """Rows with positions, and their part of the records of all that was asked."""
    ends = np.cumsum([len(r.positions) for r in asked])[:-1]
    pairs = [
        (row, some[np.isin(before.positions, row.positions)])
        for before, row, some in zip(asked, kept, np.split(records, ends), strict=True)
        if len(row.positions)
    ]
    return [row for row, _ in pairs], [some for _, some in pairs]


def _not_numbers(
    outputs: TeacherOutputs, reads_hidden: bool
) -> tuple[NDArray[np.int64], list[float]]:
    """Indices where there is NaN or +inf, or every logit is -inf; and the largest found there."""
    # NaN and +inf win every comparison.
    largest = outputs.hidden.abs().amax(-1) if reads_hidden else outputs.logits.amax(dim=-1)
    strange: NDArray[np.int64] = torch.nonzero(~torch.isfinite(largest))[:, 0].cpu().numpy()
    return strange, [float(largest[i]) for i in strange.tolist()]


@torch.no_grad()
def _fit(
    store: TeacherCache,
    halves: Halves,
    missing: Mapping[bytes, RowPositions],
    ids: Mapping[bytes, NDArray[np.int32]],
) -> None:
    """Fit a codec that asks for it, on rows drawn from all that the teacher is to read."""
    if store.reads_hidden and halves.whole:
        raise InputError(
            "cache.codec: this teacher's backbone and output layer do not add up to its logits, "
            "so its hidden states cannot stand for them; use the codec 'topk'"
        )
    codec = store.codec
    if not isinstance(codec, FittedCodec):
        return
    rows = store.cache.info()["rows"]  # first: whoever wrote one has kept the fit before
    if codec.ready:
        return
    if rows:
        raise codec.lost()
    enough = FIT_POSITIONS if codec.reads_sample else 1
    states: list[torch.Tensor] = []
    for key in sorted(missing):  # a hash: any order of the data draws the same rows
        if sum(map(len, states)) >= enough:
            break
        positions = missing[key].positions
        few = positions[:: max(1, -(-len(positions) // FIT_OF_ROW))]
        some = live_teacher.states(halves, [ids[key]], [RowPositions(key, few)])
        states.append(some[torch.isfinite(some).all(-1)])
    head = halves.head if halves.whole else OutputLayer(halves.model).plain()
    codec.fit(TeacherOutputs(torch.cat(states)[:enough], head))


def token_ids(
    sets: Sequence[TokenRows], wanted: Mapping[bytes, Any]
) -> dict[bytes, NDArray[np.int32]]:
    """The token ids of the wanted rows, by key."""
    found: dict[bytes, NDArray[np.int32]] = {}
    for rows in sets:
        for i in range(len(rows)):
            if (key := rows.key(i)) in wanted and key not in found:
                found[key] = rows.row(i)
    return found


def _plan(
    folder: Path,
    missing: Mapping[bytes, RowPositions],
    ids: Mapping[bytes, NDArray[np.int32]],
    batch_tokens: int,
) -> list[list[bytes]]:
    """The batches to compute, from an earlier plan as far as it holds; written before work.

    Every batch of an earlier plan whose rows are all at hand is kept as it was, so that a run
    that was killed computes the same batches as one that was not.
    """
    path = folder / PLAN
    kept: list[list[bytes]] = []
    kept_keys: set[bytes] = set()
    for batch in _old_plan(path, batch_tokens):
        if batch and missing.keys() >= set(batch) and kept_keys.isdisjoint(batch):
            kept.append(batch)
            kept_keys.update(batch)
    rest = sorted(missing.keys() - kept_keys, key=lambda key: (-len(ids[key]), key))
    lengths = np.array([len(ids[key]) for key in rest], dtype=np.int64)
    fresh = batching.planned(lengths, np.arange(len(rest)), tokens=batch_tokens)
    plan = kept + [[rest[i] for i in batch] for batch in fresh]
    batches = [[key.hex() for key in batch] for batch in plan]
    durable.write_json(path, {"batch_tokens": batch_tokens, "batches": batches})
    return plan


def _old_plan(path: Path, batch_tokens: int) -> list[list[bytes]]:
    """Another size of a forward pass makes another plan: the old one may not fit the memory."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        batches = plan["batches"] if plan["batch_tokens"] == batch_tokens else []
        return [[bytes.fromhex(key) for key in batch] for batch in batches]
    except (OSError, ValueError, TypeError, KeyError):
        return []
