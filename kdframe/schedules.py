"""Settings that change while the student learns.

`temperature: 2.0` is a number; `temperature: {start: 4.0, end: 1.0}` changes with the training's
progress, which goes from 0 at the first step to 1 after the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, SchemaValidator, core_schema


class Schedule(BaseModel):
    """A number that moves from `start` to `end` over the training."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    start: float
    """Value at the first step."""
    end: float
    """Value that is reached after the last step."""
    shape: Literal["linear", "cosine"] = "linear"
    """`linear`: evenly; `cosine`: half a wave, slow at both ends."""

    def at(self, progress: float) -> float:
        """The value at a share of the training, 0 to 1; never outside start and end."""
        share = (1 - math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else progress
        value = (1 - share) * self.start + share * self.end
        # Rounding must not lead out of what a cache serves.
        return min(max(value, min(self.start, self.end)), max(self.start, self.end))


Scheduled = float | Schedule
"""A number, or a schedule of one."""


class Bounds:
    """The limits of a scheduled setting: `Annotated[Scheduled, Bounds(gt=0)]`.

    They hold for a number as for both ends of a schedule.
    """

    def __init__(self, **limits: float) -> None:
        """Take `ge`, `gt`, `le`, `lt` as pydantic's `Field` means them."""
        self._number = core_schema.float_schema(allow_inf_nan=False, **limits)  # type: ignore[arg-type]
        self._check = SchemaValidator(self._number)

    def _read(self, value: object) -> Scheduled:
        if isinstance(value, Mapping):
            value = Schedule.model_validate(value)
        if not isinstance(value, Schedule):
            return float(self._check.validate_python(value))
        for end in (value.start, value.end):
            self._check.validate_python(end)
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Read by what is there, so that a fault stands at its own key."""
        return core_schema.no_info_plain_validator_function(
            self._read, serialization=core_schema.plain_serializer_function_ser_schema(_plain)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """A number or a schedule."""
        both = (self._number, Schedule.__pydantic_core_schema__)
        return {"anyOf": [handler(one) for one in both]}


def _plain(value: Scheduled) -> float | dict[str, Any]:
    return value.model_dump() if isinstance(value, Schedule) else value


def ends(value: Scheduled) -> tuple[float, ...]:
    """The number alone, or a schedule's start and end."""
    return (value.start, value.end) if isinstance(value, Schedule) else (value,)


def fixed(value: Scheduled) -> float:
    """The number that a setting is at one moment.

    Raises:
        TypeError: it is a schedule: the loss was not built from `config.at(progress)`.
    """
    if isinstance(value, Schedule):
        raise TypeError("a schedule has no one value; build the loss of `config.at(progress)`")
    return value


def in_words(value: Scheduled, change: Callable[[float], float] = float) -> str:
    """`2`, or `4 to 1 (linear)`; `change` is applied to the numbers."""
    words = " to ".join(f"{change(end):.6g}" for end in ends(value))
    return f"{words} ({value.shape})" if isinstance(value, Schedule) else words
