"""What is done with an experiment's teacher cache: fill, show, check, import, merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdframe import caching, importing, merging, verifying
from kdframe.batching import TokenRows
from kdframe.cache_parts import BadRow
from kdframe.errors import InputError, Interrupted
from kdframe.experiment import Experiment
from kdframe.logprob_files import Vocabulary
from kdframe.materials import Materials
from kdframe.where import Where

VERIFIED_ROWS = 32
"""Rows that `verify` has the teacher read again, unless told."""


@dataclass(frozen=True)
class Verified:
    """What a check of a cache found.

    Attributes:
        rows: how many rows the cache has; every one's checksum was checked.
        bad: the damaged rows, and those of which the teacher says something else.
        recomputed: the comparison with the teacher; of no rows where it was not asked.
    """

    rows: int
    bad: list[BadRow]
    recomputed: verifying.Comparison


def fill_cache(experiment: Experiment, where: Where) -> tuple[dict[str, float], dict[str, Any]]:
    """Fill the cache outside a run: what was computed, and what it holds."""
    materials = _materials(experiment, where)
    did = fill(materials, where)
    return did, info(materials)


def cache_info(experiment: Experiment, where: Where) -> dict[str, Any]:
    """What the experiment's cache holds."""
    return info(_materials(experiment, where))


def verify_cache(
    experiment: Experiment, where: Where, *, repair: bool = False, rows: int | None = None
) -> Verified:
    """Check every row's checksum, and have the teacher read some rows again.

    Args:
        repair: compute the bad rows again.
        rows: how many rows the teacher reads, drawn at random; by default 32, and none of an
            imported cache (its teacher may not be here).
    """
    materials = _materials(experiment, where)
    store = materials.store
    count, bad = store.cache.verify()
    if rows is None:
        rows = VERIFIED_ROWS if experiment.cache.imported is None else 0
    found = verifying.recompute(
        store,
        _sets(materials),
        lambda: materials.teacher,
        rows=rows,
        batch_tokens=experiment.evaluation.batch_tokens,
        progress=where.progress,
        skip={one.row for one in bad},
    )
    bad += found.bad
    if bad and repair:
        store.cache.drop(bad)
        fill(materials, where)
    return Verified(count, bad, found)


def missing_rows(experiment: Experiment, where: Where) -> list[dict[str, Any]]:
    """The rows that the teacher has still to read: key, token ids, and positions that count."""
    materials = _materials(experiment, where)
    missing = {request.key: request for request in materials.store.missing(_sets(materials))}
    ids = caching.token_ids(_sets(materials), missing)
    return [
        {
            "row": key.hex(),
            "input_ids": ids[key].tolist(),
            "positions": request.positions.tolist(),
        }
        for key, request in missing.items()
    ]


def import_files(
    experiment: Experiment, where: Where, files: Sequence[Path], *, keep_all: bool = False
) -> importing.Imported:
    """Write log-probabilities that were computed elsewhere into the experiment's cache.

    Args:
        files: see `logprob_files`.
        keep_all: keep rows and positions that the data does not count, too.

    Raises:
        InputError: the settings do not allow it, or something does not add up; nothing is written.
    """
    if experiment.cache.imported is None:
        raise InputError(
            "cache.imported: name the teacher that the log-probabilities come from, such as "
            "cache.imported=my-model-on-vllm; they are kept apart from what the weights of "
            "`teacher` compute here"
        )
    materials = _materials(experiment, where)
    return importing.import_files(
        materials.store,
        files,
        _sets(materials),
        Vocabulary(materials.tokenizer, materials.teacher_shape.vocab_size),
        keep_all=keep_all,
        progress=where.progress,
    )


def merge_caches(
    experiment: Experiment, where: Where, folders: Sequence[Path]
) -> list[merging.Merged]:
    """Copy the rows of other caches of the same identity into the experiment's cache.

    Raises:
        InputError: a folder is no cache, or holds another identity; nothing is copied.
    """
    materials = _materials(experiment, where)
    return merging.merge(
        materials.store.cache, experiment.cache, materials.spec, folders, where.progress
    )


def fill(materials: Materials, where: Where) -> dict[str, float]:
    """Have the teacher read every row that the cache does not hold.

    Raises:
        InputError: the cache is an imported one and does not hold every row.
        Interrupted: asked to stop; what was computed is kept.
    """

    def leave_if_asked() -> None:
        if where.stop():
            raise Interrupted("stopped while the teacher reads; run it again to go on")

    if materials.experiment.cache.imported is not None:
        _refuse_missing(materials)
    did = caching.fill(
        materials.store,
        _sets(materials),
        lambda: materials.teacher,
        batch_tokens=materials.experiment.evaluation.batch_tokens,
        progress=materials.progress,
        on_commit=leave_if_asked,
    )
    materials.leave_out()
    return did


def info(materials: Materials) -> dict[str, Any]:
    """What a cache holds, and where."""
    cache = materials.store.cache
    return {"folder": cache.place, **cache.info()}


def _refuse_missing(materials: Materials) -> None:
    missing = {request.key for request in materials.store.missing(_sets(materials))}
    if not missing:
        return
    named = {"train": materials.dataset.train, **materials.held_out}
    counts = {name: _rows_of(rows, missing) for name, rows in named.items()}
    each = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    raise InputError(
        f"{materials.store.cache.place}: the imported predictions lack {len(missing):,} rows "
        f"({each}); `kdframe cache missing` writes them for the teacher's server, "
        "`kdframe cache import` takes its answers"
    )


def _rows_of(rows: TokenRows, keys: set[bytes]) -> int:
    return len({rows.key(i) for i in np.flatnonzero(rows.taught).tolist()} & keys)


def _sets(materials: Materials) -> list[TokenRows]:
    return [materials.dataset.train, *materials.held_out.values()]


def _materials(experiment: Experiment, where: Where) -> Materials:
    return Materials(experiment, where.caches, where.progress)
