"""The guide's `distillation_config` template, read as an experiment.

Pure mapping from one plain dictionary to another: its sections may be nested, or stand flat and
empty at the top level.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

ROOT = "distillation_config"
_SECTIONS = ("hyperparameters", "data", "training", "evaluation")

_PLACES: Mapping[str, str] = {
    "teacher_model": "teacher.model",
    "student_model": "student.model",
    "temperature": "loss.temperature",
    "alpha": "loss.alpha",
    "epochs": "training.epochs",
    "learning_rate": "training.learning_rate",
    "batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "dataset_path": "data.train",
    "max_length": "data.max_length",
    "cache_dir": "cache.folder",
    "cache_precision": "cache.codec.precision",
    "scheduler": "training.scheduler",
    "warmup_ratio": "training.warmup_ratio",
    "eval_steps": "training.eval_steps",
    "early_stopping_patience": "training.early_stopping_patience",
}
_REQUIRED = ("teacher_model", "student_model", "dataset_path")
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw")


def is_template(plain: Mapping[str, Any]) -> bool:
    """Whether this is the guide's form."""
    return ROOT in plain


def translate(
    plain: Mapping[str, Any], *, name: str
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The template as an experiment's plain data.

    Returns:
        the experiment; for each of its dotted paths the template's key (for messages); and the
        faults that only the template can have, each beginning with its key: an unknown or a
        missing key, one given twice, both precisions, another optimiser.
    """
    flat, faults = _flatten(plain)
    experiment: dict[str, Any] = {
        "name": name,
        "cache": {"kind": "mmap"},
        "loss": {"kind": "logit_kd"},
    }
    origin: dict[str, str] = {}
    faults += [_unknown(key) for key in flat if key not in _known()]
    faults += [f"{key}: is missing; it must be given" for key in _REQUIRED if key not in flat]
    for key, path in _PLACES.items():
        if key in flat:
            _put(experiment, path, flat[key])
            origin[path] = key
    if "cache_precision" in flat:
        experiment["cache"]["codec"]["kind"] = "dense"
    faults += _precision(flat, experiment)
    faults += _optimizer(flat)
    _metrics(flat, experiment, origin)
    return experiment, origin, faults


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, _known(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(_known()))}"
    return f"{key}: the {ROOT} template has no such key; {hint}"


def _known() -> set[str]:
    return {*_PLACES, "optimizer", "fp16", "bf16", "metrics"}


def _flatten(plain: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All keys in one mapping, and a fault for each that is hidden."""
    flat: dict[str, Any] = {}
    faults = []
    for key, value in plain.items():
        if key != ROOT and key not in _SECTIONS:
            inside: Mapping[str, Any] = {key: value}
        elif isinstance(value, Mapping):
            inside, more = _flatten(value)
            faults += more
        else:
            inside = {}
            if value is not None:
                faults.append(f"{key}: is a section, not a value ({value!r}); write its keys below")
        faults += [f"{name}: is given twice; keep one" for name in inside if name in flat]
        flat.update(inside)
    return flat, faults


def _put(plain: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        plain = plain.setdefault(name, {})
    plain[last] = value


def _precision(flat: Mapping[str, Any], experiment: dict[str, Any]) -> list[str]:
    fp16, bf16 = flat.get("fp16", False), flat.get("bf16", False)
    faults = [
        f"{key}: must be true or false, not {value!r}"
        for key, value in (("fp16", fp16), ("bf16", bf16))
        if not isinstance(value, bool)
    ]
    if fp16 is True and bf16 is True:
        faults.append("fp16: fp16 and bf16 are both true; set one of them to false")
    precision = "float16" if fp16 is True else "bfloat16" if bf16 is True else "float32"
    _put(experiment, "training.precision", precision)
    return faults


def _optimizer(flat: Mapping[str, Any]) -> list[str]:
    name = flat.get("optimizer", _OPTIMIZERS[0])
    if name in _OPTIMIZERS:
        return []
    return [f"optimizer: {name!r} is not there; kdframe trains with {_OPTIMIZERS[0]!r}"]


def _metrics(flat: Mapping[str, Any], experiment: dict[str, Any], origin: dict[str, str]) -> None:
    if "metrics" in flat:
        _put(experiment, "evaluation.evaluators", [])
        _put(experiment, "evaluation.when_available", flat["metrics"])
        origin["evaluation.when_available"] = "metrics"
