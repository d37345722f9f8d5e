"""kdframe on a terminal. Torch is imported only by the commands that work with models."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kdframe import __version__, checks, plugins, reading
from kdframe.errors import InputError, KdframeError
from kdframe.experiment import Experiment
from kdframe.progress import Log, Progress, Quiet, Terminal

if TYPE_CHECKING:
    from kdframe.pipeline import Where
    from kdframe.planning import Check


app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
cache_app = typer.Typer(no_args_is_help=True, help="Fill, show, check and repair teacher caches.")
plugins_app = typer.Typer(no_args_is_help=True, help="Show what is installed.")
app.add_typer(cache_app, name="cache")
app.add_typer(plugins_app, name="plugins")

File = Annotated[
    Path, typer.Argument(help="An experiment: .yaml, or .py that defines `experiment`.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changed settings, such as loss.alpha=0.3.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="The folder of all runs.")]
CachesOption = Annotated[Path, typer.Option("--caches", help="The folder of all teacher caches.")]
NameOption = Annotated[str | None, typer.Option("--name", help="Another name for the run.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on where an earlier start stopped.")
]


# ------------------------------------------------------------------------------------ commands
@app.command()
def run(
    experiment: File,
    overrides: Overrides = None,
    *,
    runs: RunsOption = Path("runs"),
    caches: CachesOption = Path("cache"),
    name: NameOption = None,
    resume: ResumeOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run an experiment the whole way: cache, train, evaluate, export."""
    loaded = reading.load(experiment, overrides or (), name=name)
    _require_resumable(loaded, runs, resume)
    checks.require_static(loaded, runs)
    from kdframe import pipeline

    with _where(runs, caches, quiet or as_json) as where:
        outcome = pipeline.run(loaded, where)
    if as_json:
        _print_json({"folder": str(outcome.folder), **outcome.evaluation})
    else:
        _show_evaluation(outcome.evaluation)
        _out(f"student: {outcome.folder / 'student'}")


