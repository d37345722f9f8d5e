"""Read an experiment from a file, with every fault at its line.

YAML is read by ruamel (YAML 1.2: `1e-5` is a number, a duplicate key is an error).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pydantic
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from kdframe import suggesting, template
from kdframe.errors import InputError, KdframeError
from kdframe.experiment import Evaluation, Experiment, set_path
from kdframe.plugins import installed

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
_MESSAGES = {
    "tuple_type": "must be a list",
    "model_type": "must be a section of settings",
    "mapping_type": "must be a section of settings",
}
_SHOWN = 80  # characters of a wrong value in a message
_NAME_RULE = "letters, digits, '.', '_' and '-' only, a letter or digit first, 100 at most"


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
    _require_file(path)
    faults: Sequence[str] = ()
    if path.suffix == ".py":
        plain: dict[str, Any] = _from_python(path).plain()
        place = _Places(path, None, {})
    else:
        document = _parse(path)
        plain = _plain(path, document)
        origin: Mapping[str, str] = {}
        if template.is_template(plain):
            plain, origin, faults = template.translate(plain, name=_name(path))
        plain.setdefault("name", _name(path))
        place = _Places(path, document, origin)
    base = path.resolve().parent
    changed = _override(plain, overrides, base)
    if name is not None:
        plain["name"] = name
        changed["name"] = f"--name {name!r}"
    return _validate(plain, place, changed, base, [place.of_key(fault) for fault in faults])


def from_plain(plain: Mapping[str, Any], *, base: Path | None = None) -> Experiment:
    """An experiment from plain data; faults are named by their dotted path.

    Raises:
        InputError: every fault, one line each.
    """
    return _validate(dict(plain), _Places(None, None, {}), {}, base)


def dump(experiment: Experiment) -> str:
    """The resolved experiment as YAML."""
    text = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(experiment.plain(), text)
    return text.getvalue()


def _require_file(path: Path) -> None:
    if path.is_dir():
        inside = sorted(path.glob("*.y*ml"))[:3]
        hint = f"; did you mean {' or '.join(map(str, inside))}?" if inside else ""
        raise InputError(f"{path}: is a folder; name the experiment's file{hint}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")


def _name(path: Path) -> str:
    """A run's name made of a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "experiment"


class _Places:
    """Where in the file a dotted path stands."""

    def __init__(self, path: Path | None, document: Any, origin: Mapping[str, str]) -> None:
        self.path = path
        self.document = document
        self.origin = origin

    def of(self, location: Sequence[int | str]) -> str:
        """`file:line:col path`, as near as the file knows."""
        dotted = ".".join(str(part) for part in location)
        wanted = self.origin.get(dotted, dotted)
        return self._written(wanted, self._in_document(location, wanted))

    def of_key(self, fault: str) -> str:
        """A fault that begins with a key of the template, with its line."""
        key, _, message = fault.partition(": ")
        return f"{self._written(key, _find(self.document, key))}: {message}"

    def _written(self, wanted: str, location: Sequence[int | str]) -> str:
        line = _line(self.document, location)
        place = f"{self.path}:{line} " if line else f"{self.path}: " if self.path else ""
        return f"{place}{wanted}".rstrip().removesuffix(":")

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
        document = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
        nodes = _nodes(document, 0)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise InputError(f"{where}: {_reason(error)}") from error
    except (YAMLError, ValueError) as error:
        raise InputError(f"{path}: not YAML: {_reason(error)}") from error
    except RecursionError as error:
        raise InputError(
            f"{path}: nested too deeply for an experiment, or holds itself through an alias"
        ) from error
    if not isinstance(document, Mapping):
        raise InputError(
            f"{path}: an experiment is a mapping of settings (`teacher: ...`, `student: ...`, "
            "`data: ...`); `kdframe schema` lists them"
        )
    if nodes > MAX_NODES:
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


def _reason(error: Exception) -> str:
    """What a YAML error says, in one line."""
    text = error.problem if isinstance(error, MarkedYAMLError) else str(error)
    return " ".join(str(text).split())


def _plain(path: Path, document: Any) -> dict[str, Any]:
    """The document as plain data; dates stay as they are written."""
    try:
        whole: dict[str, Any] = json.loads(json.dumps(document, default=_as_text))
    except TypeError as error:
        raise InputError(f"{path}: a setting's name must be a word ({error})") from error
    return whole


def _as_text(value: Any) -> str:
    return str(value.isoformat() if hasattr(value, "isoformat") else value)


