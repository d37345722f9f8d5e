"""The stage that asks the teacher: once for each row, into the cache.

The teacher sees every row alone. Rows are planned into batches before the first forward pass; a
planned batch is the unit of work and of commit, and a restart redoes whole planned batches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdframe import batching, durable
from kdframe.batching import TokenRows
from kdframe.errors import InputError
from kdframe.output_layer import Halves
from kdframe.parts import Codec, RowPositions
from kdframe.progress import Progress
from kdframe.teacher_cache import TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAN = "plan.json"


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

    Returns:
        `rows`, `tokens` and `seconds` of what was computed now.

    Raises:
        InputError: the disk is too small, or a logit is not a number (the row is named).
    """
    missing = {request.key: request for request in store.missing(sets)}
    done = {"rows": 0.0, "tokens": 0.0, "seconds": 0.0}
    if not missing:
        return done
    ids = _token_ids(sets, missing)
    needed = sum(len(r.positions) for r in missing.values()) * store.codec.record_bytes
    durable.require_space(store.cache.folder, int(needed * 1.1), "the teacher cache")
    plan = _plan(store.cache.folder, missing, ids, batch_tokens)
    total = sum(len(ids[key]) for batch in plan for key in batch)
    began = time.monotonic()
    model = teacher()
    halves = Halves(model)
    with progress.stage("cache", total, "tokens") as bar:
        for batch in plan:
            requests = [missing[key] for key in batch]
            rows = [ids[key] for key in batch]
            store.cache.write(requests, capture(halves, store.codec, rows, requests))
            tokens = sum(len(row) for row in rows)
            done["rows"] += len(rows)
            done["tokens"] += tokens
            bar.advance(tokens)
            on_commit()
    (store.cache.folder / PLAN).unlink(missing_ok=True)
    done["seconds"] = time.monotonic() - began
    return done


@torch.no_grad()
def capture(
    halves: Halves,
    codec: Codec,
    rows: Sequence[NDArray[np.int32]],
    requests: Sequence[RowPositions],
) -> list[NDArray[np.uint8]]:
    """One forward pass of the teacher: records `[n_i, B]` for each row's positions.

    The output layer runs on the asked positions alone, in chunks.
    """
    longest = max(len(row) for row in rows)
    padded = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
        mask[i, : len(row)] = 1
    device = halves.model.device
    hidden = halves.hidden(
        input_ids=torch.from_numpy(padded).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
    )
    flat = np.concatenate([i * longest + r.positions for i, r in enumerate(requests)])
    states = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(flat).to(device)]
    parts = []
    for start in range(0, len(flat), halves.chunk()):
        logits = halves.head(states[start : start + halves.chunk()])
        _require_numbers(logits, flat[start : start + halves.chunk()] // longest, requests)
        parts.append(codec.encode(logits))
    records = np.concatenate(parts)
    ends = np.cumsum([len(r.positions) for r in requests])[:-1]
    return np.split(records, ends)


def _require_numbers(
    logits: torch.Tensor, row: NDArray[np.int64], requests: Sequence[RowPositions]
) -> None:
    """Refuse NaN, +inf, and a position where every logit is -inf."""
    highest = logits.amax(dim=-1)  # NaN and +inf win every comparison
    bad = ~torch.isfinite(highest)
    if bool(bad.any()):
        first = int(torch.nonzero(bad)[0])
        raise InputError(
            f"row {requests[int(row[first])].key.hex()}: the teacher's logits are not numbers "
            f"(largest: {float(highest[first])}); nothing of the row is stored; "
            "check the teacher's weights, or use another `teacher.dtype`"
        )


def _token_ids(
    sets: Sequence[TokenRows], wanted: Mapping[bytes, Any]
) -> dict[bytes, NDArray[np.int32]]:
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