@app.command()
def check(
    experiment: File,
    overrides: Overrides = None,
    *,
    static: Annotated[bool, typer.Option("--static", help="Touch no model.")] = False,
    runs: RunsOption = Path("runs"),
    caches: CachesOption = Path("cache"),
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an experiment, and measure on a sample what a run would cost."""
    loaded = reading.load(experiment, overrides or (), name=name)
    guards = checks.static(loaded, runs)
    if static or any(guard.level == "error" for guard in guards):
        _show_guards(guards, as_json)
        if as_json:
            _print_json({"guards": [vars(guard) for guard in guards], "estimate": None})
    else:
        from kdframe import planning
        from kdframe.materials import Materials

        found = planning.measure(Materials(loaded, caches, Quiet() if as_json else _progress()))
        guards = [*guards, *found.guards]
        found = planning.Check(guards, found.estimate)
        _show_guards(guards, as_json)
        if as_json:
            _print_json(found.plain())
        else:
            _show_estimate(loaded, found)
    if any(guard.level == "error" for guard in guards):
        raise typer.Exit(2)


@app.command()
def train(
    experiment: Annotated[Path | None, typer.Argument(help="An experiment.")] = None,
    overrides: Overrides = None,
    *,
    config: Annotated[Path | None, typer.Option("--config", help="The same, as an option.")] = None,
    runs: RunsOption = Path("runs"),
    caches: CachesOption = Path("cache"),
    name: NameOption = None,
    quiet: QuietOption = False,
) -> None:
    """Fill the cache where it is not full, and train the student."""
    changed = list(overrides or ())
    if config is not None and experiment is not None:
        changed.insert(0, str(experiment))
    path = config or experiment
    if path is None:
        raise InputError("train: name an experiment: kdframe train EXPERIMENT")
    loaded = reading.load(path, changed, name=name)
    checks.require_static(loaded, runs)
    from kdframe import pipeline

    with _where(runs, caches, quiet) as where:
        folder = pipeline.train(loaded, where)
    _out(f"student: {folder / 'student'}")


@app.command()
def evaluate(
    experiment: File,
    overrides: Overrides = None,
    *,
    runs: RunsOption = Path("runs"),
    caches: CachesOption = Path("cache"),
    name: NameOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure teacher and student of a run; trains the student if it is not yet."""
    loaded = reading.load(experiment, overrides or (), name=name)
    checks.require_static(loaded, runs)
    from kdframe import pipeline

    with _where(runs, caches, quiet or as_json) as where:
        outcome = pipeline.evaluate(loaded, where)
    if as_json:
        _print_json(dict(outcome.evaluation))
    else:
        _show_evaluation(outcome.evaluation)


@app.command()
def export(
    student: Annotated[Path | None, typer.Argument(help="A saved student, or a run.")] = None,
    *,
    to: Annotated[list[str] | None, typer.Option("--to", help="An exporter, such as hf.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="The student, as an option.")
    ] = None,
    quantize: Annotated[str | None, typer.Option("--quantize", help="int4 or int8.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Where to write.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a student in the formats that people run; each is loaded back and compared."""
    source = model or student
    if source is None:
        raise InputError("export: name a saved student: kdframe export STUDENT --to hf")
    if quantize is not None:
        _refuse_quantize(quantize, output)
    chosen = [_exporter(kind) for kind in (to or ["hf"])]
    from kdframe import pipeline

    if (source / "student").is_dir():
        source = source / "student"
    out = output or source.parent / "exports"
    reports = pipeline.export_folder(source, chosen, out, _progress(quiet or as_json))
    if as_json:
        from kdframe import exporting

        _print_json([exporting.plain(report) for report in reports])
    else:
        for report in reports:
            _out(f"{report.kind}: {report.status}, {report.bytes:,} bytes in {out / report.kind}")


@app.command()
def schema() -> None:
    """The JSON Schema of an experiment, with every installed plugin in it."""
    _print_json(Experiment.model_json_schema())


@cache_app.command("fill")
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
    if experiment is not None:
        loaded = reading.load(experiment, overrides or ())
    else:
        loaded = _cache_alone(teacher, dataset, output)
    _refuse([g.evidence for g in checks.inputs(loaded) if g.level == "error"])
    from kdframe import pipeline

    with _where(Path("runs"), caches, quiet or as_json) as where:
        did, info = pipeline.fill_cache(loaded, where)
    if as_json:
        _print_json({"computed": did, **info})
    else:
        _out(f"cache: {info['rows']:,} rows, {info['bytes']:,} bytes in {info['folder']}")


@cache_app.command("info")
def cache_info(
    experiment: File,
    overrides: Overrides = None,
    *,
    caches: CachesOption = Path("cache"),
    as_json: JsonOption = False,
) -> None:
    """What an experiment's cache holds."""
    from kdframe import pipeline

    with _where(Path("runs"), caches, True) as where:
        info = pipeline.cache_info(reading.load(experiment, overrides or ()), where)
    if as_json:
        _print_json(info)
    else:
        for key, value in info.items():
            _out(f"{key}: {value}")


@cache_app.command("verify")
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
    from kdframe import pipeline

    with _where(Path("runs"), caches, quiet or as_json) as where:
        rows, bad = pipeline.verify_cache(
            reading.load(experiment, overrides or ()), where, repair=repair
        )
    if as_json:
        _print_json({"rows": rows, "bad": [vars(one) for one in bad], "repaired": repair})
    else:
        for one in bad:
            _out(f"{one.shard}: row {one.row}: {one.reason}{' (computed again)' if repair else ''}")
        _out(f"{rows:,} rows, {len(bad)} damaged")
    if bad and not repair:
        raise typer.Exit(3)


@plugins_app.command("list")
def plugins_list(*, as_json: JsonOption = False) -> None:
    """Every part that is installed, and every plugin that is broken."""
    found = plugins.installed()
    rows = [
        {
            "slot": kind.slot,
            "kind": kind.kind,
            "distribution": kind.plugin.distribution,
            "version": kind.plugin.version,
            "available": not kind.unavailable,
            "reason": kind.unavailable,
        }
        for by_kind in found.kinds.values()
        for kind in by_kind.values()
    ]
    rows += [
        {
            "slot": "",
            "kind": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "available": False,
            "reason": plugin.broken,
        }
        for plugin in found.found
        if plugin.broken
    ]
    if as_json:
        _print_json(rows)
        return
    table = Table("slot", "kind", "distribution", "available", "reason")
    for row in rows:
        available = "yes" if row["available"] else "no"
        distribution = f"{row['distribution']} {row['version']}"
        table.add_row(
            str(row["slot"]), str(row["kind"]), distribution, available, str(row["reason"])
        )
    Console().print(table)


@plugins_app.command("show")
def plugins_show(kind: str, *, as_json: JsonOption = False) -> None:
    """A part's settings: type, default, bounds."""
    matches = [by_kind[kind] for by_kind in plugins.installed().kinds.values() if kind in by_kind]
    if not matches:
        names = sorted(k for by in plugins.installed().kinds.values() for k in by)
        raise InputError(f"plugins show: no part {kind!r}; installed: {', '.join(names)}")
    for match in matches:
        if as_json:
            _print_json(match.part.model_json_schema())
            continue
        _out(f"{match.slot} {match.kind}, from {match.plugin}")
        _out((match.part.__doc__ or "").strip())
        if match.unavailable:
            _out(f"not available: {match.unavailable}")
        table = Table("setting", "default", "meaning")
        for name, info in match.part.model_fields.items():
            if name != "kind":
                table.add_row(name, repr(info.default), info.description or "")
        Console().print(table)


# ------------------------------------------------------------------------------------- helpers
def _cache_alone(teacher: str | None, dataset: str | None, output: Path | None) -> Experiment:
    """The guide's `cache --teacher … --dataset … --output …` as an experiment."""
    if not (teacher and dataset and output):
        raise InputError("cache: name an experiment, or --teacher, --dataset and --output together")
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


def _exporter(kind: str) -> Any:
    try:
        return plugins.installed().read("exporter", kind)
    except ValueError as error:
        raise InputError(f"export --to {kind}: {error}") from error


def _refuse_quantize(quantize: str, output: Path | None) -> None:
    kind = (output.suffix.lstrip(".") if output else "") or "gguf"
    installed = plugins.installed().kinds["exporter"]
    raise InputError(
        f"export --quantize {quantize}: no exporter of kind {kind!r} that quantises is installed "
        f"(installed: {', '.join(sorted(installed))}); without --quantize, --to hf writes a plain "
        "Hugging Face folder"
    )


def _require_resumable(experiment: Experiment, runs: Path, resume: bool) -> None:
    folder = runs / experiment.name
    if not resume and folder.exists():
        raise InputError(f"{folder}: there is such a run already; take another name with --name")


def _refuse(faults: list[str]) -> None:
    if faults:
        raise InputError(*faults)


def _progress(quiet: bool = False) -> Progress:
    if quiet:
        return Quiet()
    console = Console(stderr=True)
    return Terminal(console) if console.is_terminal else Log()


@contextmanager
def _where(runs: Path, caches: Path, quiet: bool) -> Iterator[Where]:
    """Where a command works; Ctrl-C and SIGTERM end it at the next step, a second one at once."""
    from kdframe.pipeline import Where

    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            os._exit(130)
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield Where(runs, caches, _progress(quiet), lambda: bool(asked))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _out(text: str) -> None:
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def _show_guards(guards: list[checks.Guard], as_json: bool) -> None:
    for guard in () if as_json else guards:
        remedy = f" ({guard.remedy})" if guard.remedy else ""
        _out(f"{guard.level}: {guard.evidence}{remedy}")
    if not as_json and not guards:
        _out("static checks: nothing to say")


def _show_estimate(experiment: Experiment, found: Check) -> None:
    estimate = found.estimate
    if estimate is None:
        return
    _out(f"tokens: {estimate.tokens:,} (measured on {estimate.sample_tokens:,})")
    for kind, size in estimate.cache_bytes_by_codec.items():
        mark = " (this experiment)" if kind == experiment.cache.codec.kind else ""
        _out(f"cache with codec {kind}: {size:,} bytes{mark}")
    _out(f"peak memory: {estimate.peak_memory_bytes / 2**30:.1f} GiB")
    _out(f"time: {estimate.seconds / 60:.1f} minutes")


def _show_evaluation(whole: Any) -> None:
    table = Table("set", "metric", "teacher", "student before", "student", "better")
    for name, metrics in whole["sets"].items():
        for metric, entry in metrics.items():
            cells = [
                "" if entry.get(role) is None else f"{entry[role]:.4f}"
                for role in ("teacher", "student_before", "student")
            ]
            table.add_row(name, metric, *cells, entry["better"])
    Console().print(table)
    for kind, reason in whole.get("unavailable", {}).items():
        _out(f"{kind}: unavailable: {reason}")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        _out(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """The command `kdframe`. Exit codes: 0 well, 2 the user's input, 3 damaged, 130 interrupted."""
    logging.captureWarnings(True)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; ours are rich's
    try:
        app(args=_fill_by_default(sys.argv[1:] if arguments is None else arguments))
    except KdframeError as error:
        for line in str(error).splitlines():
            Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _fill_by_default(arguments: list[str]) -> list[str]:
    """`kdframe cache EXPERIMENT` is `kdframe cache fill EXPERIMENT`."""
    known = {command.name for command in cache_app.registered_commands} | {"--help"}
    if len(arguments) > 1 and arguments[0] == "cache" and arguments[1] not in known:
        return ["cache", "fill", *arguments[1:]]
    return arguments
