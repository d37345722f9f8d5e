"""Read an experiment from a file, with every fault at its line.

YAML is read by ruamel (YAML 1.2: `1e-5` is a number, a duplicate key is an error).
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pydantic
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from kdframe import template
from kdframe.errors import InputError
from kdframe.experiment import Experiment, set_path
from kdframe.parts import Part
from kdframe.plugins import installed

MAX_BYTES = 1_000_000
MAX_NODES = 10_000


def load(path: str | Path, overrides: Iterable[str] = (), *, name: str | None = None) -> Experiment:
    """The experiment that a `.yaml` file describes, or that a `.py` file calls `experiment`.

    Args:
        path: the file. Paths in it are relative to it.
        overrides: `dotted.path=value`, the value in YAML.
        name: another name for the run.

    Raises:
        InputError: every fault of the file and the overrides, one line each.
    """
    path = Path(path)
    origin: dict[str, str] = {}
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".py":
        plain: dict[str, Any] = _from_python(path).plain()
        place = _Places(path, None, {})
    else:
        document = _parse(path)
        plain = json.loads(json.dumps(document))
        if template.is_template(plain):
            plain, origin = _translate(path, document, plain)
        plain.setdefault("name", path.stem)
        place = _Places(path, document, origin)
    changed = _override(plain, overrides)
    if name is not None:
        plain["name"] = name
    return _validate(plain, place, changed, path.resolve().parent)


def from_plain(plain: Mapping[str, Any], *, base: Path | None = None) -> Experiment:
    """An experiment from plain data; faults are named by their dotted path.

    Raises:
        InputError: every fault, one line each.
    """
    return _validate(dict(plain), _Places(Path("experiment"), None, {}), set(), base)


def dump(experiment: Experiment) -> str:
    """The resolved experiment as YAML."""
    text = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(experiment.plain(), text)
    return text.getvalue()


class _Places:
    """Where in the file a dotted path stands."""

    def __init__(self, path: Path, document: Any, origin: Mapping[str, str]) -> None:
        self.path = path
        self.document = document
        self.origin = origin

    def of(self, location: Sequence[int | str]) -> str:
        """`file:line:col path`, as near as the file knows."""
        dotted = ".".join(str(part) for part in location)
        wanted = self.origin.get(dotted, dotted)
        line = _line(self.document, self._in_document(location, wanted))
        return f"{self.path}:{line} {wanted}".rstrip() if line else f"{self.path}: {wanted}"

    def _in_document(self, location: Sequence[int | str], wanted: str) -> Sequence[int | str]:
        return _find(self.document, wanted) if self.origin else location


def _find(document: Any, key: str) -> Sequence[int | str]:
    """The location of a key anywhere in nested mappings."""
    for name, value in document.items() if isinstance(document, Mapping) else ():
        if name == key:
            return (name,)
        if below := _find(value, key):
            return (name, *below)
    return ()


def _line(document: Any, location: Sequence[int | str]) -> str:
    """`line:col`, 1-based, of the deepest part of `location` that the document holds."""
    found = ""
    for part in location:
        marks: Any = getattr(document, "lc", None)
        try:
            line, column = marks.key(part) if isinstance(document, Mapping) else marks.item(part)
            document = document[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
        found = f"{line + 1}:{column + 1}"
    return found


def _parse(path: Path) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise InputError(
            f"{path}: larger than {MAX_BYTES:,} bytes; an experiment is a page of YAML"
        )
    try:
        text = path.read_text(encoding="utf-8")
        document = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise InputError(f"{where}: {' '.join(str(error.problem).split())}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise InputError(f"{path}: an experiment is a mapping of settings")
    if _nodes(document, 0) > MAX_NODES:
        raise InputError(f"{path}: more than {MAX_NODES:,} values once its aliases are followed")
    return document


def _nodes(value: Any, seen: int) -> int:
    """How many values a document holds; stops counting past the limit (an alias bomb)."""
    seen += 1
    below = value.values() if isinstance(value, Mapping) else value
    if isinstance(below, str) or not isinstance(below, Iterable):
        return seen
    for item in below:
        if seen > MAX_NODES:
            break
        seen = _nodes(item, seen)
    return seen


def _translate(
    path: Path, document: Any, plain: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        return template.translate(plain, name=path.stem)
    except InputError as error:
        lines = []
        for fault in error.faults:
            key = fault.split(":", 1)[0]
            line = _line(document, _find(document, key))
            lines.append(f"{path}:{line} {fault}" if line else f"{path}: {fault}")
        raise InputError(*lines) from error


def _from_python(path: Path) -> Experiment:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: cannot be read as a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except pydantic.ValidationError as error:
        place = _Places(path, None, {})
        raise InputError(*(_fault(detail, place, set()) for detail in error.errors())) from error
    experiment = getattr(module, "experiment", None)
    if not isinstance(experiment, Experiment):
        raise InputError(f"{path}: must define `experiment`, a kdframe.Experiment")
    return experiment


def _override(plain: dict[str, Any], overrides: Iterable[str]) -> set[str]:
    changed = set()
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise InputError(f"{override!r}: an override is written as dotted.path=value")
        try:
            set_path(plain, path, YAML(typ="safe").load(text))
        except (MarkedYAMLError, AttributeError, IndexError, ValueError) as error:
            raise InputError(f"{override!r}: cannot be set: {error}") from error
        changed.add(path)
    return changed


def _validate(
    plain: dict[str, Any], place: _Places, changed: set[str], base: Path | None
) -> Experiment:
    plain = _split_available(plain)
    try:
        return Experiment.model_validate(plain, context={"base": base} if base else None)
    except pydantic.ValidationError as error:
        faults = [_fault(detail, place, changed) for detail in error.errors()]
        raise InputError(*faults) from error


def _split_available(plain: dict[str, Any]) -> dict[str, Any]:
    """Move the evaluators of `when_available` that are installed to `evaluators`."""
    section = plain.get("evaluation")
    if not isinstance(section, Mapping) or not isinstance(section.get("when_available"), list):
        return plain
    here = installed().kinds["evaluator"]
    wanted = section["when_available"]
    usable = [kind for kind in wanted if kind in here and not here[kind].unavailable]
    if not usable:
        return plain
    split = dict(section)
    split["evaluators"] = [*section.get("evaluators", []), *usable]
    split["when_available"] = [kind for kind in wanted if kind not in usable]
    return {**plain, "evaluation": split}


def _fault(detail: ErrorDetails, place: _Places, changed: set[str]) -> str:
    location = detail["loc"]
    dotted = ".".join(str(part) for part in location)
    hint = _did_you_mean(location) if detail["type"] == "extra_forbidden" else ""
    message = (
        "there is no such setting"
        if hint is not None and detail["type"] == ("extra_forbidden")
        else detail["msg"].removeprefix("Value error, ")
    )
    where = f"{dotted}={detail['input']!r}" if dotted in changed else place.of(location)
    given = (
        ""
        if detail["type"] in ("extra_forbidden", "missing", "value_error")
        else (f" (given: {detail['input']!r})")
    )
    return f"{where}: {message}{given}{hint}"


def _did_you_mean(location: Sequence[int | str]) -> str:
    """The nearest names of the section in which an unknown key stands."""
    names = _settings(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
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
