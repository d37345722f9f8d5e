"""kdframe on a terminal. Torch is imported only by the commands that work with models."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kdframe import (
    __version__,
    checks,
    cli_cache,
    cli_plan,
    cli_plugins,
    plugins,
    reading,
    runs,
    terminal,
)
from kdframe.checks import Guard
from kdframe.errors import InputError, KdframeError
from kdframe.experiment import Experiment
from kdframe.progress import Quiet
from kdframe.terminal import (
    CachesOption,
    File,
    JsonOption,
    NameOption,
    Overrides,
    QuietOption,
    RunsOption,
    out,
    print_json,
)

HELP = """\
Distil a language model: a large teacher reads your text once, its predictions are kept in a
cache, and a small student learns from them, is measured, and exported.

`kdframe check EXPERIMENT` says what a run would cost; `kdframe plan EXPERIMENT` which codec keeps
enough of your teacher; `kdframe run EXPERIMENT` does it all.
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_cache.app, name="cache")
app.add_typer(cli_plugins.app, name="plugins")

RUNS, CACHES = Path("runs"), Path("cache")
ResumeOption = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on where an earlier start stopped.")
]


# ------------------------------------------------------------------------------------ commands
@app.command()
def run(
    experiment: File,
    overrides: Overrides = None,
    *,
    runs: RunsOption = RUNS,
    caches: CachesOption = CACHES,
    name: NameOption = None,
    resume: ResumeOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run an experiment the whole way: cache, train, evaluate, export."""
    asked = _Asked("run", experiment, overrides or (), runs, caches, name)
    loaded, guards = asked.ready()
    _require_resumable(loaded, runs, resume)
    from kdframe import pipeline

    with asked.at_work(loaded, guards, quiet or as_json) as where:
        outcome = pipeline.run(loaded, where)
    if as_json:
        print_json({"folder": str(outcome.folder), **outcome.evaluation})
    else:
        terminal.show_evaluation(outcome.evaluation)
        out(f"figures: {outcome.folder / 'evaluation.json'}")
        out(f"student: {outcome.folder / 'student'}")


@app.command()
def check(
    experiment: File,
    overrides: Overrides = None,
    *,
    static: Annotated[bool, typer.Option("--static", help="Touch no model.")] = False,
    runs: RunsOption = RUNS,
    caches: CachesOption = CACHES,
    name: NameOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check an experiment, and measure on a sample what a run would cost."""
    asked = _Asked("run", experiment, overrides or (), runs, caches, name)
    estimate = None
    try:
        loaded = asked.load()
        guards = asked.guards(loaded)
        if not static and not _errors(guards):
            found = asked.measure(loaded, quiet or as_json)
            guards, estimate = [*guards, *found.guards], found.estimate
    except InputError as error:
        if not as_json:
            raise
        guards = [Guard("experiment", "error", fault) for fault in error.faults]
    if as_json:
        plain = None if estimate is None else vars(estimate)
        print_json({"guards": [vars(guard) for guard in guards], "estimate": plain})
    else:
        terminal.show_guards(guards)
        if estimate is not None:
            terminal.show_estimate(loaded, estimate)
    if _errors(guards):
        raise typer.Exit(2)


app.command()(cli_plan.plan)


@app.command()
def train(
    experiment: Annotated[Path | None, typer.Argument(help="An experiment.")] = None,
    overrides: Overrides = None,
    *,
    config: Annotated[Path | None, typer.Option("--config", help="The same, as an option.")] = None,
    runs: RunsOption = RUNS,
    caches: CachesOption = CACHES,
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
    asked = _Asked("train", path, changed, runs, caches, name)
    loaded, guards = asked.ready()
    from kdframe import pipeline

    with asked.at_work(loaded, guards, quiet) as where:
        folder = pipeline.train(loaded, where)
    out(f"student: {folder / 'student'}")


@app.command()
def evaluate(
    experiment: File,
    overrides: Overrides = None,
    *,
    runs: RunsOption = RUNS,
    caches: CachesOption = CACHES,
    name: NameOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure teacher and student of a run; trains the student if it is not yet."""
    asked = _Asked("evaluate", experiment, overrides or (), runs, caches, name)
    loaded, guards = asked.ready()
    from kdframe import pipeline

    with asked.at_work(loaded, guards, quiet or as_json) as where:
        outcome = pipeline.evaluate(loaded, where)
    if as_json:
        print_json(dict(outcome.evaluation))
    else:
        terminal.show_evaluation(outcome.evaluation)


@app.command()
def export(
    student: Annotated[Path | None, typer.Argument(help="A saved student, or a run.")] = None,
    *,
    to: Annotated[list[str] | None, typer.Option("--to", help="An exporter, such as hf.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="The student, as an option.")
    ] = None,
    quantize: Annotated[str | None, typer.Option("--quantize", help="int4 or int8.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="The folder to write.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a student in the formats that people run; each is loaded back and compared."""
    source = _student(model or student)
    if quantize is not None:
        _refuse_quantize(quantize, output)
    chosen = [_exporter(kind) for kind in (to or [_kind_of(output) or "hf"])]
    target = output or source.parent / "exports"
    runs.require_folder(target, "--output")
    from kdframe import exporting, pipeline

    with terminal.where(RUNS, CACHES, quiet or as_json) as where:
        reports = pipeline.export_folder(source, chosen, target, where.progress)
    if as_json:
        print_json([exporting.plain(report) for report in reports])
    else:
        for report in reports:
            place = target / report.kind
            out(f"{report.kind}: {report.status}, {terminal.size(report.bytes)} in {place}")


@app.command()
def schema() -> None:
    """The JSON Schema of an experiment, with every installed plugin in it."""
    print_json(Experiment.model_json_schema())


# ------------------------------------------------------------------------------------- helpers
@dataclass(frozen=True)
class _Asked:
    """What the user typed."""

    verb: str
    path: Path
    overrides: Sequence[str]
    runs: Path
    caches: Path
    name: str | None

    def load(self) -> Experiment:
        with contextlib.redirect_stdout(sys.stderr):  # a .py file may print
            return reading.load(self.path, self.overrides, name=self.name)

    def guards(self, loaded: Experiment) -> list[Guard]:
        """Every static check."""
        return [
            *checks.static(loaded, self.runs, self.command()),
            *checks.folders(caches=self.caches),
        ]

    def ready(self) -> tuple[Experiment, list[Guard]]:
        """The experiment, and the checks that it passed.

        Raises:
            InputError: a check is an error.
        """
        loaded = self.load()
        guards = self.guards(loaded)
        checks.refuse(guards)
        return loaded, guards

    def command(self) -> str:
        """The command without a name."""
        words = ["kdframe", self.verb, str(self.path), *self.overrides]
        options = (("--runs", self.runs, RUNS), ("--caches", self.caches, CACHES))
        words += [w for name, is_, was in options if is_ != was for w in (name, str(is_))]
        return shlex.join(words)

    def measure(self, loaded: Experiment, quiet: bool) -> Any:
        """The costs of a run."""
        from kdframe import planning
        from kdframe.materials import Materials

        with contextlib.redirect_stdout(sys.stderr):
            progress = Quiet() if quiet else terminal.progress()
            return planning.measure(Materials(loaded, self.caches, progress))

    @contextlib.contextmanager
    def at_work(self, loaded: Experiment, guards: Sequence[Guard], quiet: bool) -> Any:
        """Where to work: after a header, and when no other process works on the run."""
        with terminal.where(self.runs, self.caches, quiet) as where:
            say = where.progress.say
            for guard in guards:
                say(f"{guard.level}: {guard.evidence}" + f" ({guard.remedy})" * bool(guard.remedy))
            student = loaded.student.model or "cut from the teacher's layers"
            say(f"run {loaded.name} in {self.runs / loaded.name}")
            say(f"teacher: {loaded.teacher.model}")
            say(f"student: {student}{' with LoRA' if loaded.student.lora else ''}")
            say(f"loss: {loaded.loss.describe()}")
            runs.wait_for_others(loaded, self.runs, say, where.stop)
            yield where


def _errors(guards: Sequence[Guard]) -> bool:
    return any(guard.level == "error" for guard in guards)


def _student(source: Path | None) -> Path:
    """The folder of a saved student."""
    if source is None:
        raise InputError("export: name a saved student or a run: kdframe export STUDENT --to hf")
    if not source.is_dir():
        raise InputError(f"export {source}: no such folder; name a saved student or a run")
    if (source / "student").is_dir():
        return source / "student"
    if (source / runs.EXPERIMENT).is_file():
        raise InputError(
            f"export {source}: the run has no student yet; "
            f"`kdframe train {source / runs.EXPERIMENT} --runs {source.parent}` makes one"
        )
    if not (source / "config.json").is_file():
        raise InputError(
            f"export {source}: not a saved model (no config.json); name a saved student or a run"
        )
    return source


def _exporter(kind: str) -> Any:
    try:
        return plugins.installed().read("exporter", kind)
    except ValueError as error:
        raise InputError(f"export --to {kind}: {error}") from error


def _kind_of(output: Path | None) -> str:
    """The format that an output's ending names."""
    return output.suffix.lstrip(".") if output is not None else ""


def _refuse_quantize(quantize: str, output: Path | None) -> None:
    kind = _kind_of(output) or "gguf"
    absence = plugins.installed().absence("exporter", kind)
    raise InputError(
        f"export --quantize {quantize}: "
        + (absence or f"exporter {kind!r} takes its settings from an experiment's `export`")
        + "; without --quantize and with a folder as --output, --to hf writes a Hugging Face folder"
    )


def _require_resumable(experiment: Experiment, folder: Path, resume: bool) -> None:
    if not resume and (folder / experiment.name).exists():
        raise InputError(
            f"{folder / experiment.name}: there is such a run already; go on with it without "
            f"--no-resume, or begin another: --name {runs.free_name(experiment, folder)}"
        )


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """The command `kdframe`. Exit codes: 0 well, 2 the user's input, 3 damaged, 130 interrupted."""
    logging.captureWarnings(True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks of kernels on import
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; ours are rich's
    words = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=cli_cache.fill_by_default(words), prog_name="kdframe")
    except KdframeError as error:
        for line in str(error).splitlines():
            terminal.err(line)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        terminal.err(
            f"{error.filename or 'the disk'}: no space left; free some and start again: what is "
            "done stays done"
        )
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
