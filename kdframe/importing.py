"""Log-probabilities that were computed elsewhere, into a cache: all are checked, then written.

From the top-k of a distribution at T = 1 nothing follows about its tail at another temperature, so
the codec must ask for none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdframe import batching, logprob_files
from kdframe.batching import TokenRows
from kdframe.cache_parts import RowPositions, TruncatedCodec
from kdframe.errors import InputError
from kdframe.logprob_files import PredictedRow, Vocabulary
from kdframe.progress import Progress
from kdframe.targets import TruncatedTargets
from kdframe.teacher_cache import TeacherCache

PIECE_BYTES = 32 * 2**20
"""Records that are held at once."""

_SLACK = 1e-3  # by which rounding may push a sum of probabilities beyond 1
_ROUNDING = 1e-6  # above which no rounding lifts the logarithm of a probability
_NAMED = 20


@dataclass(frozen=True)
class Imported:
    """What became of the files' rows.

    Attributes:
        rows, positions: what is new in the cache.
        already: rows that the cache held.
        strangers: rows that the data does not have.
        missing: rows of the data that the cache still lacks.
    """

    rows: int
    positions: int
    already: int
    strangers: int
    missing: int


def import_files(
    store: TeacherCache,
    files: Sequence[Path],
    sets: Sequence[TokenRows],
    vocabulary: Vocabulary,
    *,
    keep_all: bool,
    progress: Progress,
) -> Imported:
    """Check every row of the files, then write those that the data has and the cache lacks.

    Of a row the positions that the data counts are written.

    Args:
        keep_all: write rows and positions that the data does not have, too.

    Raises:
        InputError: the codec cannot keep it, or rows do not add up (the first 20 are named);
            nothing is written.
    """
    codec = store.codec
    if not isinstance(codec, TruncatedCodec):
        raise InputError(
            "cache.codec: cannot be made of top-k log-probabilities; use "
            "{kind: topk, temperatures: [1]}"
        )
    codec.encode_truncated(_targets(np.zeros((0, 1), np.int64), np.zeros((0, 1))))
    wanted = {request.key: request for request in store.wanted(sets)}
    job = _Job(store, codec, files, wanted, vocabulary, keep_all)
    strangers = job.check(progress)
    rows, positions, already = job.write(progress)
    return Imported(rows, positions, already, strangers, len(store.missing(sets)))


@dataclass(frozen=True)
class _Job:
    store: TeacherCache
    codec: TruncatedCodec
    files: Sequence[Path]
    wanted: dict[bytes, RowPositions]
    vocabulary: Vocabulary
    keep_all: bool

    def check(self, progress: Progress) -> int:
        """Read everything; how many rows the data does not have."""
        faults: list[str] = []
        more = strangers = positions = rows = 0
        with progress.stage("check", len(self.files), "files") as bar:
            for path in self.files:
                for place, row in logprob_files.read(path, self.vocabulary):
                    rows += 1
                    try:
                        request, known = self._request(row)
                    except ValueError as fault:
                        more += len(faults) >= _NAMED
                        faults += [f"{place}: {fault}"] * (len(faults) < _NAMED)
                    else:
                        strangers += not known
                        positions += 0 if request is None else len(request.positions)
                bar.advance(1)
        if faults:
            raise InputError(*faults, *[f"... and {more:,} more rows that do not add up"][:more])
        if strangers == rows and not self.keep_all:
            raise InputError(
                f"{', '.join(map(str, self.files))}: none of the {rows:,} rows is a row of the "
                "experiment's data (the token ids must be the same, special tokens included); "
                "`kdframe cache missing` writes the rows whose predictions are wanted"
            )
        needed = int(1.1 * positions * self.codec.record_bytes)
        self.store.cache.require_room(needed, "the imported predictions")
        return strangers

    def write(self, progress: Progress) -> tuple[int, int, int]:
        """Write what the cache lacks: new rows, their positions, and rows that were there."""
        cache = self.store.cache
        rows = positions = already = 0
        with progress.stage("import", len(self.files), "files") as bar:
            for path in self.files:
                for piece in self._pieces(path):
                    chosen = cache.missing([request for request, _ in piece])
                    fresh = {piece[i][0].key: piece[i] for i in reversed(chosen)}
                    requests = [request for request, _ in fresh.values()]
                    cache.write(requests, [self._encoded(*pair) for pair in fresh.values()])
                    rows += len(requests)
                    positions += sum(len(request.positions) for request in requests)
                    already += len(piece) - len(requests)
                bar.advance(1)
        return rows, positions, already

    def _pieces(self, path: Path) -> Iterator[list[tuple[RowPositions, PredictedRow]]]:
        """What is to be written of a file, as much at once as `PIECE_BYTES` hold."""
        piece: list[tuple[RowPositions, PredictedRow]] = []
        size = 0
        for place, row in logprob_files.read(path, self.vocabulary):
            try:
                request, _ = self._request(row)
            except ValueError as fault:  # the file was changed meanwhile
                raise InputError(f"{place}: {fault}") from fault
            if request is None or isinstance(row, ValueError):
                continue
            piece.append((request, row))
            size += row.log_probs.nbytes + row.top_ids.nbytes
            if size >= PIECE_BYTES:
                yield piece
                piece, size = [], 0
        if piece:
            yield piece

    def _request(self, row: PredictedRow | ValueError) -> tuple[RowPositions | None, bool]:
        """What is stored of a row (None: nothing), and whether it is a row of the data.

        Raises:
            ValueError: it does not add up.
        """
        if isinstance(row, ValueError):
            raise row
        _check(row, self.vocabulary.size)
        key = batching.row_key(row.ids.astype(np.int32))
        wanted = self.wanted.get(key)
        if wanted is not None:
            absent = np.setdiff1d(wanted.positions, row.positions)
            if len(absent):
                raise ValueError(
                    f"lacks predictions at {len(absent):,} of the {len(wanted.positions):,} "
                    f"positions that the data counts (the first is {absent[0]}); ask the server "
                    "for the whole row"
                )
        if self.keep_all:
            return RowPositions(key, row.positions.astype(np.int32)), wanted is not None
        return wanted, wanted is not None

    def _encoded(self, request: RowPositions, row: PredictedRow) -> NDArray[np.uint8]:
        chosen = np.searchsorted(row.positions, request.positions)
        return self.codec.encode_truncated(_targets(row.top_ids[chosen], row.log_probs[chosen]))


def _targets(ids: NDArray[np.int64], log_probs: NDArray[np.float64]) -> TruncatedTargets:
    """`[n, m]` each, as targets at T = 1; what rounding put above 1 is taken off."""
    found = torch.from_numpy(log_probs)
    excess = torch.logsumexp(found, dim=-1, keepdim=True).clamp(min=0)
    return TruncatedTargets(
        torch.from_numpy(ids), (found - excess).float(), (1.0,), torch.zeros(len(ids), 1)
    )


def _check(row: PredictedRow, vocab_size: int) -> None:
    """Whether a row's numbers can be what they say.

    Raises:
        ValueError: names the position, and the remedy.
    """
    _check_ids(row, vocab_size)
    known = row.log_probs > -np.inf

    def refuse(at: NDArray[np.bool_], fault: str) -> None:
        which = np.flatnonzero(at.reshape(len(known), -1).any(-1))
        if len(which):
            raise ValueError(f"position {row.positions[which[0]]}: {fault}")

    refuse(
        ~np.isfinite(row.log_probs) & ~np.isneginf(row.log_probs),
        "a log-probability is no number; ask the server again",
    )
    refuse(
        row.log_probs > _ROUNDING,
        "a log-probability is above 0; give natural logarithms of probabilities, not logits",
    )
    refuse(known.sum(-1) == 0, "no id has a probability; ask the server again")
    total = np.exp(row.log_probs).sum(-1)
    refuse(
        total > 1 + _SLACK,
        f"the probabilities sum to {total.max(initial=0):.4f}; give them at T = 1, each id once",
    )
    outside = known & ((row.top_ids < 0) | (row.top_ids >= vocab_size))
    refuse(
        outside,
        f"an id is outside the teacher's vocabulary of {vocab_size}; name the model that was "
        "served as `teacher`",
    )
    # Ids that are not known are made different from all.
    ids = np.sort(np.where(known, row.top_ids, -1 - np.arange(row.top_ids.shape[1])), axis=-1)
    refuse(np.diff(ids, axis=-1) == 0, "an id is there twice; give each id once")
    if row.follows:
        after = row.ids[row.positions + 1]
        refuse(
            (row.top_ids == after[:, None]).sum(-1) == 0,
            "the token that comes next is not among its log-probabilities, as a server has it; "
            "the ids and the log-probabilities are of different rows",
        )


def _check_ids(row: PredictedRow, vocab_size: int) -> None:
    bad = row.ids[(row.ids < 0) | (row.ids >= vocab_size)]
    if len(bad):
        raise ValueError(
            f"token id {bad[0]} is outside the teacher's vocabulary of {vocab_size}; name the "
            "model that was served as `teacher`"
        )
    if len(row.ids) < 2 or not len(row.positions):
        raise ValueError("has no position to predict; leave rows of one token out")
    steps = np.diff(row.positions) > 0
    if not steps.all() or row.positions[0] < 0 or row.positions[-1] > len(row.ids) - 2:
        raise ValueError(
            f"positions must ascend from 0 or more to at most {len(row.ids) - 2}; mend them"
        )
