"""The model card of a distilled student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def model_card(facts: Mapping[str, str], figures: Mapping[str, Any]) -> str:
    """A README in Markdown with the front matter that model hubs read.

    Args:
        facts: what there is to tell, by name (`name`, `teacher`, data, settings).
        figures: the run's `evaluation.json`; may be empty.
    """
    front = {"library_name": "transformers", "tags": ["distillation", "kdframe"]}
    if teacher := facts.get("teacher"):
        front["base_model"] = teacher
        front["base_model_relation"] = "finetune"
    # JSON strings are YAML strings: nothing in a name can break out of the front matter.
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    lines = [f"---\n{head}\n---", f"# {_text(facts.get('name', 'student'))}", ""]
    lines.append("A student distilled with kdframe.")
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {_text(key)} | {_text(value)} |" for key, value in facts.items()]
    for name, metrics in figures.get("sets", {}).items():
        lines += ["", f"## On `{_text(name)}`", ""]
        lines += ["| metric | teacher | student before | student |", "|---|---|---|---|"]
        lines += [_row(metric, entry) for metric, entry in metrics.items()]
    return "\n".join(lines) + "\n"


def _row(metric: str, entry: dict[str, Any]) -> str:
    values = (entry.get(role) for role in ("teacher", "student_before", "student"))
    cells = ("" if value is None else f"{value:.4f}" for value in values)
    return f"| {metric} ({entry['better']} is better) | " + " | ".join(cells) + " |"


def _text(value: str) -> str:
    """Text that cannot end a table cell or begin markup."""
    safe = " ".join(str(value).split())
    for character in "\\`*_{}[]<>|#":
        safe = safe.replace(character, "\\" + character)
    return safe
