"""Codecs: how the teacher's distribution at one position becomes a record of fixed size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from kdframe.api import Codec, CodecConfig, InputError, TargetForm, TeacherShape, hookimpl
from kdframe_codecs.hidden_settings import Hidden, Hybrid, Klt
from kdframe_codecs.topk_layout import Layout, most_ids

if TYPE_CHECKING:
    from torch import Tensor

_LADDER = (16, 32, 64, 128, 256)  # values of k
_ROOMS = (14, 28, 56, 112)  # values of entries


class Dense(CodecConfig):
    """The whole distribution, at any temperature: `V` values for each position."""

    kind: Literal["dense"] = "dense"
    precision: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    """Type of the stored log-probabilities; int8 has steps of each position's own."""

    form: ClassVar[TargetForm] = "dense"

    def serves(self, temperature: float) -> bool:
        """Every temperature."""
        return True

    def record_bytes(self, shape: TeacherShape) -> int:
        """Four, two or one byte for each id; int8 adds four, the step."""
        if self.precision == "int8":
            return shape.vocab_size + 4
        return shape.vocab_size * (4 if self.precision == "float32" else 2)

    def build(self, shape: TeacherShape, fitted: Mapping[str, Tensor] | None = None) -> Codec:
        """The codec."""
        from kdframe_codecs.dense import DenseCodec, Int8Codec

        return Int8Codec(self, shape) if self.precision == "int8" else DenseCodec(self, shape)


def _ascending_from_one(grid: tuple[float, ...]) -> tuple[float, ...]:
    if grid[0] != 1 or list(grid) != sorted(set(grid)):
        raise ValueError("temperatures must ascend and begin with 1")
    return grid


class TopK(CodecConfig):
    """The likeliest ids, and the tail mass at a grid of temperatures.

    The tail is kept as its share of the sum over the whole vocabulary of `p ** (1/T)`: with it
    the kept ids have their true probability at T, and what is left is the true mass of all
    others. A top-k without it cannot be read at another temperature than 1.
    """

    kind: Literal["topk"] = "topk"
    k: Annotated[int, Field(gt=0, le=65_535)] | None = 64
    """How many ids are kept (the codec `dense` keeps every one)."""
    for_bytes: PositiveInt | None = None
    """Instead of `k`: as many ids as a record of so many bytes can hold."""
    temperatures: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...],
        Field(min_length=1),
        AfterValidator(_ascending_from_one),
    ] = (1.0, 1.5, 2.0, 3.0, 6.0)
    """Temperatures at which the tail mass is kept, a byte each; between them it is interpolated."""

    form: ClassVar[TargetForm] = "truncated"

    @model_validator(mode="before")
    @classmethod
    def _bytes_instead(cls, given: Any) -> Any:
        instead = isinstance(given, Mapping) and given.get("for_bytes") is not None
        return {"k": None, **given} if instead else given

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.k is None) == (self.for_bytes is None):
            raise ValueError("give either k or for_bytes")
        return self

    @classmethod
    def ladder(cls, temperatures: Sequence[float] = ()) -> Sequence[Self]:
        """16 to 256 ids; a grid that covers the temperatures, where they are at least 1."""
        above = {t for t in temperatures if not cls().serves(t) and t > 1}
        if not above:
            return tuple(cls(k=k) for k in _LADDER)
        grid = tuple(sorted({*cls().temperatures, *above}))
        return tuple(cls(k=k, temperatures=grid) for k in _LADDER)

    def serves(self, temperature: float) -> bool:
        """Temperatures inside the grid."""
        return self.temperatures[0] <= temperature <= self.temperatures[-1]

    def layout(self, shape: TeacherShape) -> Layout:
        """The parts of a record.

        Raises:
            InputError: not even one id fits `for_bytes`.
        """
        tails = len(self.temperatures) - 1
        k = self.k or most_ids(self.for_bytes or 0, shape.vocab_size, tails)
        if k:
            return Layout.of(k, shape.vocab_size, tails)
        least = Layout.of(1, shape.vocab_size, tails).size
        raise InputError(
            f"cache.codec.for_bytes: {self.for_bytes} bytes hold no id; give at least {least}"
        )

    def remedy(self, temperature: float) -> str:
        """A wider grid."""
        return "add it to cache.codec.temperatures, or use codec 'dense'"

    def record_bytes(self, shape: TeacherShape) -> int:
        """About two and a half bytes for each id, and one for each temperature above 1."""
        return self.layout(shape).size

    def build(self, shape: TeacherShape, fitted: Mapping[str, Tensor] | None = None) -> Codec:
        """The codec."""
        from kdframe_codecs.topk import TopKCodec

        return TopKCodec(self, shape)


class Sampled(CodecConfig):
    """Ids drawn from the teacher's distribution, with weights whose expectation is it.

    Where `topk` errs the same way at every position, the errors of draws cancel out over many.
    The likeliest ids are kept for certain, the others drawn; made for one temperature.
    """

    kind: Literal["sampled"] = "sampled"
    entries: Annotated[int, Field(ge=1, le=4096)] = 28
    """Room for so many ids; unlikely ones take less, so that up to twice as many fit."""
    temperature: PositiveFloat = 1.0
    """The temperature at which is drawn: that of the loss."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Another seed draws other ids."""

    form: ClassVar[TargetForm] = "weighted"

    @classmethod
    def ladder(cls, temperatures: Sequence[float] = ()) -> Sequence[Self]:
        """14 to 112 entries, at each of the temperatures."""
        return tuple(cls(entries=e, temperature=t) for t in temperatures or (1.0,) for e in _ROOMS)

    def serves(self, temperature: float) -> bool:
        """Its own temperature."""
        return temperature == self.temperature

    def remedy(self, temperature: float) -> str:
        """Draws at the temperature of the loss."""
        return f"set cache.codec.temperature to {temperature:g}"

    def record_bytes(self, shape: TeacherShape) -> int:
        """Some 2 for each entry; 60 with 28 of them out of 49,152 ids."""
        from kdframe_codecs.drawn_records import Layout

        return Layout(shape.vocab_size, self.entries).record_bytes

    def build(self, shape: TeacherShape, fitted: Mapping[str, Tensor] | None = None) -> Codec:
        """The codec."""
        from kdframe_codecs.sampled import SampledCodec

        return SampledCodec(self, shape)


@hookimpl
def kdframe_codecs() -> tuple[type[CodecConfig], ...]:
    """Dense, truncated, by hidden states, and drawn."""
    return (Dense, TopK, Hidden, Klt, Hybrid, Sampled)
