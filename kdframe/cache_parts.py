"""The two parts that keep a teacher's predictions: codecs and cache backends.

No module here imports torch: a part imports its maths inside the method that builds it.
Letters: `n` positions, `V` the vocabulary, `H` the hidden width, `B` bytes of one record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    Self,
    runtime_checkable,
)

from pydantic import Field

from kdframe.errors import InputError
from kdframe.part import Part, TargetForm

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from kdframe.heads import TeacherOutputs
    from kdframe.targets import TeacherTargets, TruncatedTargets


# ------------------------------------------------------------------------------------- codecs
@dataclass(frozen=True)
class TeacherShape:
    """The sizes of a teacher's last layers: output rows `V`, hidden width `H` (0: logits alone)."""

    vocab_size: int
    hidden_size: int = 0


class Codec(Protocol):
    """How the distribution at one position becomes a record of fixed size, and back."""

    record_bytes: int

    def encode(self, outputs: TeacherOutputs) -> NDArray[np.uint8]:
        """`n` positions to records `[n, B]`.

        `outputs.logits` is `[n, V]` float32 at T = 1, finite or `-inf`; a codec that does not
        ask for it saves the teacher its output layer. `outputs.hidden` `[n, H]` is promised
        only where the settings declare `reads_hidden`.
        """

    def decode(self, records: NDArray[np.uint8]) -> TeacherTargets:
        """Records `[n, B]` to targets."""


@runtime_checkable
class TruncatedCodec(Codec, Protocol):
    """A codec that can also keep a truncated distribution as it is, without the teacher's logits.

    It can take what was computed elsewhere: `kdframe cache import`.
    """

    def encode_truncated(self, targets: TruncatedTargets) -> NDArray[np.uint8]:
        """`n` positions to records `[n, B]`; a record's first `k` ids are the likeliest.

        Raises:
            InputError: the targets do not say all that a record holds (the tail at more
                temperatures, say); names the setting.
        """


class CodecConfig(Part):
    """Settings of a codec."""

    form: ClassVar[TargetForm]
    """The form of TeacherTargets that it decodes to."""
    reads_hidden: ClassVar[bool] = False
    """Whether it reads the teacher's final hidden states (not every teacher has them apart)."""
    fits: ClassVar[bool] = False
    """Whether it is fitted to the teacher before the first record: see `fit`."""

    @property
    def reads_sample(self) -> bool:
        """Whether `fit` looks at the sample's positions, and not at its output layer alone."""
        return True

    @classmethod
    def ladder(cls, temperatures: Sequence[float] = ()) -> Sequence[Self]:
        """Settings that `kdframe plan` compares, for a loss that reads `temperatures`.

        The defaults alone, unless a codec with a setting of size says more.

        Raises:
            pydantic.ValidationError: a setting has no default.
        """
        return (cls(),)  # type: ignore[call-arg]

    def serves(self, temperature: float) -> bool:
        """Whether the targets can be read at `temperature`."""
        raise NotImplementedError

    def remedy(self, temperature: float) -> str:
        """What to set, so that a temperature that is not served will be: `use codec 'dense'`."""
        return "use codec 'dense'"

    def record_bytes(self, shape: TeacherShape) -> int:
        """Bytes of one position's record."""
        raise NotImplementedError

    def fit(self, sample: TeacherOutputs) -> Mapping[str, Tensor]:
        """What decoding needs besides the records: kept once, beside them.

        Called once for a cache, if `fits` is set, before anything is encoded.

        Args:
            sample: a few thousand positions drawn from all the data (none, unless
                `reads_sample`), `sample.head` with them.
        """
        return {}

    def build(self, shape: TeacherShape, fitted: Mapping[str, Tensor] | None = None) -> Codec:
        """The codec of a teacher.

        Args:
            fitted: what `fit` returned, where `fits` is set.
        """
        raise NotImplementedError


# ------------------------------------------------------------------------------------- caches
@dataclass(frozen=True)
class RowPositions:
    """A row of text, by key, and the positions of it that count.

    Attributes:
        key: hash of the teacher's token ids, 16 bytes.
        positions: `[n]` int32, ascending.
    """

    key: bytes
    positions: NDArray[np.int32]


