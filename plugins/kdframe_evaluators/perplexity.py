"""Perplexity, loss in nats, and bits per byte of a held-out set."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from kdframe.api import Figure, Subject, TeacherTargets


def evaluate(subject: Subject) -> dict[str, Figure]:
    """`loss` (nats per counted token), `perplexity` = exp(loss), `bits_per_byte`."""
    losses = subject.per_row(_loss)["loss"]
    total = float(losses.sum())
    counted = sum(row.counted for row in subject.rows)
    text_bytes = sum(row.text_bytes for row in subject.rows)
    if not counted:
        return {}
    figures = {
        "loss": Figure(total / counted, "lower"),
        "perplexity": Figure(math.exp(min(total / counted, 700)), "lower"),
    }
    if text_bytes:
        figures["bits_per_byte"] = Figure(total / math.log(2) / text_bytes, "lower")
    return figures


def _loss(logits: Tensor, labels: Tensor, targets: TeacherTargets | None) -> Mapping[str, Tensor]:
    return {"loss": F.cross_entropy(logits, labels, reduction="none")}
