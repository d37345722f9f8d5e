"""`kdframe cache`: fill, show, check, repair, import and merge teacher caches."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdframe import checks, durable, reading
from kdframe.cache_parts import BadRow
from kdframe.errors import InputError
from kdframe.experiment import Experiment
from kdframe.terminal import (
    CachesOption,
    File,
    JsonOption,
    Overrides,
    QuietOption,
    out,
    print_json,
    size,
    where,
)

if TYPE_CHECKING:
    from kdframe.cache_commands import Verified

app = typer.Typer(
    no_args_is_help=True,
    help="Fill, check, import and merge teacher caches. `kdframe cache EXPERIMENT` fills one.",
)
RUNS = Path("runs")
_SETTING = re.compile(r"[A-Za-z_][\w.]*=")


def fill_by_default(arguments: list[str]) -> list[str]:
    """`kdframe cache EXPERIMENT` is `kdframe cache fill EXPERIMENT`."""
    known = {command.name for command in app.registered_commands} | {"--help", "-h"}
    if len(arguments) > 1 and arguments[0] == "cache" and arguments[1] not in known:
        return ["cache", "fill", *arguments[1:]]
    return arguments


@app.command("fill")
def cache_fill(
    experiment: Annotated[Path | None, typer.Argument(help="An experiment.")] = None,
    overrides: Overrides = None,
    *,
    teacher: Annotated[str | None, typer.Option("--teacher", help="The teacher's model.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="The training rows.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="The cache's folder.")] = None,
    caches: CachesOption = Path("cache"),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Have the teacher read every row that the cache does not hold."""
    loaded = _wanted(experiment, overrides, teacher, dataset, output)
    checks.refuse([*checks.inputs(loaded), *checks.folders(caches=caches)])
    from kdframe import cache_commands

    with where(RUNS, caches, quiet or as_json) as place:
        did, info = cache_commands.fill_cache(loaded, place)
    if as_json:
        print_json({"computed": did, **info})
    else:
        out(f"computed now: {did['rows']:,.0f} rows, {did['tokens']:,.0f} tokens")
        out(f"cache: {info['rows']:,} rows, {size(info['bytes'])} in {info['folder']}")


@app.command("info")
def cache_info(
    experiment: File,
    overrides: Overrides = None,
    *,
    caches: CachesOption = Path("cache"),
    as_json: JsonOption = False,
) -> None:
    """What an experiment's cache holds."""
    loaded = _checked(experiment, overrides or ())
    from kdframe import cache_commands

    with where(RUNS, caches, quiet=True) as place:
        info = cache_commands.cache_info(loaded, place)
    if as_json:
        print_json(info)
    else:
        _show_info(info)


@app.command("verify")
def cache_verify(
    experiment: File,
    overrides: Overrides = None,
    *,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            min=0,
            help="Rows that the teacher reads again (32; of an imported cache 0): 0 is checksums "
            "alone.",
        ),
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Compute bad rows again.")] = False,
    caches: CachesOption = Path("cache"),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check every row's checksum, and have the teacher read some rows again."""
    loaded = _checked(experiment, overrides or ())
    from kdframe import cache_commands

    with where(RUNS, caches, quiet or as_json) as place:
        found = cache_commands.verify_cache(loaded, place, repair=repair, rows=rows)
    if as_json:
        again = {name: x for name, x in asdict(found.recomputed).items() if name != "bad"}
        bad = [vars(one) for one in found.bad]
        print_json({"rows": found.rows, "bad": bad, "repaired": repair, "recomputed": again})
    else:
        _show_verified(found, repair)
    if found.bad and not repair:
        raise typer.Exit(3)


@app.command("missing")
def cache_missing(
    experiment: File,
    overrides: Overrides = None,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", help="A .jsonl file; by default standard output.")
    ] = None,
    caches: CachesOption = Path("cache"),
) -> None:
    """Write the rows that the cache lacks: token ids, and the positions that count."""
    loaded = _checked(experiment, overrides or ())
    from kdframe import cache_commands

    with where(RUNS, caches, quiet=True) as place:
        rows = cache_commands.missing_rows(loaded, place)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if output is None:
        sys.stdout.write(lines)
    else:
        durable.write_text(output, lines)
        out(f"{len(rows):,} rows in {output}")


