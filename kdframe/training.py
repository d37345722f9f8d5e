"""The stage in which the student learns: one lean loop over planned batches.

Order, packing and the number of steps are known before the first step, and everything that a
step depends on is in the checkpoint: a run killed at any moment and started again ends with the
same weights, bit for bit, as one that was never killed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, get_scheduler

from kdframe import batching, checkpoints, durable, metrics, scoring
from kdframe.batching import Batch, Collated, TokenRows
from kdframe.errors import InputError, Interrupted
from kdframe.experiment import Training
from kdframe.losses import LossSums, StudentWithLoss
from kdframe.models import causal_lm
from kdframe.output_layer import Halves
from kdframe.packing import packed_inputs
from kdframe.parts import LossConfig
from kdframe.progress import Progress
from kdframe.runtime import Runtime
from kdframe.targets import ChunkTargets
from kdframe.teacher_cache import TeacherCache

_SCHEDULES = {"constant": "constant_with_warmup"}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Lesson:
    """All that the loop needs.

    Attributes:
        student: the model to train, on its device.
        loss: its settings, schedules and all.
        train, validation: rows; `validation` may be empty.
        cache: the teacher's predictions.
        folder: the run's folder, for `metrics.jsonl` and `checkpoints/`.
    """

    student: PreTrainedModel
    loss: LossConfig
    train: TokenRows
    validation: TokenRows
    cache: TeacherCache
    settings: Training
    packing: int | None
    pad_id: int
    batch_tokens: int
    folder: Path


@dataclass
class Best:
    """The best evaluation so far, by hard-label loss on the validation rows."""

    step: int = 0
    loss: float = math.inf
    worse: int = 0
    """Evaluations since."""


@dataclass
class Result:
    """What training did."""

    steps: int
    best_step: int
    tokens: int
    seconds: float
    stopped_early: bool


def plan_steps(lesson: Lesson) -> list[list[Batch]]:
    """Every optimiser step as its micro-batches, for the whole run."""
    settings = lesson.settings
    steps: list[list[Batch]] = []
    for epoch in range(settings.epochs):
        order = batching.epoch_rows(lesson.train, seed=settings.seed, epoch=epoch)
        shape = {"batch_size": settings.batch_size, "seed": settings.seed, "epoch": epoch}
        if lesson.packing is None:
            batches = batching.batches(lesson.train, order, **shape)
        else:
            batches = batching.packed(lesson.train, order, max_length=lesson.packing, **shape)
        every = settings.gradient_accumulation_steps
        steps += [batches[i : i + every] for i in range(0, len(batches), every)]
        if settings.max_steps is not None and len(steps) >= settings.max_steps:
            break
    return steps[: settings.max_steps]


def train(lesson: Lesson, runtime: Runtime, progress: Progress) -> Result:
    """Train the student in place; at the end it holds the best checkpoint's weights.

    Raises:
        InputError: there is no step to take, or the loss is not a number.
        Interrupted: the carrier asked to stop; a checkpoint was written.
    """
    return _Loop(lesson, runtime, progress).run()


class _Loop:
    def __init__(self, lesson: Lesson, runtime: Runtime, progress: Progress) -> None:
        self.lesson, self.runtime, self.progress = lesson, runtime, progress
        settings = lesson.settings
        torch.manual_seed(settings.seed)
        if settings.gradient_checkpointing:
            lesson.student.gradient_checkpointing_enable({"use_reentrant": False})
            lesson.student.enable_input_require_grads()
        self.device = lesson.student.device
        self.halves = Halves(causal_lm(lesson.student))
        self.loss = lesson.loss.at(0)
        self.module = StudentWithLoss(lesson.student, self.halves, self.loss.build())
        self.trained = {n: p for n, p in lesson.student.named_parameters() if p.requires_grad}
        self.optimizer = _optimizer(self.trained, settings)
        self.steps = plan_steps(lesson)
        if not self.steps:
            raise InputError(
                "training: no row comes up; raise the `weight` of data.train's sources, or "
                "training.epochs"
            )
        self.scheduler = get_scheduler(
            _SCHEDULES.get(settings.scheduler, settings.scheduler),
            self.optimizer,
            num_warmup_steps=round(settings.warmup_ratio * len(self.steps)),
            num_training_steps=len(self.steps),
        )
        half = settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.best = Best()
        self.step = 0
        self.tokens = 0
        self.checkpoints = lesson.folder / "checkpoints"
        self.metrics = lesson.folder / "metrics.jsonl"

    def run(self) -> Result:
        self._resume()
        began = time.monotonic()
        stopped = self._out_of_patience()
        with self.progress.stage("train", len(self.steps), "steps") as bar:
            bar.advance(self.step)
            while self.step < len(self.steps) and not stopped:
                line = self._one_step(self.steps[self.step])
                bar.advance(1, f"loss {line['loss']:.3f}")
                last = self.step == len(self.steps)
                leave = self.runtime.should_stop()
                if self.step % self.lesson.settings.eval_steps == 0 or last:
                    self._evaluate()
                    self._save()
                    stopped = self._out_of_patience()
                elif leave:
                    self._save()
                if leave and not (stopped or last):
                    raise Interrupted(f"stopped after step {self.step}; run it again to go on")
        self._restore_best()
        seconds = time.monotonic() - began
        return Result(self.step, self.best.step or self.step, self.tokens, seconds, stopped)

    def _one_step(self, micros: Sequence[Batch]) -> dict[str, Any]:
        began = time.monotonic()
        self.lesson.student.train()
        self._keep_to_schedule()
        collated = [
            batching.collate(self.lesson.train, batch, pad_id=self.lesson.pad_id)
            for batch in micros
        ]
        mine = sum(len(one.labels) for one in collated)
        counted = float(self.runtime.sum(torch.tensor(mine, dtype=torch.float64)))
        sums: list[LossSums] = []
        for one in collated:
            with self._autocast():
                loss = self._loss(one)
            torch.autograd.backward(self.scaler.scale(loss.total / counted))
            sums.append(loss)
        rate = self.scheduler.get_last_lr()[0]
        norm = self._update(sum(float(one.total.detach()) for one in sums))
        self.step += 1
        self.tokens += int(counted)
        line = self._means(sums, counted) | {
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": self.tokens,
            "tokens_per_second": counted / (time.monotonic() - began),
        }
        self._log(line)
        return line

    def _keep_to_schedule(self) -> None:
        """Build the loss anew where its settings change with the step."""
        loss = self.lesson.loss.at(self.step / len(self.steps))
        if loss != self.loss:
            self.loss, self.module.loss = loss, loss.build()

    def _update(self, loss: float) -> float:
        """Change the weights by the gradients; the gradients' norm.

        Raises:
            InputError: loss or gradients are not numbers; the weights are as they were.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.lesson.settings.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), limit))
        # With float16 the scaler skips a step whose scaled gradients overflow.
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise InputError(
                f"step {self.step + 1}: loss {loss}, norm of the gradient {norm}; lower "
                "training.learning_rate, or use training.precision=float32; the last checkpoint "
                "is kept"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        first = self.step == 0  # the scheduler would take a skipped step for a forgotten one
        with warnings.catch_warnings(action="ignore") if first else nullcontext():
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _means(self, sums: Sequence[LossSums], counted: float) -> dict[str, Any]:
        """Nats per counted token, over all micro-batches and workers."""
        names = sorted({name for one in sums for name in one.terms})
        values = [sum(float(one.terms[n]) for one in sums if n in one.terms) for n in names]
        totals = self.runtime.sum(
            torch.tensor(
                [sum(float(o.total.detach()) for o in sums), sum(o.taught for o in sums), *values],
                dtype=torch.float64,
            )
        ).tolist()
        line: dict[str, Any] = {"loss": totals[0] / counted}
        for name, value in zip(names, totals[2:], strict=True):
            positions = counted if name == "hard" else totals[1]
            line[name] = value / positions if positions else None
        if line.get("soft") and line.get("hard") is not None:
            line["hard_to_soft"] = line["hard"] / line["soft"]
        return line

    def _loss(self, one: Collated) -> LossSums:
        rows = self.lesson.train
        requests = [rows.request(i) for i in one.rows if rows.taught[i]]
        targets = self.lesson.cache.targets(requests, self.halves.vocab_size)
        inputs: dict[str, Any] = {"input_ids": self._tensor(one.input_ids)}
        if self.lesson.packing is None:
            inputs["attention_mask"] = self._tensor(one.attention_mask)
        else:
            inputs |= packed_inputs(self._tensor(one.segment_ids))
        sums: LossSums = self.module(
            inputs,
            self._tensor(one.counted),
            self._tensor(one.labels),
            self._tensor(one.taught),
            None if targets is None else targets.to(self.device),
        )
        return sums

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES.get(self.lesson.settings.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    # ------------------------------------------------------------------------- evaluation
    def _evaluate(self) -> None:
        """Hard-label loss on the validation rows; remembers whether it is the best so far."""
        rows = self.lesson.validation
        if not len(rows):
            self.best = Best(step=self.step)
            return
        with self._autocast():
            sums = scoring.score(
                self.halves,
                rows,
                _hard_loss,
                pad_id=self.lesson.pad_id,
                batch_tokens=self.lesson.batch_tokens,
            )
        loss = float(sums["hard"].sum()) / rows.counted_tokens
        if loss < self.best.loss:
            self.best = Best(self.step, loss)
        else:
            self.best.worse += 1
        self._log({"validation_hard": loss})

    def _out_of_patience(self) -> bool:
        patience = self.lesson.settings.early_stopping_patience
        return patience is not None and self.best.worse >= patience

    def _log(self, line: dict[str, Any]) -> None:
        whole = {"step": self.step, **line}
        metrics.append(self.metrics, whole)
        self.runtime.report(self.step, whole)

    # ------------------------------------------------------------------------- checkpoints
    def _save(self) -> None:
        tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.device)
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{i}.{name}": value for name, value in state.items()}
        state = {
            "tokens": self.tokens,
            "best": vars(self.best),
            "scheduler": self.scheduler.state_dict(),
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "scaler": self.scaler.state_dict(),
        }
        metrics.sync(self.metrics)
        saved = checkpoints.Checkpoint(self.step, self.best.step, self.trained, tensors, state)
        folder = checkpoints.save(self.checkpoints, saved)
        self.runtime.checkpointed(self.step, folder)

    def _resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        durable.remove_leftovers(self.checkpoints)
        found = checkpoints.latest(self.checkpoints, self.progress)
        metrics.cut_back(self.metrics, found.step if found else 0)
        if found is None:
            return
        self._load_weights(dict(found.model))
        tensors = dict(found.optimizer)
        torch.set_rng_state(tensors.pop("random"))
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors.pop("random_cuda"), self.device)
        whole = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            i, key = name.split(".", 1)
            whole["state"].setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict(whole)
        self.scheduler.load_state_dict(found.state["scheduler"])
        for group, rate in zip(
            self.optimizer.param_groups, found.state["learning_rates"], strict=True
        ):
            group["lr"] = rate
        self.scaler.load_state_dict(found.state["scaler"])
        self.best = Best(**found.state["best"])
        self.tokens = found.state["tokens"]
        self.step = found.step
        self.progress.say(f"train: going on from step {self.step}")

    def _restore_best(self) -> None:
        if self.best.step and self.best.step != self.step:
            self._load_weights(
                checkpoints.load_weights(self.checkpoints / f"step-{self.best.step}")
            )

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])


def _optimizer(trained: dict[str, nn.Parameter], settings: Training) -> torch.optim.AdamW:
    matrices = [p for p in trained.values() if p.ndim >= 2]
    others = [p for p in trained.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def _hard_loss(logits: Tensor, labels: Tensor, targets: ChunkTargets | None) -> dict[str, Tensor]:
    return {"hard": F.cross_entropy(logits, labels, reduction="none")}