def _from_python(path: Path) -> Experiment:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: cannot be read as a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except pydantic.ValidationError as error:
        place = _Places(path, None, {})
        raise InputError(*(_fault(detail, place, {}) for detail in error.errors())) from error
    except KdframeError:
        raise
    except Exception as error:  # the user's own code
        raise InputError(f"{_last_line(path, error)}: {type(error).__name__}: {error}") from error
    experiment = getattr(module, "experiment", None)
    if not isinstance(experiment, Experiment):
        raise InputError(f"{path}: must define `experiment`, a kdframe.Experiment")
    return experiment


def _last_line(path: Path, error: Exception) -> str:
    """`file:line`, the deepest line of the user's file that led to the error."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _override(plain: dict[str, Any], overrides: Iterable[str], base: Path) -> dict[str, str]:
    """Set the overrides; returns how each changed path was written."""
    changed = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise InputError(f"{override!r}: an override is written as dotted.path=value")
        try:
            value = YAML(typ="safe").load(text)
        except YAMLError as error:
            raise InputError(f"{override!r}: the value is not YAML: {_reason(error)}") from error
        try:
            _unfold(plain, _resolved(plain, base), path.split(".")[:-1])
            set_path(plain, path, value)
        except (AttributeError, IndexError, ValueError) as error:
            raise InputError(
                f"{override!r}: a part of the path is a list; name one of its entries by its "
                "number, from 0 (as in data.train.0.limit=100)"
            ) from error
        changed[path] = f"{path}={value!r}"
    return changed


def _resolved(plain: dict[str, Any], base: Path) -> dict[str, Any]:
    """The experiment with its defaults; empty if it is not valid by itself."""
    try:
        return Experiment.model_validate(_split_available(plain), context={"base": base}).plain()
    except pydantic.ValidationError:
        return {}


def _unfold(plain: Any, whole: Any, parents: Sequence[str]) -> None:
    """Write out the sections above an override that are short (a path, a kind) or left out."""
    for name in parents:
        key: Any = int(name) if isinstance(whole, list) and name.isdigit() else name
        try:
            whole = whole[key]
        except (KeyError, IndexError, TypeError):
            return
        there = plain[key] if isinstance(plain, list) else plain.get(key)
        if type(there) is not type(whole):
            plain[key] = copy.deepcopy(whole)
        plain = plain[key]


def _validate(
    plain: dict[str, Any],
    place: _Places,
    changed: Mapping[str, str],
    base: Path | None,
    faults: Sequence[str] = (),
) -> Experiment:
    """`faults` are those that the file is already known to have."""
    plain = _split_available(plain)
    try:
        experiment = Experiment.model_validate(plain, context={"base": base} if base else None)
    except pydantic.ValidationError as error:
        found = [d for d in error.errors() if not (faults and d["type"] == "missing")]
        raise InputError(*faults, *(_fault(d, place, changed) for d in found)) from error
    if faults:
        raise InputError(*faults)
    return experiment


def _split_available(plain: dict[str, Any]) -> dict[str, Any]:
    """Move the evaluators of `when_available` that are installed to `evaluators`."""
    section = plain.get("evaluation")
    if not isinstance(section, Mapping) or not isinstance(section.get("when_available"), list):
        return plain
    here = installed().kinds["evaluator"]
    asked = section.get("evaluators", list(Evaluation.model_fields["evaluators"].default))
    wanted = section["when_available"]
    if not isinstance(asked, list) or not all(isinstance(kind, str) for kind in wanted):
        return plain
    usable = [kind for kind in wanted if kind in here and not here[kind].unavailable]
    if not usable:
        return plain
    split = dict(section)
    split["evaluators"] = [*asked, *(kind for kind in usable if kind not in asked)]
    split["when_available"] = [kind for kind in wanted if kind not in usable]
    return {**plain, "evaluation": split}


def _fault(detail: ErrorDetails, place: _Places, changed: Mapping[str, str]) -> str:
    location = detail["loc"]
    dotted = ".".join(str(part) for part in location)
    above = [path for path in changed if f"{dotted}.".startswith(f"{path}.")]
    where = changed[above[-1]] if above else place.of(location)
    if above and dotted != above[-1]:
        where += f" {dotted}"
    return ": ".join(part for part in (where, _message(detail)) if part)


def _message(detail: ErrorDetails) -> str:
    """What is wrong, in our words where pydantic's would puzzle."""
    kind, location = detail["type"], detail["loc"]
    if kind == "extra_forbidden":
        return f"there is no such setting{suggesting.did_you_mean(location)}"
    if kind == "missing":
        return "is missing; it must be given"
    if kind == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    message = _NAME_RULE if location == ("name",) else _MESSAGES.get(kind, detail["msg"])
    given = repr(detail["input"])
    shown = given if len(given) <= _SHOWN else given[: _SHOWN - 3] + "..."
    return f"{message} (given: {shown})"
