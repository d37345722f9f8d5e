"""The teacher's predictions, as training and evaluation read them: by row, from an open cache."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdframe.batching import TokenRows
from kdframe.experiment import fingerprint
from kdframe.parts import Cache, CacheConfig, CacheSpec, Codec, Projection, RowPositions
from kdframe.targets import TeacherTargets, resized


@dataclass(frozen=True)
class TeacherCache:
    """An open cache with its codec: what training and evaluation read.

    Attributes:
        cache: the records; codec: how to read them.
        projection: from the teacher's vocabulary to the student's, where they differ.
    """

    cache: Cache
    codec: Codec
    projection: Projection | None = None

    def targets(self, requests: Sequence[RowPositions], vocab_size: int) -> TeacherTargets | None:
        """The predictions at all positions of the rows, in order, over the student's `vocab_size`.

        None for no rows.

        Raises:
            DamagedError: a row is absent or damaged.
        """
        if not requests:
            return None
        targets = self.codec.decode(self.cache.read(requests))
        if self.projection is not None:
            targets = self.projection(targets)
        return resized(targets, vocab_size)

    def missing(self, sets: Iterable[TokenRows]) -> list[RowPositions]:
        """The taught rows that the cache does not hold yet, each once."""
        requests: dict[bytes, RowPositions] = {}
        for rows in sets:
            for i in np.flatnonzero(rows.taught):
                request = rows.request(int(i))
                known = requests.get(request.key)
                requests[request.key] = request if known is None else _union(known, request)
        wanted = list(requests.values())
        return [wanted[i] for i in self.cache.missing(wanted)]


def open_cache(
    settings: CacheConfig, identity: Mapping[str, str], vocab_size: int, default: Path
) -> TeacherCache:
    """Open the cache of a teacher, or begin it.

    Args:
        identity: what the teacher is, by name; the codec is added here.
        vocab_size: the teacher's output rows.
        default: the folder that holds caches whose settings name none.

    Raises:
        InputError: the folder holds another teacher's cache.
    """
    codec = settings.codec
    whole = {**identity, "codec": json.dumps(codec.model_dump(mode="json"), sort_keys=True)}
    spec = CacheSpec(
        identity=whole,
        folder=default / fingerprint(whole)[:12],
        record_bytes=codec.record_bytes(vocab_size),
        codec=codec.model_dump(mode="json"),
    )
    return TeacherCache(settings.open(spec), codec.build(vocab_size))


def cache_identity(
    *, weights: str, tokenizer: str, template: str, settings: Mapping[str, Any]
) -> dict[str, str]:
    """The parts of a teacher's identity, by the names that a refusal prints.

    Args:
        weights: hash of the weights' content.
        tokenizer: hash of the id to bytes map.
        template: hash of the chat template.
        settings: dtype, quantisation and adapter.
    """
    return {
        "teacher weights": weights,
        "tokenizer": tokenizer,
        "chat template": template,
        **{f"teacher {name}": str(value) for name, value in settings.items()},
    }


def _union(one: RowPositions, other: RowPositions) -> RowPositions:
    return RowPositions(one.key, np.union1d(one.positions, other.positions).astype(np.int32))
