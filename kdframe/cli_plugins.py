"""`kdframe plugins`: what is installed, what is broken, and the settings of a part."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from kdframe import plugins
from kdframe.errors import InputError
from kdframe.terminal import JsonOption, out, print_json, table

app = typer.Typer(no_args_is_help=True, help="Show what is installed.")


@app.command("list")
def plugins_list(*, as_json: JsonOption = False) -> None:
    """Every part that is installed, and every plugin that is broken."""
    rows = _rows(plugins.installed())
    if as_json:
        print_json(rows)
        return
    cells = [
        (
            str(row["slot"]),
            str(row["kind"]),
            f"{row['distribution']} {row['version']}",
            "yes" if row["available"] else "no",
        )
        for row in rows
    ]
    table(("slot", "kind", "distribution", "available"), cells)
    for row in rows:
        if row["reason"]:
            out(f"{row['kind']}: {row['reason']}")
    if not rows:
        out("no plugins are loaded")


@app.command("show")
def plugins_show(kind: str, *, as_json: JsonOption = False) -> None:
    """A part's settings: type, bounds, default."""
    found = plugins.installed()
    matches = [by_kind[kind] for by_kind in found.kinds.values() if kind in by_kind]
    for plugin in found.found:
        if plugin.broken and plugin.name == kind:
            raise InputError(f"plugin {plugin} {plugin.broken}")
    if not matches:
        names = sorted({name for by_kind in found.kinds.values() for name in by_kind})
        raise InputError(
            f"plugins show: no part {kind!r} is installed; there are: {', '.join(names) or 'none'}"
        )
    if as_json:
        schemas = [match.part.model_json_schema() for match in matches]
        print_json(schemas[0] if len(schemas) == 1 else schemas)
        return
    for match in matches:
        _show(match)


def _rows(found: plugins.Plugins) -> list[dict[str, Any]]:
    kinds = [kind for by_kind in found.kinds.values() for kind in by_kind.values()]
    rows = [_row(k.slot, k.kind, k.plugin, k.unavailable) for k in kinds]
    with_parts = {kind.plugin for kind in kinds}
    for plugin in found.found:
        if plugin.broken:
            rows.append(_row("", plugin.name, plugin, plugin.broken))
        elif plugin not in with_parts:
            rows.append(_row("observer", plugin.name, plugin, ""))
    return rows


def _row(slot: str, kind: str, plugin: plugins.Plugin, reason: str) -> dict[str, Any]:
    return {
        "slot": slot,
        "kind": kind,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "available": not reason,
        "reason": reason,
    }


def _show(match: plugins.Kind) -> None:
    out(f"{match.slot} {match.kind}, from {match.plugin}")
    out(inspect.getdoc(match.part) or "")
    if match.unavailable:
        out(f"not available: {match.unavailable}")
    schema = match.part.model_json_schema()
    rows = []
    for name, info in match.part.model_fields.items():
        if name != "kind":
            default = "required" if info.is_required() else repr(info.get_default())
            values = _values(schema["properties"].get(name, {}))
            rows.append((name, values, default, " ".join((info.description or "").split())))
    table(("setting", "values", "default", "meaning"), rows)


def _values(schema: dict[str, Any]) -> str:
    """Type and bounds of a setting in words."""
    if options := schema.get("enum"):
        return ", ".join(map(str, options))
    if options := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(_values(option) for option in options))
    if schema.get("type") == "array" and "items" in schema:
        return f"list of {_values(schema['items'])}"
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to"}
    words = [f"{word} {schema[key]:g}" for key, word in bounds.items() if key in schema]
    if "exclusiveMaximum" in schema:
        words.append(f"below {schema['exclusiveMaximum']:g}")
    name = schema.get("title") if "$ref" not in schema else schema["$ref"].rpartition("/")[2]
    kind = name if "properties" in schema else schema.get("type") or name
    return " ".join([str(schema.get("const") or kind or "any"), *words])
