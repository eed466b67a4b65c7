"""The best evaluation of a run so far, and whether the run has stopped getting better."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Best:
    """The best of a run's evaluations; part of a checkpoint.

    Args:
        figure: that is compared (`early_stop_metric`), the higher the better.
        step: updates done at that evaluation; 0 before the first one.
        value: of the figure; None before the first one.
        waited: evaluations since, none of which was better.
    """

    figure: str
    step: int = 0
    value: float | None = None
    waited: int = 0

    @classmethod
    def resumed(cls, saved: Mapping[str, Any] | None, figure: str, kept: Sequence[int]) -> Best:
        """What a checkpoint says is the best; none if that is of another figure, or not among the kept steps."""
        best = cls(**saved) if saved else cls(figure)
        return best if best.figure == figure and best.step in kept else cls(figure)

    def after(self, step: int, value: float) -> Best:
        """What is the best after one more evaluation; an equal one is no better."""
        if self.value is None or value > self.value:
            return Best(self.figure, step, value)
        return dataclasses.replace(self, waited=self.waited + 1)

    def ends(self, patience: int | None) -> bool:
        """Whether a run ends that waits for so many evaluations without a better one; None: it never does."""
        return patience is not None and self.waited >= patience
