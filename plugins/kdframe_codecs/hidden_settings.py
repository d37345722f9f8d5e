"""Settings of the codecs that keep the teacher's hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from kdframe.api import Codec, CodecConfig, InputError, TargetForm, TeacherShape

if TYPE_CHECKING:
    from torch import Tensor

    from kdframe.api import TeacherOutputs


class Hidden(CodecConfig):
    """The teacher's final hidden state, and its output layer once for the whole cache.

    The whole distribution at any temperature, exact but for the rounding of the state, at two
    bytes (float16) or one (int8) for each number of the state instead of each id. Training pays
    with one matrix product more: the teacher's output layer runs on every batch.
    """

    kind: Literal["hidden"] = "hidden"
    precision: Literal["float16", "int8"] = "float16"
    """Type of the stored numbers."""

    form: ClassVar[TargetForm] = "hidden"
    reads_hidden: ClassVar[bool] = True
    fits: ClassVar[bool] = True

    @property
    def reads_sample(self) -> bool:
        """For int8: how far each number spreads."""
        return self.precision == "int8"

    @classmethod
    def ladder(cls, temperatures: Sequence[float] = ()) -> Sequence[Self]:
        """Both precisions."""
        return (cls(precision="int8"), cls())

    def serves(self, temperature: float) -> bool:
        """Every temperature."""
        return temperature > 0

    def record_bytes(self, shape: TeacherShape) -> int:
        """Two bytes or one for each number of the hidden state, and four."""
        return 4 + _hidden_width(shape, self.kind) * (2 if self.precision == "float16" else 1)

    def fit(self, sample: TeacherOutputs) -> Mapping[str, Tensor]:
        """The output layer; for int8, how far each number spreads."""
        from kdframe_codecs.hidden import fit_hidden

        return fit_hidden(sample, self.precision)

    def build(self, shape: TeacherShape, fitted: Mapping[str, Tensor] | None = None) -> Codec:
        """The codec."""
        from kdframe_codecs.hidden import HiddenCodec

        return HiddenCodec(self, shape, fitted or {})


class Klt(CodecConfig):
    """The final hidden state, decorrelated and rounded to a few bits a number.

    Fitted to the teacher: numbers whose errors matter more to its output layer get more bits.
    """

    kind: Literal["klt"] = "klt"
    bits: Annotated[int, Field(ge=1, le=8)] = 4
    """Bits for each number of the hidden state, on average."""

    form: ClassVar[TargetForm] = "hidden"
    reads_hidden: ClassVar[bool] = True
    fits: ClassVar[bool] = True

    @classmethod
    def ladder(cls, temperatures: Sequence[float] = ()) -> Sequence[Self]:
        """2 to 4 bits; above, numbers fill bytes badly, and `hidden` in int8 is better."""
        return tuple(cls(bits=bits) for bits in (2, 3, 4))

    def serves(self, temperature: float) -> bool:
        """Every temperature."""
        return temperature > 0

    def record_bytes(self, shape: TeacherShape) -> int:
        """`bits` for each number of the hidden state."""
        return (_hidden_width(shape, self.kind) * self.bits + 7) // 8

    def fit(self, sample: TeacherOutputs) -> Mapping[str, Tensor]:
        """The transform, its levels, and the output layer."""
        from kdframe_codecs.coded_states import fit_states

        return fit_states(sample, self.bits)

    def build(self, shape: TeacherShape, fitted: Mapping[str, Tensor] | None = None) -> Codec:
        """The codec."""
        from kdframe_codecs.klt import KltCodec

        return KltCodec(self, shape, fitted or {})


class Hybrid(CodecConfig):
    """The likeliest ids exactly, and the hidden state in a few bits a number for all others.

    At T = 1 the mass of the others is exact too; at other temperatures it follows from the
    distribution, whose tail has the shape that the coarse state gives it.
    """

    kind: Literal["hybrid"] = "hybrid"
    k: Annotated[int, Field(ge=1, le=4096)] = 16
    """How many ids are kept exactly."""
    bits: Annotated[int, Field(ge=1, le=8)] = 4
    """Bits for each number of the hidden state, on average."""

    form: ClassVar[TargetForm] = "hidden"
    reads_hidden: ClassVar[bool] = True
    fits: ClassVar[bool] = True

    @classmethod
    def ladder(cls, temperatures: Sequence[float] = ()) -> Sequence[Self]:
        """2 to 4 bits; above, the state needs no help."""
        return tuple(cls(bits=bits) for bits in (2, 3, 4))

    def serves(self, temperature: float) -> bool:
        """Every temperature."""
        return temperature > 0

    def record_bytes(self, shape: TeacherShape) -> int:
        """Three bytes and a little more for each id, `bits` for each number of the state."""
        k = min(self.k, shape.vocab_size)
        high = max(0, (shape.vocab_size - 1).bit_length() - 16)
        state = (_hidden_width(shape, self.kind) * self.bits + 7) // 8
        return 3 * k + (k * high + 7) // 8 + 1 + state

    def fit(self, sample: TeacherOutputs) -> Mapping[str, Tensor]:
        """The transform, its levels, and the output layer."""
        from kdframe_codecs.coded_states import fit_states

        return fit_states(sample, self.bits, known=self.k)

    def build(self, shape: TeacherShape, fitted: Mapping[str, Tensor] | None = None) -> Codec:
        """The codec."""
        from kdframe_codecs.hybrid import HybridCodec

        return HybridCodec(self, shape, fitted or {})


def _hidden_width(shape: TeacherShape, kind: str) -> int:
    """The hidden width of a teacher that has one."""
    if shape.hidden_size < 1:
        raise InputError(
            f"cache.codec: {kind!r} keeps hidden states, and the teacher's configuration names no "
            "`hidden_size`; use the codec 'topk'"
        )
    return shape.hidden_size
