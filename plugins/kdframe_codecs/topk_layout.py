"""Where things lie in a record of the codec `topk`, and how many ids fit a number of bytes.

No torch and no numpy: the settings are read with it. Letters: `k` kept ids, `V` the vocabulary.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

LOW_BITS = 16
WHOLE_VALUE = 2
FIRST_VALUE = 2
BYTE_VALUES = 8
TAIL = 1
MOST = 65_535  # ids of one record


@dataclass(frozen=True)
class Layout:
    """The parts of a record, in the order of its bytes.

    Attributes:
        k: ids kept, at most `V`.
        low: bytes of the ids' low 16 bits; high: of their other bits, packed.
        first, bytewise, nibbles: bytes of the values: the likeliest id's; those of the next eight
            ids, one byte each; those of all others, half a byte each.
        whole: bytes of the values where every id of the vocabulary is kept.
        tails: bytes of the tail's share at the temperatures above 1.
        high_bits: bits of an id above its low 16.
    """

    k: int
    low: int
    high: int
    first: int
    bytewise: int
    nibbles: int
    whole: int
    tails: int
    high_bits: int

    @classmethod
    def of(cls, k: int, vocab_size: int, tails: int) -> Layout:
        """The layout of `k` ids and `tails` temperatures above 1."""
        k = min(k, vocab_size)
        high_bits = max(0, (vocab_size - 1).bit_length() - LOW_BITS)
        whole = k == vocab_size
        after = 0 if whole else k - 1
        bytewise = min(BYTE_VALUES, after)
        return cls(
            k=k,
            low=2 * k,
            high=-(-k * high_bits // 8),
            first=0 if whole else FIRST_VALUE,
            bytewise=bytewise,
            nibbles=-(-(after - bytewise) // 2),
            whole=WHOLE_VALUE * k if whole else 0,
            tails=0 if whole else TAIL * tails,
            high_bits=high_bits,
        )

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return sum(self._sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The bytes of low, high, first, bytewise, nibbles, whole and tails."""
        ends = [sum(self._sizes[: i + 1]) for i in range(len(self._sizes))]
        return tuple(slice(end - size, end) for end, size in zip(ends, self._sizes, strict=True))

    @property
    def _sizes(self) -> tuple[int, ...]:
        values = (self.first, self.bytewise, self.nibbles, self.whole)
        return (self.low, self.high, *values, self.tails)


def most_ids(size: int, vocab_size: int, tails: int) -> int:
    """The largest `k` whose record has at most `size` bytes; 0 if there is none."""
    sizes = range(1, min(MOST, vocab_size) + 1)
    return bisect.bisect_right(sizes, size, key=lambda k: Layout.of(k, vocab_size, tails).size)
