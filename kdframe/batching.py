"""Rows of tokens, their order in an epoch, and how they are padded and packed into batches.

Everything is a pure function of the rows' keys, the seed and the epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdframe.cache_parts import RowPositions

Batch = tuple[tuple[int, ...], ...]
"""Sequences of row indices: one row each, or several that are packed."""

_WINDOW = 50  # batches among which rows of like length are brought together


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids in flat arrays. Position t of a row predicts its token t + 1.

    Attributes:
        ids: `[tokens]` int32.
        offsets: `[rows + 1]` int64; row i is `ids[offsets[i]:offsets[i + 1]]`.
        counted: `[tokens]`; whether the label of a position counts; never at a row's last token.
        taught: `[rows]`; whether the teacher reads the row.
        weights: `[rows]` float64; how often it is used in an epoch.
        text_bytes: `[rows]` int64; bytes of text that the counted labels spell (specials: none).
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    counted: NDArray[np.bool_]
    taught: NDArray[np.bool_]
    weights: NDArray[np.float64]
    text_bytes: NDArray[np.int64]

    @classmethod
    def join(
        cls,
        ids: Sequence[ArrayLike],
        counted: Sequence[ArrayLike],
        *,
        taught: ArrayLike,
        weights: ArrayLike,
        text_bytes: ArrayLike,
    ) -> TokenRows:
        """Rows from the ids and the counted positions of each."""
        return cls(
            np.concatenate([np.zeros(0, np.int32), *ids], dtype=np.int32),
            _offsets([np.size(row) for row in ids]),
            np.concatenate([np.zeros(0, np.bool_), *counted], dtype=np.bool_),
            np.asarray(taught, np.bool_),
            np.asarray(weights, np.float64),
            np.asarray(text_bytes, np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, `[rows]` int64."""
        return np.diff(self.offsets)

    @property
    def counted_tokens(self) -> int:
        """How many positions count."""
        return int(self.counted.sum())

    def row(self, i: int) -> NDArray[np.int32]:
        """Token ids of a row (a view)."""
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    def positions(self, i: int) -> NDArray[np.int32]:
        """Positions of a row whose label counts, ascending int32."""
        counted = self.counted[self.offsets[i] : self.offsets[i + 1]]
        return np.flatnonzero(counted).astype(np.int32)

    def key(self, i: int) -> bytes:
        """16 bytes: the hash of the row's ids (int32, little-endian), and of nothing else."""
        return row_key(self.row(i))

    def request(self, i: int) -> RowPositions:
        """The row as a cache is asked for it."""
        return RowPositions(self.key(i), self.positions(i))

    def select(self, index: ArrayLike) -> TokenRows:
        """The rows of `index` (integers, in any order, also repeated) as rows of their own."""
        rows = np.asarray(index, np.int64)
        lengths = self.lengths[rows]
        offsets = _offsets(lengths)
        flat = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenRows(
            self.ids[flat],
            offsets,
            self.counted[flat],
            self.taught[rows],
            self.weights[rows],
            self.text_bytes[rows],
        )


@dataclass(frozen=True)
class Collated:
    """A batch of B sequences, padded on the right to T tokens, and its n counted positions.

    Attributes:
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]` int64; 0 at padding.
        position_ids: `[B, T]` int64; from 0 in each row of a sequence.
        segment_ids: `[B, T]` int32; number of the row within its sequence, -1 at padding.
        counted: `[n]` int64; indices into B * T, row after row in the order of `rows`.
        labels: `[n]` int64; the token after each counted position.
        row_of: `[n]` int64; index into `rows`.
        rows: row indices, sequence after sequence.
        taught: `[n]`; whether the teacher read the row.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    segment_ids: NDArray[np.int32]
    counted: NDArray[np.int64]
    labels: NDArray[np.int64]
    row_of: NDArray[np.int64]
    rows: tuple[int, ...]
    taught: NDArray[np.bool_]


def row_key(ids: NDArray[np.int32]) -> bytes:
    """The key of a row of these token ids, 16 bytes."""
    return _hash(ids.astype("<i4").tobytes())


def epoch_rows(rows: TokenRows, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Row indices of an epoch (from 0), whatever the order in which the rows were read.

    A row of weight w is there floor(w) times or once more, and over the epochs w times on average:
    a weight of 0.25 uses each row in one of four epochs.
    """
    drawn: list[tuple[bytes, int]] = []
    for i, weight in enumerate(rows.weights.tolist()):
        key = rows.key(i)
        # 32 bits: the sums below are exact, so a whole weight is met in every epoch.
        phase = int.from_bytes(_hash(key, seed)[:4], "little") / 2**32
        copies = int(phase + (epoch + 1) * weight) - int(phase + epoch * weight)
        drawn += [(_hash(key, seed, epoch, copy), i) for copy in range(copies)]
    return np.array([i for _, i in sorted(drawn)], np.int64)


