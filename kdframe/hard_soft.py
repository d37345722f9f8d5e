"""What losses that weigh hard labels against a softened teacher have in common."""

from __future__ import annotations

from typing import Annotated

from kdframe.parts import LossConfig
from kdframe.schedules import Bounds, Scheduled, ends, in_words


class HardSoftLoss(LossConfig):
    """Settings of a loss `alpha * CE + (1 - alpha) * T^2 * D(teacher_T, student_T)`.

    `alpha` weighs the **hard** loss; other tools mean the opposite.
    """

    alpha: Annotated[Scheduled, Bounds(ge=0, le=1)] = 0.5
    """Weight of the hard-label loss; the teacher's weighs 1 - alpha. A number or a schedule."""
    temperature: Annotated[Scheduled, Bounds(gt=0)] = 1.0
    """Softens teacher and student alike. A number or a schedule."""

    def temperatures(self) -> tuple[float, ...]:
        """The one temperature, or the two ends of its schedule."""
        return ends(self.temperature)

    def describe(self) -> str:
        """What alpha weighs, in words: other tools mean the opposite."""
        own = self.model_dump(mode="json", exclude={"kind", "alpha", "temperature"})
        name = " ".join([self.kind, *(f"({key} {value})" for key, value in own.items())])
        return (
            f"{name}, alpha {in_words(self.alpha)}: "
            f"{in_words(self.alpha, lambda alpha: 100 * alpha)} % hard labels, "
            f"{in_words(self.alpha, lambda alpha: 100 * (1 - alpha))} % the teacher's predictions "
            f"at temperature {in_words(self.temperature)} (some tools weigh the other way round)"
        )
