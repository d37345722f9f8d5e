"""All that a plugin imports. Nothing else in kdframe is promised to plugins.

Names that need torch (the forms of targets, what codecs read) are loaded when first used, so that
importing a plugin does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, Any

from kdframe import cache_tools, durable
from kdframe.cache_parts import (
    BadRow,
    Cache,
    CacheConfig,
    CacheSpec,
    Codec,
    CodecConfig,
    RowPositions,
    TeacherShape,
    TruncatedCodec,
)
from kdframe.errors import DamagedError, InputError, KdframeError, PluginError
from kdframe.hard_soft import HardSoftLoss
from kdframe.hooks import CONTRACT, hookimpl
from kdframe.part import Folder, Part, Place, TargetForm
from kdframe.parts import (
    EvaluationRow,
    Evaluator,
    EvaluatorConfig,
    ExportContext,
    Exporter,
    ExporterConfig,
    ExportReport,
    Figure,
    Loss,
    LossConfig,
    LossTerms,
    Projection,
    ProjectionConfig,
    Role,
    Subject,
)
from kdframe.plugins import Slot
from kdframe.schedules import Bounds, Schedule, Scheduled, ends, fixed, in_words

if TYPE_CHECKING:
    from kdframe.heads import OutputHead, TeacherOutputs
    from kdframe.targets import (
        ChunkTargets,
        DenseTargets,
        HiddenTargets,
        TeacherTargets,
        TruncatedTargets,
        WeightedTargets,
    )

CodecSlot = Annotated[CodecConfig, Slot("codec")]
"""The type of a cache backend's field `codec`."""

LossSlot = Annotated[LossConfig, Slot("loss")]
"""The type of a field in which any loss stands."""

_NEED_TORCH = {
    **dict.fromkeys(("OutputHead", "TeacherOutputs"), "heads"),
    **dict.fromkeys(("ChunkTargets", "DenseTargets", "HiddenTargets", "TeacherTargets"), "targets"),
    **dict.fromkeys(("TruncatedTargets", "WeightedTargets"), "targets"),
}

__all__ = [
    "CONTRACT",
    "BadRow",
    "Bounds",
    "Cache",
    "CacheConfig",
    "CacheSpec",
    "ChunkTargets",
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
    "HardSoftLoss",
    "HiddenTargets",
    "InputError",
    "KdframeError",
    "Loss",
    "LossConfig",
    "LossSlot",
    "LossTerms",
    "OutputHead",
    "Part",
    "Place",
    "PluginError",
    "Projection",
    "ProjectionConfig",
    "Role",
    "RowPositions",
    "Schedule",
    "Scheduled",
    "Subject",
    "TargetForm",
    "TeacherOutputs",
    "TeacherShape",
    "TeacherTargets",
    "TruncatedCodec",
    "TruncatedTargets",
    "WeightedTargets",
    "cache_tools",
    "durable",
    "ends",
    "fixed",
    "hookimpl",
    "in_words",
]


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(importlib.import_module(f"kdframe.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
