"""`kdframe cache`: fill, show, check and repair teacher caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdframe import checks, reading
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

app = typer.Typer(
    no_args_is_help=True,
    help="Fill, show, check and repair teacher caches. `kdframe cache EXPERIMENT` fills one.",
)
RUNS = Path("runs")


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
    from kdframe import pipeline

    with where(RUNS, caches, quiet or as_json) as place:
        did, info = pipeline.fill_cache(loaded, place)
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
    loaded = reading.load(experiment, overrides or ())
    checks.refuse(checks.inputs(loaded))
    from kdframe import pipeline

    with where(RUNS, caches, quiet=True) as place:
        info = pipeline.cache_info(loaded, place)
    if as_json:
        print_json(info)
    else:
        for key, value in info.items():
            out(f"{key}: {value}")


@app.command("verify")
def cache_verify(
    experiment: File,
    overrides: Overrides = None,
    *,
    repair: Annotated[bool, typer.Option("--repair", help="Compute damaged rows again.")] = False,
    caches: CachesOption = Path("cache"),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read every row of the cache and check its sum."""
    loaded = reading.load(experiment, overrides or ())
    checks.refuse(checks.inputs(loaded))
    from kdframe import pipeline

    with where(RUNS, caches, quiet or as_json) as place:
        rows, bad = pipeline.verify_cache(loaded, place, repair=repair)
    if as_json:
        print_json({"rows": rows, "bad": [vars(one) for one in bad], "repaired": repair})
    else:
        for one in bad:
            out(f"{one.shard}: row {one.row}: {one.reason}{' (computed again)' if repair else ''}")
        out(f"{rows:,} rows, {len(bad)} damaged")
        if bad and not repair:
            out("--repair computes the damaged rows again")
    if bad and not repair:
        raise typer.Exit(3)


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
