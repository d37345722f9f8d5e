"""Write a plain Hugging Face folder, load it with plain transformers, compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdframe.api import ExportContext, ExportReport

_TEXT = "0123456789 12.5 \n\n  two  spaces\ttab naïve café 日本語 🙂 <|endoftext|>"
_LOWEST_AGREEMENT = {"float32": 1.0, "float16": 0.98, "bfloat16": 0.9}
_FEW = 2  # tokens of a short probe that rounding may turn


class HfExporter:
    """The exporter with its setting."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def __call__(self, student: Path, out: Path, context: ExportContext) -> ExportReport:
        """Write and verify; `failed` where the written folder behaves otherwise."""
        original = context.load(student)
        tokenizer = AutoTokenizer.from_pretrained(student)
        written = AutoModelForCausalLM.from_pretrained(
            student, dtype=getattr(torch, self.dtype), local_files_only=True
        )
        written.save_pretrained(out)
        tokenizer.save_pretrained(out)
        (out / "README.md").write_text(context.card, encoding="utf-8")
        again = context.load(out)
        tokens_equal = _same_tokens(tokenizer, AutoTokenizer.from_pretrained(out))
        metrics = _compare(original, again, context)
        files = sorted(path.name for path in out.iterdir())
        failed = not (_agrees(metrics, self.dtype) and tokens_equal)
        return ExportReport(
            kind="hf",
            files=files,
            bytes=sum((out / name).stat().st_size for name in files),
            status="failed" if failed else "verified" if metrics else "unverified",
            metrics=metrics,
            tokens_equal=tokens_equal,
            types={self.dtype: sum(1 for _ in again.parameters())},
            reason=f"compared with the student: {metrics}, tokens equal: {tokens_equal}"
            if failed
            else "",
        )


def _same_tokens(one: Any, other: Any) -> bool:
    return bool(
        one(_TEXT)["input_ids"] == other(_TEXT)["input_ids"]
        and one.chat_template == other.chat_template
    )


@torch.no_grad()
def _compare(original: Any, again: Any, context: ExportContext) -> dict[str, float]:
    """Top-1 agreement and KL(student || file), mean and 99th percentile, on the probe rows."""
    equal, kls = [], []
    for row in context.probe:
        ids = torch.tensor([list(row)], device=original.device)
        log_p = torch.log_softmax(original(ids).logits[0].float(), dim=-1)
        log_q = torch.log_softmax(again(ids).logits[0].float(), dim=-1)
        equal.append((log_p.argmax(-1) == log_q.argmax(-1)).float())
        kls.append(torch.where(log_p.isneginf(), 0, log_p.exp() * (log_p - log_q)).sum(-1))
    if not equal:
        return {}
    kl = torch.cat(kls)
    return {
        "top1": float(torch.cat(equal).mean()),
        "kl": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "tokens": float(len(kl)),
    }


def _agrees(metrics: dict[str, float], dtype: str) -> bool:
    """Whether the written weights behave like the student's, but for their rounding."""
    if not metrics:
        return True
    wrong = (1 - metrics["top1"]) * metrics["tokens"]
    allowed = (1 - _LOWEST_AGREEMENT[dtype]) * metrics["tokens"]
    few = 0 if dtype == "float32" else _FEW
    return math.isfinite(metrics["kl"]) and round(wrong) <= max(round(allowed), few)
