"""The built-in loss: hard labels and the teacher's soft targets, weighed by alpha."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from kdframe.api import Loss, LossConfig, TargetForm, hookimpl


class LogitKD(LossConfig):
    """`alpha * CE + (1 - alpha) * T^2 * KL(teacher_T || student_T)`, in nats per counted token.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531),
    section 2. `alpha` weighs the **hard** loss; other tools mean the opposite. Of drawn targets
    (codec `sampled`) the soft part is a cross-entropy, which has the same gradient in expectation.
    """

    accepts: ClassVar[frozenset[TargetForm]] = frozenset({"truncated", "dense", "weighted"})

    kind: Literal["logit_kd"] = "logit_kd"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the hard-label loss; the teacher's weighs 1 - alpha."""
    temperature: PositiveFloat = 1.0
    """Softens teacher and student alike."""

    def temperatures(self) -> tuple[float, ...]:
        """The one temperature."""
        return (self.temperature,)

    def describe(self) -> str:
        """What alpha weighs, in words: other tools mean the opposite."""
        return (
            f"{self.kind}, alpha {self.alpha:g}: {100 * self.alpha:.4g} % hard labels, "
            f"{100 * (1 - self.alpha):.4g} % the teacher's predictions at temperature "
            f"{self.temperature:g} (some tools weigh the other way round)"
        )

    def build(self) -> Loss:
        """The loss function."""
        from kdframe_logit_kd.loss import LogitKDLoss

        return LogitKDLoss(self.alpha, self.temperature)


@hookimpl
def kdframe_losses() -> tuple[type[LossConfig], ...]:
    """Logit distillation."""
    return (LogitKD,)
