"""What the stages of an experiment work on, each loaded once, when it is first asked for."""

from __future__ import annotations

import dataclasses
import functools
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdframe import data, models, tokenizers, weights
from kdframe.batching import TokenRows
from kdframe.cache_parts import CacheSpec, TeacherShape
from kdframe.errors import InputError
from kdframe.experiment import Experiment
from kdframe.left_out import LeftOut
from kdframe.progress import Progress
from kdframe.teacher_cache import TeacherCache, cache_identity, cache_spec, open_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Materials:
    """Tokenizer, rows, teacher and cache of an experiment.

    Args:
        caches: the folder of all teacher caches whose settings name none.
    """

    def __init__(self, experiment: Experiment, caches: Path, progress: Progress) -> None:
        self.experiment, self.progress = experiment, progress
        self.caches = caches.resolve()
        self.device = models.pick_device(experiment.runtime.device)
        if experiment.runtime.threads is not None:
            import torch

            torch.set_num_threads(experiment.runtime.threads)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer, seen to speak the teacher's vocabulary."""
        teacher, student = self.experiment.teacher, self.experiment.student
        spoken = tokenizers.load(
            teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
        )
        if student.model is None or student.model == teacher.model:
            return spoken
        own = tokenizers.load(
            student.model, revision=student.revision, trust_remote_code=student.trust_remote_code
        )
        tokenizers.require_same(spoken, own, bridged=self.experiment.projection is not None)
        return own

    @functools.cached_property
    def dataset(self) -> data.Dataset:
        """The rows of all sets."""
        with self.progress.stage("read data", 1, "datasets") as bar:
            vocab_size = min(self.teacher_shape.vocab_size, self.student_rows)
            dataset = data.load(self.experiment.data, self.tokenizer, vocab_size)
            bar.advance(1)
        for name, counts in dataset.counts.items():
            for line in counts.lines():
                self.progress.say(f"data, {name}: {line}")
        return dataset

    def leave_out(self) -> None:
        """Take from the sets what the teacher gave no numbers for."""
        left_out, before = LeftOut(self.store.cache), self.dataset
        if not left_out.positions:
            return
        self.dataset = dataclasses.replace(
            before,
            train=left_out.without(before.train),
            validation=left_out.without(before.validation, whole=True),
            test={k: left_out.without(rows, whole=True) for k, rows in before.test.items()},
        )
        self.progress.say(
            f"data: {len(left_out.positions):,} rows without what the teacher had no numbers for"
        )

    @functools.cached_property
    def teacher_shape(self) -> TeacherShape:
        """The teacher's output rows and hidden width."""
        teacher = self.experiment.teacher
        return models.output_shape(teacher.model, teacher.revision, teacher.trust_remote_code)

    @functools.cached_property
    def student_rows(self) -> int:
        """The student's output rows."""
        student = self.experiment.student
        if student.model is None:
            return self.teacher_shape.vocab_size
        return models.output_shape(
            student.model, student.revision, student.trust_remote_code
        ).vocab_size

    @functools.cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher: frozen, in evaluation mode."""
        with self.progress.stage("load teacher", 1, "models") as bar:
            model = models.load_teacher(self.experiment.teacher, self.device)
            bar.advance(1)
        return model

    def forget_teacher(self) -> None:
        """Free the teacher's memory."""
        if self.__dict__.pop("teacher", None) is not None:
            gc.collect()

    def new_student(self) -> Any:
        """The student as it is before training; what the loop trains, adapters and all."""
        experiment = self.experiment
        return models.load_student(
            experiment.student,
            teacher=experiment.teacher,
            teacher_model=None if experiment.student.from_teacher is None else self.teacher,
            device=self.device,
            seed=experiment.training.seed,
        )

    def require_one_vocabulary(self) -> None:
        """Raise what stands before a teacher of another vocabulary.

        Raises:
            InputError: the experiment has a projection.
        """
        if self.experiment.projection is not None:
            raise InputError("projection: not applied yet; use two models of one tokenizer")

    @functools.cached_property
    def store(self) -> TeacherCache:
        """The open teacher cache.

        Raises:
            InputError: it holds another teacher, or the vocabularies need a projection.
        """
        self.require_one_vocabulary()
        settings = self.experiment.cache
        return open_cache(settings, self._identity, self.teacher_shape, self.caches)

    @property
    def spec(self) -> CacheSpec:
        """What the teacher cache must hold."""
        settings = self.experiment.cache
        return cache_spec(settings, self._identity, self.teacher_shape, self.caches)

    @functools.cached_property
    def _identity(self) -> dict[str, str]:
        teacher, imported = self.experiment.teacher, self.experiment.cache.imported
        return cache_identity(
            weights=f"imported: {imported}" if imported else weights.weights_fingerprint(teacher),
            tokenizer=tokenizers.fingerprint(self.tokenizer),
            template=tokenizers.template_fingerprint(self.tokenizer),
            settings=teacher.model_dump(include={"dtype", "quantize"}),
        )

    @property
    def held_out(self) -> dict[str, TokenRows]:
        """The named sets on which models are compared.

        Raises:
            InputError: a test set has the name of the validation rows.
        """
        if "validation" in self.experiment.data.test:
            raise InputError("data.test: the name 'validation' is taken; choose another")
        return {"validation": self.dataset.validation, **self.dataset.test}

    @property
    def pad_id(self) -> int:
        """The id that fills up a batch; it is never seen."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)
