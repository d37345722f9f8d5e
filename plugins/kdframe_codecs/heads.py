"""A teacher's output layer, kept beside coded hidden states."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdframe.api import InputError, OutputHead, TeacherOutputs, TeacherShape


def plain_head(sample: TeacherOutputs) -> OutputHead:
    """The output layer that a fitting gets.

    Raises:
        InputError: the teacher gives logits alone.
    """
    if not isinstance(sample.head, OutputHead):
        raise InputError(
            "cache.codec: this teacher gives logits alone, no hidden states; use the codec 'topk'"
        )
    return sample.head


def kept_head(shape: TeacherShape, fitted: Mapping[str, Tensor]) -> OutputHead:
    """The output layer among what was kept.

    Raises:
        InputError: its width is not that of the teacher's configuration.
    """
    head = OutputHead.from_tensors(fitted)
    if head.hidden_size != shape.hidden_size:
        raise InputError(
            f"cache.codec: the teacher's output layer reads {head.hidden_size} numbers, its "
            f"configuration says {shape.hidden_size}; use the codec 'topk'"
        )
    return head
