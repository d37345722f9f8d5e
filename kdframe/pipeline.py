"""The whole way, and each stage alone: cache, train, evaluate, export.

Every stage first looks whether its work is already done, so a second start goes on where the
first one stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdframe import cache_commands, checks, data, durable, evaluation, exporting, models, tokenizers
from kdframe import training as loop
from kdframe.errors import InputError, Interrupted
from kdframe.experiment import Experiment, Student
from kdframe.materials import Materials
from kdframe.model_card import model_card
from kdframe.packing import check_packing
from kdframe.parts import ExportContext, ExporterConfig, Role
from kdframe.plugins import installed
from kdframe.progress import Progress
from kdframe.runs import RunFolder
from kdframe.runtime import InProcess, Line
from kdframe.where import Where

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Outcome", "Where", "evaluate", "export_folder", "run", "train"]

PROBE_ROWS = 4
PROBE_TOKENS = 128


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: its folder and the content of its `evaluation.json`."""

    folder: Path
    evaluation: Mapping[str, Any]


def run(experiment: Experiment, where: Where | None = None) -> Outcome:
    """Everything from the data to the exported student; finds what is already done.

    Raises:
        InputError: the experiment cannot run as it is; every fault is named.
        DamagedError: something on the disk is damaged.
        Interrupted: asked to stop; run it again to go on.
    """
    where = where or Where()
    with _opened(experiment, where) as stages:
        if stages.complete():
            where.progress.say(f"{stages.folder.path}: everything is done")
        else:
            _whole_way(stages)
        return _outcome(stages.folder)


def train(experiment: Experiment, where: Where) -> Path:
    """Fill the cache and train the student; the run's folder."""
    with _opened(experiment, where) as stages:
        stages.cache()
        stages.train()
        return stages.folder.path


def evaluate(experiment: Experiment, where: Where) -> Outcome:
    """Measure teacher and student; trains the student first if it is not yet."""
    with _opened(experiment, where) as stages:
        stages.cache()
        stages.evaluate("teacher")
        stages.evaluate("student_before")
        stages.train()
        stages.evaluate("student")
        return _outcome(stages.folder)


@contextlib.contextmanager
def _opened(experiment: Experiment, where: Where) -> Iterator[Stages]:
    """A run's stages, with its folder claimed and locked."""
    checks.require_static(experiment, where.runs)
    with durable.lock(where.runs.resolve() / f".{experiment.name}.lock"):
        stages = Stages(experiment, where, RunFolder(experiment, where.runs))
        stages.refuse_other_data(data.fingerprint(experiment.data))
        yield stages


def _whole_way(stages: Stages) -> None:
    tell = functools.partial(_tell, stages.where.progress)
    tell("kdframe_run_started", run=stages.folder.path)
    status = "failed"
    try:
        stages.cache()
        stages.evaluate("teacher")
        stages.evaluate("student_before")
        stages.train()
        stages.evaluate("student")
        stages.export()
        stages.folder.note(status="done")
        status = "done"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        tell("kdframe_run_finished", run=stages.folder.path, status=status)


def _outcome(folder: RunFolder) -> Outcome:
    path = folder.path / "evaluation.json"
    return Outcome(folder.path, json.loads(path.read_text(encoding="utf-8")))


def _tell(progress: Progress, hook: str, **event: Any) -> None:
    for complaint in installed().notify(hook, **event):
        progress.say(complaint)


