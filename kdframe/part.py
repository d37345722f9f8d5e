"""What every part is made of: the base class of its settings, and the types of their fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pydantic

TargetForm = Literal["truncated", "dense", "weighted", "hidden"]
"""How a codec's targets tell of the teacher; `kdframe.targets` has a class for each."""

_FILE_ENDINGS = frozenset({".jsonl", ".json", ".parquet", ".txt", ".gguf"})


def _found(value: str, info: pydantic.ValidationInfo) -> str:
    """Make a path absolute. What exists, or looks like a path, is one; all else is a name."""
    base = (info.context or {}).get("base")
    if base is None or value.startswith("pkg:"):
        return value
    path = Path(base, value).expanduser()
    looks_local = (
        value.startswith((".", "/", "~"))
        or path.suffix in _FILE_ENDINGS
        or value.count("/") > 1  # a hub id has one slash at most
    )
    return str(path.resolve()) if looks_local or path.exists() else value


def _absolute(value: Path, info: pydantic.ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return value if base is None else Path(base, value).expanduser().resolve()


Place = Annotated[str, pydantic.AfterValidator(_found)]
"""A hub name, `pkg:package/path`, or a path (relative to the file that names it)."""

Folder = Annotated[Path, pydantic.AfterValidator(_absolute)]
"""A folder (relative to the file that names it)."""


class Part(pydantic.BaseModel):
    """Base of every configuration class that a plugin brings.

    A subclass declares its name as `kind: Literal["my_kind"] = "my_kind"`.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    requires: ClassVar[tuple[str, ...]] = ()
    """Modules that must be importable; a part whose module is missing is listed as unavailable."""
    install: ClassVar[str] = ""
    """The `pip install` line that brings them."""

    kind: str
