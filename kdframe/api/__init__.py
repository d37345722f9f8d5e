"""All that a plugin imports. Nothing else in kdframe is promised to plugins.

Names that need torch (`TruncatedTargets`, `DenseTargets`, `TeacherTargets`) are loaded when first
used, so that importing a plugin does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from kdframe import durable
from kdframe.errors import DamagedError, InputError, KdframeError, PluginError
from kdframe.hooks import CONTRACT, hookimpl
from kdframe.parts import (
    BadRow,
    Cache,
    CacheConfig,
    CacheSpec,
    Codec,
    CodecConfig,
    EvaluationRow,
    Evaluator,
    EvaluatorConfig,
    ExportContext,
    Exporter,
    ExporterConfig,
    ExportReport,
    Figure,
    Folder,
    Loss,
    LossConfig,
    LossTerms,
    Part,
    Place,
    Projection,
    ProjectionConfig,
    Role,
    RowPositions,
    Subject,
    TargetForm,
)
from kdframe.plugins import Slot

if TYPE_CHECKING:
    from kdframe.targets import DenseTargets, TeacherTargets, TruncatedTargets

CodecSlot = Annotated[CodecConfig, Slot("codec")]
"""The type of a cache backend's field `codec`."""

_NEED_TORCH = ("DenseTargets", "TeacherTargets", "TruncatedTargets")

__all__ = [
    "CONTRACT",
    "BadRow",
    "Cache",
    "CacheConfig",
    "CacheSpec",
    "Codec",
    "CodecConfig",
    "CodecSlot",
    "DamagedError",
    "DenseTargets",
    "EvaluationRow",
    "Evaluator",
    "EvaluatorConfig",
    "ExportContext",
    "ExportReport",
    "Exporter",
    "ExporterConfig",
    "Figure",
    "Folder",
    "InputError",
    "KdframeError",
    "Loss",
    "LossConfig",
    "LossTerms",
    "Part",
    "Place",
    "PluginError",
    "Projection",
    "ProjectionConfig",
    "Role",
    "RowPositions",
    "Subject",
    "TargetForm",
    "TeacherTargets",
    "TruncatedTargets",
    "durable",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        from kdframe import targets

        return getattr(targets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
