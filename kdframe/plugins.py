"""Find plugins, check them one by one, and read a part's settings from plain data.

A broken plugin is remembered with its reason and named when it is missed; the others go on.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pluggy
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from kdframe import hooks
from kdframe.errors import InputError, PluginError
from kdframe.part import Part
from kdframe.parts import SLOTS, kind_of


@dataclass(frozen=True)
class Plugin:
    """An installed plugin and, if it could not be used, why."""

    name: str
    distribution: str
    version: str
    broken: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Kind:
    """A part that a plugin brings."""

    slot: str
    kind: str
    part: type[Part]
    plugin: Plugin

    @property
    def unavailable(self) -> str:
        """Why it cannot run here, with the remedy; empty if it can."""
        absent = [name for name in self.part.requires if not _importable(name)]
        if not absent:
            return ""
        return f"needs {', '.join(absent)}: {self.part.install or 'pip install ' + absent[0]}"


def _importable(name: str) -> bool:
    """Whether a module is there; it is not run."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # its package is missing, or half there
        return False


@dataclass(frozen=True)
class Plugins:
    """A set of plugins: a value, made once, never changed."""

    found: Sequence[Plugin] = ()
    kinds: Mapping[str, Mapping[str, Kind]] = field(default_factory=dict)
    manager: pluggy.PluginManager = field(
        default_factory=lambda: pluggy.PluginManager(hooks.GROUP), compare=False, repr=False
    )

    @classmethod
    def of(cls, **modules: object) -> Plugins:
        """Just these objects or modules as plugins, by name (for tests and notebooks)."""
        return _assemble(
            (Plugin(name, "given", "0"), lambda module=module: module)
            for name, module in modules.items()
        )

    def read(self, slot: str, value: object, context: Any = None) -> Part:
        """The part that `value` describes: a part itself, a kind, or settings with a `kind`.

        `context` is pydantic's: the folder that paths are relative to.

        Raises:
            ValueError: no such kind, or it cannot run here; says what is installed.
            pydantic.ValidationError: a setting is wrong.
        """
        if isinstance(value, SLOTS[slot]):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise ValueError(
                f"a {slot} is written as its kind, or as settings with a `kind`; "
                f"installed: {self._names(slot)}"
            )
        if absence := self.absence(slot, value["kind"]):
            raise ValueError(absence)
        found = self.kinds[slot][value["kind"]]
        return found.part.model_validate(dict(value), context=context)

    def absence(self, slot: str, kind: str) -> str:
        """Why a part cannot be used, with what is installed and the remedy; empty if it can."""
        found = self.kinds.get(slot, {}).get(kind)
        if found is None:
            return self._not_installed(slot, kind)
        return f"{slot} {kind!r} {found.unavailable}" if found.unavailable else ""

    def notify(self, hook: str, **event: Any) -> list[str]:
        """Tell every observer; returns a line for each that raised (it is dropped)."""
        complaints = []
        for implementation in list(getattr(self.manager.hook, hook).get_hookimpls()):
            wanted = {name: event[name] for name in implementation.argnames}
            try:
                implementation.function(**wanted)
            except Exception as error:
                name = implementation.plugin_name
                self.manager.unregister(name=name)
                complaints.append(f"observer {name} raised in {hook} and is dropped: {error!r}")
        return complaints

    def _names(self, slot: str) -> str:
        return ", ".join(sorted(self.kinds.get(slot, {}))) or "none"

    def _not_installed(self, slot: str, kind: str) -> str:
        near = difflib.get_close_matches(kind, self.kinds.get(slot, {}), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        broken = "".join(f"; plugin {p} is broken: {p.broken}" for p in self.found if p.broken)
        only = os.environ.get("KDFRAME_PLUGINS")
        left_out = "" if only is None else f" (only KDFRAME_PLUGINS={only!r} is loaded)"
        return (
            f"no {slot} of kind {kind!r} is installed (installed: {self._names(slot)}){hint}; "
            f"`pip install` the package that brings it{left_out}{broken}"
        )


def installed() -> Plugins:
    """The plugins of this environment, or the entry points that `KDFRAME_PLUGINS` names."""
    return _discover(os.environ.get("KDFRAME_PLUGINS"))


@functools.lru_cache(maxsize=4)
def _discover(only: str | None) -> Plugins:
    points = importlib.metadata.entry_points(group=hooks.GROUP)
    wanted = None if only is None else {name.strip() for name in only.split(",") if name.strip()}
    if wanted is not None and (absent := wanted - {point.name for point in points}):
        raise InputError(
            f"KDFRAME_PLUGINS: {', '.join(sorted(absent))}: no such plugin; "
            f"installed: {', '.join(sorted(point.name for point in points))}"
        )
    chosen = [point for point in points if wanted is None or point.name in wanted]
    # Ours first, so that a stranger who takes one of our kinds is the one who is named.
    chosen.sort(key=lambda point: (_distribution(point)[0] != "kdframe", point.name))
    return _assemble((Plugin(p.name, *_distribution(p)), p.load) for p in chosen)


def _distribution(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "0")


def _assemble(candidates: Iterable[tuple[Plugin, Any]]) -> Plugins:
    manager = pluggy.PluginManager(hooks.GROUP)
    manager.add_hookspecs(hooks)
    found: list[Plugin] = []
    kinds: dict[str, dict[str, Kind]] = {slot: {} for slot in SLOTS}
    for plugin, load in candidates:
        try:
            brought = _admit(manager, plugin, load())
            _refuse_taken(brought, kinds)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit in a plugin must not end the host
            if manager.has_plugin(plugin.name):
                manager.unregister(name=plugin.name)
            reason = str(error) if isinstance(error, PluginError) else _reason(error)
            found.append(Plugin(plugin.name, plugin.distribution, plugin.version, reason))
            continue
        found.append(plugin)
        for kind in brought:
            kinds[kind.slot][kind.kind] = kind
    frozen = MappingProxyType({slot: MappingProxyType(by) for slot, by in kinds.items()})
    return Plugins(tuple(found), frozen, manager)


def _reason(error: BaseException) -> str:
    return (
        f"could not be loaded: {type(error).__name__}: {error}; "
        "mend or `pip uninstall` it, or leave it out with KDFRAME_PLUGINS"
    )


def _admit(manager: pluggy.PluginManager, plugin: Plugin, module: object) -> list[Kind]:
    """Register one plugin and collect what it brings.

    Raises:
        PluginError: it breaks the hook contract.
    """
    needs = getattr(module, "CONTRACT", hooks.CONTRACT)
    if needs != hooks.CONTRACT:
        raise PluginError(
            f"was written for hook contract {needs}, this kdframe has {hooks.CONTRACT}; "
            f"install a version of {plugin.distribution} that fits"
        )
    _refuse_unknown_hooks(module)
    try:
        manager.register(module, name=plugin.name)
    except pluggy.PluginValidationError as error:
        detail = " ".join(str(error).split())
        raise PluginError(f"a hook does not fit its specification: {detail}") from error
    brought = []
    for hook, slot in hooks.COLLECTED.items():
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            if implementation.plugin_name == plugin.name:
                answer = implementation.function()
                brought += [_kind(plugin, hook, slot, part) for part in _sequence(hook, answer)]
    return brought


def _refuse_unknown_hooks(module: object) -> None:
    specified = {name for name, _ in inspect.getmembers(hooks, inspect.isfunction)}
    for name in dir(module):
        marked = getattr(getattr(module, name, None), f"{hooks.GROUP}_impl", None)
        if marked is not None and name not in specified:
            near = difflib.get_close_matches(name, specified, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PluginError(f"there is no hook {name}{hint}")


def _sequence(hook: str, answer: object) -> Sequence[Any]:
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        raise PluginError(f"{hook} must answer with a sequence of classes, not {answer!r}")
    return answer


def _kind(plugin: Plugin, hook: str, slot: str, part: object) -> Kind:
    base = SLOTS[slot]
    if not (isinstance(part, type) and issubclass(part, base)):
        raise PluginError(f"{hook}: {part!r} must derive from kdframe.api.{base.__name__}")
    kind = kind_of(part)
    if kind is None:
        raise PluginError(f'{hook}: {part.__name__} needs a line `kind: Literal["x"] = "x"`')
    return Kind(slot, kind, part, plugin)


def _refuse_taken(brought: Sequence[Kind], kinds: Mapping[str, Mapping[str, Kind]]) -> None:
    for new in brought:
        old = kinds[new.slot].get(new.kind)
        if old is not None:
            raise PluginError(
                f"{new.slot} kind {new.kind!r} is taken by plugin {old.plugin}; "
                "rename the kind, or load only one of the two with KDFRAME_PLUGINS"
            )


_AROUND: ContextVar[frozenset[type[Part]]] = ContextVar("_AROUND", default=frozenset())
"""The parts whose JSON schema is being made: a part may hold others of its own slot."""


class Slot:
    """Marks a field of an experiment (or of a part) where a plugin's part stands.

    `loss: Annotated[LossConfig, Slot("loss")]` accepts a part, its kind, or plain settings.
    """

    def __init__(self, slot: str) -> None:
        self.slot = slot

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Read plain data with the installed plugins; dump a part as plain data."""
        dump = core_schema.plain_serializer_function_ser_schema(
            lambda part, info: part.model_dump(mode=info.mode), info_arg=True
        )
        return core_schema.with_info_plain_validator_function(
            lambda value, info: installed().read(self.slot, value, info.context),
            serialization=dump,
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """One alternative for every installed kind, but those in which this field stands."""
        around = _AROUND.get()
        alternatives = []
        for kind in installed().kinds[self.slot].values():
            if kind.part not in around:
                before = _AROUND.set(around | {kind.part})
                alternatives.append(handler(kind.part.__pydantic_core_schema__))
                _AROUND.reset(before)
        return {"anyOf": alternatives}
