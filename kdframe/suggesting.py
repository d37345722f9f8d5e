"""Which setting was meant by one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import pydantic

from kdframe.experiment import Experiment
from kdframe.part import Part
from kdframe.plugins import installed

_DEEPEST = 2  # sections in sections, as cache.codec.k


def did_you_mean(location: Sequence[int | str]) -> str:
    """The nearest name to that of a setting that does not exist, or where it does exist."""
    names = _settings(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    near = near or _elsewhere(str(location[-1]))[:1]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are: {', '.join(sorted(names))}" if names else ""


def _settings(location: Sequence[int | str]) -> set[str]:
    """Names of the settings at a location; where plugins stand, those of every kind."""
    models: list[type[pydantic.BaseModel]] = [Experiment]
    for part in location:
        if isinstance(part, int):
            continue
        models = [below for model in models for below in _below(model, part)]
    return {name for model in models for name in model.model_fields}


def _elsewhere(name: str) -> list[str]:
    """Dotted paths, in other sections, of settings with this very name."""
    found: list[str] = []
    level: list[tuple[str, type[pydantic.BaseModel]]] = [("", Experiment)]
    for _ in range(_DEEPEST):
        level = [
            (f"{prefix}{key}.", below)
            for prefix, model in level
            for key in model.model_fields
            for below in _below(model, key)
        ]
        found += [prefix + name for prefix, model in level if name in model.model_fields]
    return found


def _below(model: type[pydantic.BaseModel], name: str) -> list[type[pydantic.BaseModel]]:
    info = model.model_fields.get(name)
    if info is None:
        return []
    found: list[type[pydantic.BaseModel]] = []
    _collect(info.annotation, found)
    parts: list[type[pydantic.BaseModel]] = [
        kind.part
        for base in found
        if issubclass(base, Part)
        for kinds in installed().kinds.values()
        for kind in kinds.values()
        if issubclass(kind.part, base)
    ]
    return parts or found


def _collect(annotation: Any, found: list[type[pydantic.BaseModel]]) -> None:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        found.append(annotation)
    for argument in getattr(annotation, "__args__", ()):
        _collect(argument, found)