class Stages:
    """The stages of one run."""

    def __init__(self, experiment: Experiment, where: Where, folder: RunFolder) -> None:
        self.experiment, self.where, self.folder = experiment, where, folder
        self.progress = where.progress
        self.materials = Materials(experiment, where.caches, where.progress)

    def refuse_other_data(self, content: str) -> None:
        """A run's rows must not change under it.

        Raises:
            InputError: the files hold other content than when the run began.
        """
        before = self.folder.manifest.get("data")
        if before not in (None, content):
            raise InputError(
                f"{self.folder.path}: the data's files changed since this run began; "
                "take another name with --name (the teacher cache is kept: only rows that "
                "changed are computed)"
            )
        self.folder.note(data=content)

    def complete(self) -> bool:
        """Whether the whole way is done, and what it made is still there."""
        made = [
            "student",
            "evaluation.json",
            *(f"exports/{c.kind}" for c in self.experiment.export),
        ]
        there = all((self.folder.path / name).exists() for name in made)
        return there and self.folder.manifest["status"] == "done"

    # ------------------------------------------------------------------------------- stages
    def cache(self) -> dict[str, float]:
        """Have the teacher read every row that the cache does not hold."""
        dataset = self.materials.dataset
        self.folder.note(counts={name: c.plain() for name, c in dataset.counts.items()})
        did = cache_commands.fill(self.materials, self.where)
        info = cache_commands.info(self.materials)
        self.folder.note(cache={"folder": info["folder"], "bytes": info["bytes"]})
        if did["rows"] or self.folder.done("cache") is None:
            self.folder.finish("cache", did, did["seconds"])
        return did

    def evaluate(self, role: Role) -> None:
        """Measure one of the models; `evaluation.json` holds all that was measured so far.

        A teacher whose predictions are imported is not measured: it may not be here.
        """
        absent = role == "teacher" and self.experiment.cache.imported is not None
        if not absent and self.folder.done(f"evaluate {role}") is None:
            began = time.monotonic()
            figures = evaluation.evaluate(
                role,
                self._model(role),
                self.materials.held_out,
                self._setting(),
                cache=self.materials.store,
                progress=self.progress,
            )
            note = evaluation.plain(figures)
            self.folder.finish(f"evaluate {role}", note, time.monotonic() - began)
        roles: tuple[Role, ...] = ("teacher", "student_before", "student")
        found = {r: self.folder.done(f"evaluate {r}") for r in roles}
        whole = evaluation.combine(
            {r: figures for r, figures in found.items() if figures is not None},
            self.experiment.evaluation.when_available,
        )
        durable.write_json(self.folder.path / "evaluation.json", whole)

    def train(self) -> None:
        """Train the student and save it, plain, in `student/`."""
        if self.folder.done("train") is not None and (self.folder.path / "student").exists():
            return
        student = self._start()
        self.materials.forget_teacher()
        lesson = loop.Lesson(
            student=student,
            loss=self.experiment.loss,
            train=self.materials.dataset.train,
            validation=self.materials.dataset.validation,
            cache=self.materials.store,
            settings=self.experiment.training,
            packing=self._packing(student),
            pad_id=self.materials.pad_id,
            batch_tokens=self.experiment.evaluation.batch_tokens,
            folder=self.folder.path,
        )
        result = loop.train(lesson, self._runtime(), self.progress)
        path = self.folder.path
        with durable.folder(path / "student") as aside:
            if self.experiment.student.lora is None:
                models.save(student, self.materials.tokenizer, aside)
            else:
                with durable.folder(path / "student-adapter") as adapter:
                    models.save(student, self.materials.tokenizer, aside, adapter)
        self.folder.finish("train", vars(result), result.seconds)

    def export(self) -> None:
        """Put the card into `student/` and write the experiment's export formats."""
        student = self.folder.path / "student"
        context = self._export_context()
        durable.write_text(student / "README.md", context.card)
        out = self.folder.path / "exports"
        durable.remove_leftovers(out)
        for config in self.experiment.export:
            if self.folder.done(f"export {config.kind}") and (out / config.kind).exists():
                continue
            began = time.monotonic()
            reports = exporting.export(student, [config], out, context, self.progress)
            note = exporting.plain(reports[0])
            self.folder.finish(f"export {config.kind}", note, time.monotonic() - began)

    # ------------------------------------------------------------------------------ helpers
    def _model(self, role: Role) -> PreTrainedModel:
        if role == "teacher":
            return self.materials.teacher
        if role == "student_before":
            return models.causal_lm(self._start())
        return models.load_folder(self.folder.path / "student", self.materials.device)

    def _start(self) -> Any:
        """The student before its first step; a cut is kept in `student-start/`."""
        student, teacher = self.experiment.student, self.experiment.teacher
        load = functools.partial(
            models.load_student,
            teacher=teacher,
            device=self.materials.device,
            seed=self.experiment.training.seed,
        )
        if student.from_teacher is None:
            return load(student, teacher_model=None)
        start = self.folder.path / "student-start"
        if not start.exists():
            cut = load(
                student.model_copy(update={"lora": None}), teacher_model=self.materials.teacher
            )
            with durable.folder(start) as aside:
                models.save(cut, self.materials.tokenizer, aside)
        given = Student(
            model=str(start),
            lora=student.lora,
            dtype=student.dtype,
            trust_remote_code=teacher.trust_remote_code,
        )
        return load(given, teacher_model=None)

    def _packing(self, student: Any) -> int | None:
        if not self.experiment.data.packing:
            return None
        if not check_packing(models.causal_lm(student)):
            raise InputError(
                "data.packing: rows that are packed together see each other in this student "
                "(packed and unpacked logits differ); set data.packing to false"
            )
        return self.experiment.data.max_length

    def _setting(self) -> evaluation.Setting:
        section = self.experiment.evaluation
        return evaluation.Setting(section.evaluators, self.materials.pad_id, section.batch_tokens)

    def _runtime(self) -> InProcess:
        path = self.folder.path

        def reported(step: int, line: Line) -> None:
            _tell(self.progress, "kdframe_metrics", run=path, step=step, metrics=line)

        def saved(step: int, folder: Path) -> None:
            _tell(self.progress, "kdframe_checkpoint", run=path, step=step, folder=folder)

        return InProcess(on_report=reported, on_checkpoint=saved, stop=self.where.stop)

    def _export_context(self) -> ExportContext:
        figures = json.loads((self.folder.path / "evaluation.json").read_text(encoding="utf-8"))
        sets = [*self.materials.held_out.values(), self.materials.dataset.train]
        rows = next(rows for rows in sets if len(rows))
        probe = [rows.row(i)[:PROBE_TOKENS].tolist() for i in range(len(rows))[:PROBE_ROWS]]
        facts = _facts(self.experiment)
        return ExportContext(
            card=model_card(facts, figures),
            facts=facts,
            probe=probe,
            load=lambda path: models.load_folder(path, self.materials.device),
        )


