"""The teacher's predictions, as training and evaluation read them: by row, from an open cache."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdframe.batching import TokenRows
from kdframe.cache_parts import (
    Cache,
    CacheConfig,
    CacheSpec,
    Codec,
    CodecConfig,
    RowPositions,
    TeacherShape,
)
from kdframe.errors import DamagedError
from kdframe.experiment import fingerprint
from kdframe.heads import TeacherOutputs
from kdframe.left_out import LeftOut
from kdframe.parts import Projection
from kdframe.targets import TeacherTargets, resized

FITTED = "codec"


@dataclass(frozen=True)
class TeacherCache:
    """An open cache with its codec: what training and evaluation read.

    Attributes:
        cache: the records; codec: how to read them.
        projection: from the teacher's vocabulary to the student's, where they differ.
        reads_hidden: whether the codec reads the teacher's hidden states.
        not_numbers: what to do with predictions that are no numbers; see `CacheConfig`.
    """

    cache: Cache
    codec: Codec
    projection: Projection | None = None
    reads_hidden: bool = False
    not_numbers: Literal["error", "drop_row", "mask_position"] = "error"

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
        wanted = self.wanted(sets)
        return [wanted[i] for i in self.cache.missing(wanted)]

    def wanted(self, sets: Iterable[TokenRows]) -> list[RowPositions]:
        """The taught rows, each once, with the positions that count in any of the sets."""
        requests: dict[bytes, RowPositions] = {}
        left_out = LeftOut(self.cache)
        for rows in map(left_out.without, sets):
            for i in np.flatnonzero(rows.taught):
                request = rows.request(int(i))
                known = requests.get(request.key)
                requests[request.key] = request if known is None else _union(known, request)
        return list(requests.values())


class FittedCodec:
    """A codec that is fitted to its teacher before the first record.

    Attributes:
        record_bytes: size of one record.
        reads_sample: whether `fit` looks at positions.
    """

    def __init__(self, config: CodecConfig, shape: TeacherShape, cache: Cache) -> None:
        self.record_bytes = config.record_bytes(shape)
        self.reads_sample = config.reads_sample
        self._config, self._shape, self._cache = config, shape, cache
        self._built: Codec | None = None

    @property
    def ready(self) -> bool:
        """Whether it was fitted, here or by another process."""
        return self._built is not None or FITTED in self._cache.kept_names()

    def fit(self, sample: TeacherOutputs) -> None:
        """Fit it, unless another process came first."""
        from safetensors.torch import save

        tensors = self._config.fit(sample)
        self._cache.keep(FITTED, save({k: t.cpu().contiguous() for k, t in tensors.items()}))

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """`n` positions to records `[n, B]`."""
        return self._codec().encode(outputs)

    def decode(self, records: NDArray[np.uint8]) -> TeacherTargets:
        """Records `[n, B]` to targets."""
        return self._codec().decode(records)

    def lost(self) -> DamagedError:
        """What it was fitted to is gone: with another fit old records would be read wrongly."""
        return DamagedError(
            f"{self._cache.place}: what codec {self._config.kind!r} was fitted to is missing; "
            "restore it from a copy, or remove the cache to compute it again"
        )

    def _codec(self) -> Codec:
        if self._built is None:
            from safetensors.torch import load

            data = self._cache.kept(FITTED)
            if data is None:
                raise self.lost()
            self._built = self._config.build(self._shape, load(data))
        return self._built


def cache_spec(
    settings: CacheConfig, identity: Mapping[str, str], shape: TeacherShape, default: Path
) -> CacheSpec:
    """What the cache of a teacher must hold; see `open_cache`."""
    codec = settings.codec
    whole = {**identity, "codec": json.dumps(codec.model_dump(mode="json"), sort_keys=True)}
    return CacheSpec(
        identity=whole,
        folder=default / fingerprint(whole)[:12],
        record_bytes=codec.record_bytes(shape),
        codec=codec.model_dump(mode="json"),
    )


def open_cache(
    settings: CacheConfig, identity: Mapping[str, str], shape: TeacherShape, default: Path
) -> TeacherCache:
    """Open the cache of a teacher, or begin it.

    Args:
        identity: what the teacher is, by name; the codec is added here.
        shape: the teacher's sizes.
        default: the folder that holds caches whose settings name none.

    Raises:
        InputError: the folder holds another teacher's cache.
    """
    codec = settings.codec
    cache = settings.open(cache_spec(settings, identity, shape, default))
    return TeacherCache(
        cache,
        FittedCodec(codec, shape, cache) if codec.fits else codec.build(shape),
        reads_hidden=codec.reads_hidden,
        not_numbers=settings.not_numbers,
    )


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