@dataclass(frozen=True)
class BadRow:
    """A damaged row: its key in hexadecimal, the shard's file name, and what is wrong."""

    row: str
    shard: str
    reason: str


@dataclass(frozen=True)
class CacheSpec:
    """What a cache must hold, whoever keeps it.

    Attributes:
        identity: everything that changes the records, by name (weights, tokenizer, codec, ...).
        folder: where it lives unless the backend's settings say otherwise.
        record_bytes: size of one position's record.
        codec: the codec's settings as plain data, for the manifest.
    """

    identity: Mapping[str, str]
    folder: Path
    record_bytes: int
    codec: Mapping[str, Any]


class Cache(Protocol):
    """Records of a teacher's predictions, addressed by key. Safe with other writers.

    Attributes:
        folder: a local folder: the cache itself, or what this machine keeps for it.
        place: where the cache is, as its user knows it: a path or an address.
    """

    folder: Path
    place: str

    def require_room(self, size: int, what: str) -> None:
        """Refuse `what` before it is begun, where `size` bytes are known not to fit.

        Raises:
            InputError: names what is needed and what is free.
        """

    def missing(self, rows: Sequence[RowPositions]) -> list[int]:
        """Indices of the rows whose stored positions do not cover what is asked."""

    def write(self, rows: Sequence[RowPositions], records: Sequence[NDArray[np.uint8]]) -> None:
        """Store `records[i]` `[n_i, B]` for `rows[i]`. Durable on return; idempotent."""

    def read(self, rows: Sequence[RowPositions]) -> NDArray[np.uint8]:
        """Records of all rows' positions, in their order, `[sum n_i, B]`.

        Raises:
            DamagedError: a row is absent, does not hold a position, or fails its checksum.
        """

    def stored(self) -> Sequence[RowPositions]:
        """Every row that is there, each once, with the positions that it holds."""

    def places(self, key: bytes) -> list[str]:
        """Names of the shards (or of what a `BadRow` calls so) that hold a row."""

    def keep(self, name: str, data: bytes) -> None:
        """Keep something small beside the records, durable on return. The first to come stays.

        Args:
            name: letters, digits, `-` and `_`.
        """

    def kept(self, name: str) -> bytes | None:
        """What was kept under a name.

        Raises:
            DamagedError: it is not what was kept.
        """

    def kept_names(self) -> list[str]:
        """The names under which something is kept, in order."""

    def verify(self) -> tuple[int, list[BadRow]]:
        """How many rows there are, and every one whose bytes are not what was written.

        Something kept that is damaged may be told too, with an empty `row`.
        """

    def drop(self, rows: Sequence[BadRow]) -> None:
        """Forget rows, so that they are missing.

        Raises:
            DamagedError: something kept is among them, which cannot be computed again.
        """

    def info(self) -> dict[str, Any]:
        """Counts and sizes as plain data: `rows`, `positions`, `bytes`, `shards`, `identity`."""


class CacheConfig(Part):
    """Settings of a cache backend. A subclass has a field `codec: CodecSlot`."""

    codec: Any
    not_numbers: Literal["error", "drop_row", "mask_position"] = "error"
    """What to do where the teacher's logits hold NaN or +inf, or nothing but -inf."""
    imported: Annotated[str, Field(min_length=1)] | None = None
    """The name of a teacher whose predictions are imported, not computed here: it stands in the
    cache's identity in place of the weights, and the teacher's weights are never asked."""

    def at(self, folder: Path) -> Self:
        """These settings for a cache in another folder, to be merged into this one.

        Raises:
            InputError: this kind of cache has no folder.
        """
        raise InputError(f"cache: kind {self.kind!r} has no folder to merge from; use another kind")

    def open(self, spec: CacheSpec) -> Cache:
        """Open the cache, or begin it.

        Raises:
            InputError: the folder holds another identity; names the parts that differ.
        """
        raise NotImplementedError
