"""The model card of a distilled student."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_ROLES = {"teacher": "teacher", "student_before": "student before", "student": "student"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def model_card(facts: Mapping[str, str], figures: Mapping[str, Any]) -> str:
    """A README in Markdown with the front matter that model hubs read.

    Args:
        facts: what there is to tell, by name (`name`, `teacher`, data, settings).
        figures: the run's `evaluation.json`; may be empty.
    """
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["distillation", "kdframe"]}
    if base := _base(facts):
        front |= {"base_model": base, "base_model_relation": "finetune"}
    # JSON strings are YAML strings: nothing in a name can break out of the front matter.
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    lines = [f"---\n{head}\n---", f"# {_text(facts.get('name', 'student'))}", ""]
    lines.append("A student distilled with kdframe.")
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {_text(key)} | {_text(value)} |" for key, value in facts.items()]
    for name, metrics in figures.get("sets", {}).items():
        lines += ["", f"## On {_text(name)}", ""]
        lines += [f"| metric | {' | '.join(_ROLES.values())} |", "|---|---|---|---|"]
        lines += [_row(metric, entry) for metric, entry in metrics.items()]
    return "\n".join(lines) + "\n"


def _base(facts: Mapping[str, str]) -> str:
    """The model that was trained on, where the hub knows it; a path says nothing to others."""
    student = facts.get("student", "")
    begun = facts.get("teacher", "") if student.startswith("cut from") else student
    return begun if _HUB_ID.fullmatch(begun) else ""


def _row(metric: str, entry: Mapping[str, Any]) -> str:
    values = (entry.get(role) for role in _ROLES)
    cells = ("" if value is None else f"{value:.4f}" for value in values)
    return f"| {_text(metric)} ({_text(entry['better'])} is better) | {' | '.join(cells)} |"


def _text(value: str) -> str:
    """Text that cannot end a table cell or begin markup."""
    safe = " ".join(str(value).encode("utf-8", "replace").decode().split())
    for character in "\\`*_{}[]<>|#~&":
        safe = safe.replace(character, "\\" + character)
    return safe
