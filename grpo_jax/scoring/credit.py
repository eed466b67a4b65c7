"""What a run adds to the user's rewards: a length penalty, and credit for single turns and calls.

Plain numpy functions, run on the host in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from grpo_jax.scoring.advantages import Scale, group_advantages
from grpo_jax.types import Fault, Trajectory


def soft_overlong(
    lengths: ArrayLike, truncated: ArrayLike, maximum: int, cache: int
) -> Float[np.ndarray, " B"]:
    """Penalty on a completion's length: 0 up to max − cache, from there on linear, −1 at max.

    Args:
        lengths: [B] tokens of the completions, tool responses included, as the maximum counts them.
        truncated: [B] whether a budget ended the completion, which is −1 at any length: a tool response that
            does not fit, or a turn of max_turn_length, ends it before the maximum.
        maximum: L_max in tokens (`max_grpo_completion_length`).
        cache: L_cache in tokens, at least 1.

    Returns:
        [B] in [−1, 0].

    Source: Yu et al. 2025, "DAPO", equation 13.
    """
    linear = (maximum - cache - np.asarray(lengths, np.float64)) / cache
    return np.where(truncated, -1.0, np.clip(linear, -1.0, 0.0))


def turn_advantages(
    rewards: Sequence[Sequence[float]], num_generations: int, scale: Scale
) -> list[list[float]]:
    """How much better a turn did than the turns of its group: A_it = (r_it − mean) / (std + 1e-4).

    Mean and deviation are over all turns of all completions of the group that have a reward: each turn counts
    once, so a completion with three turns has three times the weight of one with a single turn. A turn without a
    reward has advantage 0, as has a group's only turn with a reward.

    Args:
        rewards: for each of B rows one value per turn; NaN where there is none.
        num_generations: G, rows per group.

    Returns:
        One value per turn, as `rewards`.

    Source: Shao et al. 2024, "DeepSeekMath", section 4.1.3 (process supervision), without its sum over the
    steps that follow; "batch" and "none" as in `group_advantages`.
    """
    longest = max(map(len, rewards))
    padded = np.full((len(rewards), longest), np.nan)
    for row, values in zip(padded, rewards, strict=True):
        row[: len(values)] = values
    advantages = group_advantages(padded.reshape(-1), num_generations * longest, scale)
    rows = advantages.reshape(padded.shape).tolist()
    return [row[: len(values)] for row, values in zip(rows, rewards, strict=True)]


@dataclasses.dataclass(frozen=True)
class Credit:
    """How tokens get advantages of their own.

    Args:
        turn_coef: c, the weight of a turn's advantage relative to the completion's.
        malformed: subtracted from the advantage of the tokens of a call that does not parse.
        failed: the same for a call whose result is an error, a timeout or a crash.
        scale: what divides the advantages of turns; see `group_advantages`.
    """

    turn_coef: float = 1.0
    malformed: float = 0.0
    failed: float = 0.0
    scale: Scale = "group"

    @property
    def penalises(self) -> bool:
        """Whether failed or malformed calls are penalised."""
        return bool(self.malformed or self.failed)

    def of_tokens(
        self,
        trajectories: Sequence[Trajectory],
        num_generations: int,
        turn_rewards: Sequence[Sequence[float]] | None,
        faults: Sequence[Sequence[Fault]],
    ) -> list[Trajectory]:
        """The trajectories with one advantage per token: A_i + c · A_i,turn − penalties; 0 where not sampled.

        Args:
            trajectories: [B].
            num_generations: G, rows per group.
            turn_rewards: for each row one value per turn; None where no reward scores turns.
            faults: for each row the calls that went wrong.
        """
        turns: Sequence[Sequence[float]] = [()] * len(trajectories)
        if turn_rewards is not None:
            turns = turn_advantages(turn_rewards, num_generations, self.scale)
        credited = []
        for trajectory, of_turns, wrong in zip(trajectories, turns, faults, strict=True):
            tokens = np.where(trajectory.sampled_mask, trajectory.advantage, 0.0)
            for (start, stop), advantage in zip(trajectory.turns, of_turns, strict=False):  # () for none
                tokens[start:stop] += self.turn_coef * advantage
            for fault in wrong:
                tokens[fault.start : fault.stop] -= self.failed if fault.parses else self.malformed
            credited.append(dataclasses.replace(trajectory, token_advantages=tokens.tolist()))
        return credited
