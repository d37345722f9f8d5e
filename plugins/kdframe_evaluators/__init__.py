"""Built-in evaluators: figures over a held-out set, from one pass of the model."""

from __future__ import annotations

from typing import Literal

from kdframe.api import Evaluator, EvaluatorConfig, hookimpl


class Perplexity(EvaluatorConfig):
    """How surprised the model is by the text: perplexity, loss in nats, and bits per byte.

    Bits per byte does not depend on the vocabulary, so models with two tokenizers compare.
    """

    kind: Literal["perplexity"] = "perplexity"

    def build(self) -> Evaluator:
        """The evaluator."""
        from kdframe_evaluators.perplexity import evaluate

        return evaluate


class Agreement(EvaluatorConfig):
    """How close the student is to its teacher: KL(teacher || student) in nats at T = 1, and how
    often both like the same token best; from the teacher's cached predictions."""

    kind: Literal["agreement"] = "agreement"

    def build(self) -> Evaluator:
        """The evaluator."""
        from kdframe_evaluators.agreement import evaluate

        return evaluate


@hookimpl
def kdframe_evaluators() -> tuple[type[EvaluatorConfig], ...]:
    """Perplexity and agreement."""
    return (Perplexity, Agreement)
