"""The built-in loss: hard labels and the teacher's soft targets, weighed by alpha."""

from __future__ import annotations

from typing import ClassVar, Literal

from kdframe.api import HardSoftLoss, Loss, LossConfig, TargetForm, fixed, hookimpl


class LogitKD(HardSoftLoss):
    """`alpha * CE + (1 - alpha) * T^2 * KL(teacher_T || student_T)`, in nats per counted token.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531),
    section 2. `alpha` weighs the **hard** loss; other tools mean the opposite. Of drawn targets
    (codec `sampled`) the soft part is a cross-entropy, which has the same gradient in expectation.
    """

    accepts: ClassVar[frozenset[TargetForm]] = frozenset({"truncated", "dense", "weighted"})

    kind: Literal["logit_kd"] = "logit_kd"

    def build(self) -> Loss:
        """The loss function."""
        from kdframe_logit_kd.loss import LogitKDLoss

        return LogitKDLoss(fixed(self.alpha), fixed(self.temperature))


@hookimpl
def kdframe_losses() -> tuple[type[LossConfig], ...]:
    """Logit distillation."""
    return (LogitKD,)
