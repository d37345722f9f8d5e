"""kdframe distils language models: one teacher pass, a verifiable cache, a student to ship."""

from __future__ import annotations

from kdframe.experiment import (
    Cut,
    Data,
    Evaluation,
    Experiment,
    Lora,
    Runtime,
    Source,
    Student,
    Teacher,
    Training,
)
from kdframe.reading import load

__version__ = "0.1.0"

__all__ = [
    "Cut",
    "Data",
    "Evaluation",
    "Experiment",
    "Lora",
    "Runtime",
    "Source",
    "Student",
    "Teacher",
    "Training",
    "__version__",
    "load",
]
