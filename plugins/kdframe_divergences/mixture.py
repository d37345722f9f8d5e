"""A weighted sum of losses."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdframe.api import (
    Bounds,
    Loss,
    LossConfig,
    LossSlot,
    Schedule,
    Scheduled,
    TargetForm,
    fixed,
    in_words,
)


class Weighted(BaseModel):
    """A loss and its weight."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    loss: LossSlot
    """Any loss but a mixture."""
    weight: Annotated[Scheduled, Bounds(ge=0)] = 1.0
    """What it is multiplied by. A number or a schedule."""

    def at(self, progress: float) -> Self:
        """Both at a share of the training."""
        weight = self.weight.at(progress) if isinstance(self.weight, Schedule) else self.weight
        return self.model_copy(update={"weight": weight, "loss": self.loss.at(progress)})


class Mixture(LossConfig):
    """`sum_i weight_i * loss_i`, in nats where its parts are.

    The weights are taken as they are, not made to sum to 1. Each part keeps its own `alpha`: a
    part `forward_kl` of weight 2 and alpha 0.5 counts the hard loss once. Set `alpha: 0` on all
    parts but one, or on all, to count it in one place only.

    A run's metrics have each part's own total, unweighted, under its kind (a second one of the
    same kind as `kind_2`), and `hard`.
    """

    kind: Literal["mixture"] = "mixture"
    parts: Annotated[tuple[Weighted, ...], Field(min_length=1)]
    """The losses, each with its weight."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if any(isinstance(part.loss, Mixture) for part in self.parts):
            raise ValueError("a mixture in a mixture: write all its parts in one list")
        if not self.accepts:
            wanted = (f"{p.loss.kind}: {', '.join(sorted(p.loss.accepts))}" for p in self.parts)
            raise ValueError(f"no form of targets serves every part ({'; '.join(wanted)})")
        return self

    @property
    def accepts(self) -> frozenset[TargetForm]:  # type: ignore[override]
        """The forms of targets that every part understands."""
        return frozenset.intersection(*(part.loss.accepts for part in self.parts))

    def temperatures(self) -> tuple[float, ...]:
        """Those of every part."""
        return tuple(sorted({t for part in self.parts for t in part.loss.temperatures()}))

    def at(self, progress: float) -> Self:
        """The settings of every part at a share of the training."""
        parts = tuple(part.at(progress) for part in self.parts)
        return self if parts == self.parts else self.model_copy(update={"parts": parts})

    def describe(self) -> str:
        """Each part in words, with its weight."""
        parts = (f"{in_words(part.weight)} x [{part.loss.describe()}]" for part in self.parts)
        return f"{self.kind}: {' + '.join(parts)}"

    def build(self) -> Loss:
        """The loss function."""
        from kdframe_divergences.loss import MixtureLoss

        return MixtureLoss(
            [(self._name(i), fixed(p.weight), p.loss.build()) for i, p in enumerate(self.parts)]
        )

    def _name(self, i: int) -> str:
        kinds = [part.loss.kind for part in self.parts[: i + 1]]
        again = kinds.count(kinds[i])
        return kinds[i] if again == 1 else f"{kinds[i]}_{again}"