def _facts(experiment: Experiment) -> dict[str, str]:
    imported = experiment.cache.imported
    return {
        "name": experiment.name,
        "teacher": experiment.teacher.model,
        **({"predictions imported from": imported} if imported else {}),
        "student": experiment.student.model or "cut from the teacher's layers",
        "data": ", ".join(Path(source.path).name for source in experiment.data.train),
        "loss": experiment.loss.describe(),
        "epochs": str(experiment.training.epochs),
    }


def export_folder(
    student: Path, exporters: list[ExporterConfig], out: Path, progress: Progress
) -> list[Any]:
    """Export a saved student outside a run.

    Raises:
        InputError: `student` is not a saved model.
    """
    if not (student / "config.json").is_file():
        raise InputError(f"{student}: not a saved model (no config.json)")
    tokenizer = tokenizers.load(str(student), revision=None, trust_remote_code=False)
    ids = np.array(tokenizer("The quick brown fox jumps over 13 lazy dogs.\n")["input_ids"])
    facts = {"name": student.name}
    context = ExportContext(
        card=_card_of(student) or model_card(facts, {}),
        facts=facts,
        probe=[ids.tolist()],
        load=lambda path: models.load_folder(path, models.pick_device("cpu")),
    )
    return exporting.export(student, exporters, out, context, progress)


def _card_of(student: Path) -> str:
    card = student / "README.md"
    return card.read_text(encoding="utf-8") if card.exists() else ""