@app.command("import")
def cache_import(
    experiment: File,
    given: Annotated[
        list[str],
        typer.Argument(help=".jsonl or .parquet files; changed settings.", metavar="FILE..."),
    ],
    *,
    keep_all: Annotated[
        bool, typer.Option("--all", help="Keep rows and positions that the data does not count.")
    ] = False,
    caches: CachesOption = Path("cache"),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write top-k log-probabilities that were computed elsewhere into the cache."""
    files, overrides = _parted(given, "a .jsonl or .parquet file")
    loaded = _checked(experiment, overrides)
    from kdframe import cache_commands

    with where(RUNS, caches, quiet or as_json) as place:
        did = cache_commands.import_files(loaded, place, files, keep_all=keep_all)
    if as_json:
        print_json(asdict(did))
        return
    out(f"imported: {did.rows:,} rows, {did.positions:,} positions")
    out(f"already there: {did.already:,} rows")
    left = "kept" if keep_all else "left out; --all keeps them"
    out(f"not rows of the data: {did.strangers:,}" + f" ({left})" * bool(did.strangers))
    out(f"rows of the data that are still missing: {did.missing:,}")


@app.command("merge")
def cache_merge(
    experiment: File,
    given: Annotated[
        list[str],
        typer.Argument(help="Folders of other caches; changed settings.", metavar="FOLDER..."),
    ],
    *,
    caches: CachesOption = Path("cache"),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy the rows of other caches of the same identity into the experiment's cache."""
    folders, overrides = _parted(given, "the folder of a cache")
    loaded = _checked(experiment, overrides)
    from kdframe import cache_commands

    with where(RUNS, caches, quiet or as_json) as place:
        merged = cache_commands.merge_caches(loaded, place, folders)
    if as_json:
        print_json([asdict(one) for one in merged])
    else:
        for one in merged:
            _show_bad(one.damaged, "not copied")
            out(
                f"{one.folder}: {one.copied:,} rows copied, {one.already:,} already there, "
                f"{len(one.damaged):,} damaged"
            )
    if any(one.damaged for one in merged):
        raise typer.Exit(3)


def _checked(experiment: Path, overrides: Sequence[str]) -> Experiment:
    loaded = reading.load(experiment, overrides)
    checks.refuse(checks.inputs(loaded))
    return loaded


def _parted(given: Sequence[str], what: str) -> tuple[list[Path], list[str]]:
    """Paths, and changed settings: what has the form `a.b=value` and is no path that exists."""
    settings = [x for x in given if _SETTING.match(x) and not Path(x).exists()]
    paths = [Path(x) for x in given if x not in settings]
    if not paths:
        raise InputError(f"cache: name {what}")
    return paths, settings


def _show_info(info: dict[str, Any]) -> None:
    codec = info.pop("codec")
    settings = ", ".join(
        f"{name} {x}" for name, x in codec.items() if name != "kind" and x is not None
    )
    out(f"codec: {codec['kind']}" + f" ({settings})" * bool(settings))
    for name, value in info.pop("identity").items():
        if name != "codec":
            out(f"{name}: {value}")
    for name, value in info.items():
        shown = size(value) if name == "bytes" else _number(value)
        out(f"{name.replace('_', ' ')}: {shown}")


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _show_verified(found: Verified, repair: bool) -> None:
    _show_bad(found.bad, "computed again" if repair else "")
    again = found.recomputed
    if again.rows:
        out(
            f"{again.rows:,} rows read again: the largest difference is "
            f"{again.largest.log_prob:.2g} nats (noise floor {again.noise.log_prob:.2g}, codec's "
            f"step {again.step.log_prob:.2g}, limit {again.limit.log_prob:.2g})"
        )
    out(f"{found.rows:,} rows, {len(found.bad)} damaged")
    if found.bad and not repair:
        out("--repair computes the damaged rows again")


def _show_bad(bad: Sequence[BadRow], note: str) -> None:
    for one in bad:
        out(f"{one.shard}: row {one.row}: {one.reason}" + f" ({note})" * bool(note))


def _wanted(
    experiment: Path | None,
    overrides: list[str] | None,
    teacher: str | None,
    dataset: str | None,
    output: Path | None,
) -> Experiment:
    """An experiment's file, or `--teacher ... --dataset ... --output ...` as an experiment."""
    given = {"--teacher": teacher, "--dataset": dataset, "--output": output}
    absent = [name for name, value in given.items() if value is None]
    if experiment is not None:
        if len(absent) < len(given):
            named = ", ".join(name for name in given if name not in absent)
            raise InputError(f"cache: give an experiment, or {named}, not both")
        return reading.load(experiment, overrides or ())
    if absent:
        raise InputError(
            f"cache: {', '.join(absent)} missing; give an experiment's file, or --teacher, "
            "--dataset and --output together"
        )
    return reading.from_plain(
        {
            "name": "cache",
            "teacher": teacher,
            "student": teacher,
            "data": {"train": dataset},
            "cache": {"kind": "mmap", "folder": str(output)},
        },
        base=Path.cwd(),
    )
