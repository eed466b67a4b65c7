"""Which tools are slow, and for how many decode steps their results are left to run while others decode.

A rollout feeds the results of ordinary tools when the turn that asked for them has come back from the device, and
waits for them, which takes milliseconds. For a slow tool, waiting would hold up all completions, so its results are
fed some decode steps later. That number is measured once for each tool and then kept, and it is part of a
checkpoint: when results are fed decides the shapes of batches, and with them the last bits of log-probabilities,
so within a rollout nothing may depend on how long a call happens to take.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from grpo_jax.rollout.loop import Rollout

SLOW = 0.05  # seconds of a tool's median call, above which waiting costs more than a few decode steps
CALLS = 16  # that must be measured before a tool is judged


@dataclasses.dataclass(frozen=True)
class ToolDelays:
    """What is known about the tools of a run; part of a checkpoint.

    Args:
        steps: tool -> decode steps between its call and the first return that may feed the result: 0, or for a slow
            tool the power of two that covers its median. Tools with fewer than 16 calls are not in it.
        seconds: tool -> seconds of its calls so far, for those that are not judged yet.
    """

    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> ToolDelays:
        """The inverse of `to_json`."""
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return dataclasses.asdict(self)

    def after(self, rollout: Rollout) -> ToolDelays:
        """What is known after a rollout, the same on all hosts; tools that are judged stay as they are."""
        steps, seconds = dict(self.steps), {name: list(of) for name, of in self.seconds.items()}
        for trajectory in rollout.trajectories:
            for call, result in trajectory.calls:
                if call.name not in steps:
                    seconds.setdefault(call.name, []).append(result.seconds)
        for name in [name for name, of in seconds.items() if len(of) >= CALLS and rollout.step_seconds]:
            median = statistics.median(seconds.pop(name))
            in_steps = math.ceil(math.log2(max(median / rollout.step_seconds, 1)))
            steps[name] = 2**in_steps if median > SLOW else 0
        return ToolDelays(steps, seconds)
