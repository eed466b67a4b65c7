"""The best evaluation of a run so far, and whether the run has stopped getting better."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Best:
    """The best of a run's evaluations; part of a checkpoint.

    Args:
        step: updates done at that evaluation; 0 before the first one.
        value: of the figure that is compared, the higher the better; None before the first one.
        waited: evaluations since, none of which was better.
    """

    step: int = 0
    value: float | None = None
    waited: int = 0

    def after(self, step: int, value: float) -> Best:
        """What is the best after one more evaluation; an equal one is no better."""
        if self.value is None or value > self.value:
            return Best(step, value)
        return dataclasses.replace(self, waited=self.waited + 1)

    def ends(self, patience: int | None) -> bool:
        """Whether a run ends that waits for so many evaluations without a better one; None: it never does."""
        return patience is not None and self.waited >= patience
