"""The guide's `distillation_config` template, read as an experiment.

Pure mapping from one plain dictionary to another: its sections may be nested, or stand flat and
empty at the top level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdframe.errors import InputError

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
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw")


def is_template(plain: Mapping[str, Any]) -> bool:
    """Whether this is the guide's form."""
    return ROOT in plain


def translate(plain: Mapping[str, Any], *, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The template as an experiment's plain data.

    Returns:
        the experiment, and for each of its dotted paths the template's key (for messages).

    Raises:
        InputError: a key that the template does not have, both precisions, another optimiser.
    """
    flat = _flatten(plain)
    experiment: dict[str, Any] = {
        "name": name,
        "cache": {"kind": "mmap"},
        "loss": {"kind": "logit_kd"},
    }
    origin: dict[str, str] = {}
    faults = [
        f"{key}: the {ROOT} template has no such key (it has: {', '.join(sorted(_known()))})"
        for key in flat
        if key not in _known()
    ]
    for key, path in _PLACES.items():
        if key in flat:
            _put(experiment, path, flat[key])
            origin[path] = key
    if "cache_precision" in flat:
        experiment["cache"]["codec"]["kind"] = "dense"
    faults += _precision(flat, experiment)
    faults += _optimizer(flat)
    _metrics(flat, experiment)
    if faults:
        raise InputError(*faults)
    return experiment, origin


def _known() -> set[str]:
    return {*_PLACES, "optimizer", "fp16", "bf16", "metrics"}


def _flatten(plain: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if key == ROOT or key in _SECTIONS:
            flat.update(_flatten(value) if isinstance(value, Mapping) else {})
        else:
            flat[key] = value
    return flat


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


def _metrics(flat: Mapping[str, Any], experiment: dict[str, Any]) -> None:
    if "metrics" in flat:
        _put(experiment, "evaluation.evaluators", [])
        _put(experiment, "evaluation.when_available", flat["metrics"])