def batches(
    rows: TokenRows, order: NDArray[np.int64], *, batch_size: int, seed: int, epoch: int
) -> list[Batch]:
    """Batches of rows of like length: every entry of `order` once, the last batch may be smaller.

    Rows are sorted by length within windows of 50 batches; then the batches are shuffled.
    """
    made: list[Batch] = []
    for window in _windows(rows, order, batch_size):
        made += [
            tuple((i,) for i in window[start : start + batch_size])
            for start in range(0, len(window), batch_size)
        ]
    last = [made.pop()] if made and len(made[-1]) < batch_size else []
    keyed = [(_hash(_keys(rows, batch), seed, epoch), n) for n, batch in enumerate(made)]
    return [made[n] for _, n in sorted(keyed)] + last


def packed(
    rows: TokenRows,
    order: NDArray[np.int64],
    *,
    max_length: int,
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[Batch]:
    """Batches of `batch_size` sequences of at most `max_length` tokens, several rows in each.

    Rows are packed first-fit-decreasing within windows of 50 * `batch_size` rows; then the
    sequences are shuffled. A row that is longer goes alone.
    """
    made: list[tuple[int, ...]] = []
    for window in _windows(rows, order, batch_size):
        made += _first_fit(window, rows.lengths, max_length)
    keyed = [(_hash(_keys(rows, (sequence,)), seed, epoch), n) for n, sequence in enumerate(made)]
    shuffled = [made[n] for _, n in sorted(keyed)]
    return [
        tuple(shuffled[start : start + batch_size]) for start in range(0, len(shuffled), batch_size)
    ]


def planned(lengths: ArrayLike, index: ArrayLike, *, tokens: int) -> list[list[int]]:
    """Groups of rows for forward passes whose padded size (longest x rows) is at most `tokens`.

    Args:
        lengths: `[rows]` tokens of every row.
        index: the rows to plan; they come longest first.
        tokens: size of a pass; a row that is longer goes alone.
    """
    sizes, chosen = np.asarray(lengths, np.int64), np.asarray(index, np.int64)
    groups: list[list[int]] = []
    longest = 0
    for i in chosen[np.argsort(-sizes[chosen], kind="stable")].tolist():
        if groups and longest * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
            longest = int(sizes[i])
    return groups


def collate(rows: TokenRows, batch: Batch, *, pad_id: int) -> Collated:
    """Pad a batch. Counted positions line up with the cache's records of the rows' requests."""
    lengths = rows.lengths
    width = max(int(lengths[list(sequence)].sum()) for sequence in batch)
    shape = (len(batch), width)
    ids, positions = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int32)
    counted, labels, indices = [], [], [i for sequence in batch for i in sequence]
    for b, sequence in enumerate(batch):
        at = 0
        for number, i in enumerate(sequence):
            row, here = rows.row(i), rows.positions(i).astype(np.int64)
            place = slice(at, at + len(row))
            ids[b, place], positions[b, place] = row, np.arange(len(row))
            segments[b, place] = number
            counted.append(b * width + at + here)
            labels.append(row[here + 1])
            at += len(row)
    row_of = np.repeat(np.arange(len(indices)), [len(here) for here in counted])
    return Collated(
        input_ids=ids,
        attention_mask=(segments >= 0).astype(np.int64),
        position_ids=positions,
        segment_ids=segments,
        counted=np.concatenate(counted),
        labels=np.concatenate(labels).astype(np.int64),
        row_of=row_of,
        rows=tuple(indices),
        taught=rows.taught[indices][row_of],
    )


def _hash(key: bytes, *numbers: int) -> bytes:
    """16 bytes; numbers are told apart from each other and from the key."""
    salt = ("," + ",".join(map(str, numbers))).encode() if numbers else b""
    return hashlib.blake2b(key + salt, digest_size=16).digest()


def _keys(rows: TokenRows, batch: Batch) -> bytes:
    return b"".join(rows.key(i) for sequence in batch for i in sequence)


def _offsets(lengths: ArrayLike) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _windows(rows: TokenRows, order: NDArray[np.int64], batch_size: int) -> Iterator[list[int]]:
    """The order in windows of 50 batches, each sorted longest first."""
    lengths, size = rows.lengths, _WINDOW * batch_size
    for start in range(0, len(order), size):
        window = order[start : start + size]
        yield window[np.argsort(-lengths[window], kind="stable")].tolist()


def _first_fit(
    window: Sequence[int], lengths: NDArray[np.int64], max_length: int
) -> list[tuple[int, ...]]:
    """Rows, longest first, into the first sequence that has room for each."""
    sequences: list[list[int]] = []
    room = np.zeros(len(window), np.int64)
    for i in window:
        fits = room[: len(sequences)] >= lengths[i]
        first = int(fits.argmax()) if fits.any() else len(sequences)
        if first == len(sequences):
            sequences.append([])
            room[first] = max_length
        sequences[first].append(i)
        room[first] -= lengths[i]
    return [tuple(sequence) for sequence in sequences]
