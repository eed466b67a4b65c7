"""From rewards to advantages: plain numpy functions, run on the host in float64.

NaN means "no reward applies to this row" throughout: such a row is left out of
every mean and deviation and has zero advantage.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

# TRL's constant; it keeps a group of nearly equal rewards from being blown up.
STD_EPSILON = 1e-4


def combine_rewards(values: ArrayLike, weights: ArrayLike) -> Float[np.ndarray, " B"]:
    """Weighted sum of the reward functions' values: r_i = Σ_k w_k · R_ik over the k that apply.

    Args:
        values: [B, n] one column per reward function; NaN where it does not apply.
        weights: [n] one per reward function.

    Returns:
        [B] float64; NaN for a row to which no reward function applies.

    Raises:
        ValueError: when there is not one weight per reward function.
    """
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    if weights.shape != values.shape[1:]:
        raise ValueError(
            f"reward_weights needs one weight per reward function: {values.shape[1]} functions, "
            f"got weights {weights.tolist()}"
        )
    return np.where(np.isnan(values).all(axis=1), np.nan, np.nansum(values * weights, axis=1))


def group_advantages(rewards: ArrayLike, num_generations: int, scale: str) -> Float[np.ndarray, " B"]:
    """How much better a row did than its group: A_i = (r_i − mean_group) / (std + 1e-4).

    The mean and the deviation (Bessel's correction) are over the rows with a
    reward. A group with one such row has nothing to compare it with: advantage 0,
    as has every row without a reward. Equal rewards give exactly 0.

    Args:
        rewards: [B] the rows of a group next to each other; NaN where there is none.
        num_generations: G, rows per group.
        scale: "group" divides by the group's deviation, "batch" by that of all rows,
            "none" by nothing (Dr. GRPO).

    Returns:
        [B] float64.

    Raises:
        ValueError: when B does not divide by num_generations, or scale is unknown.

    Source: Shao et al. 2024, "DeepSeekMath", section 4.1.2; "none": Liu et al. 2025,
    "Understanding R1-Zero-Like Training". Bessel's correction and 1e-4 are TRL's.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards must be group, batch or none, got {scale!r}")
    centred = _centred_groups(rewards, num_generations)
    if scale == "group":
        centred = centred / (group_std(rewards, num_generations)[:, None] + STD_EPSILON)
    elif scale == "batch":
        centred = centred / (group_std(rewards, np.size(rewards)) + STD_EPSILON)
    return np.nan_to_num(centred, nan=0.0).reshape(-1)


def group_std(rewards: ArrayLike, num_generations: int) -> Float[np.ndarray, " P"]:
    """Standard deviation of each group's rewards, with Bessel's correction.

    Exactly 0 where all rewards of a group are equal, or fewer than two rows have
    one: the groups that `frac_reward_zero_std` counts.

    Args:
        rewards: [B] the rows of a group next to each other; NaN where there is none.
        num_generations: G, rows per group.

    Returns:
        [P] float64, in units of the reward.

    Raises:
        ValueError: when B does not divide by num_generations.
    """
    centred = _centred_groups(rewards, num_generations)
    count = np.sum(~np.isnan(centred), axis=1)
    return np.sqrt(np.nansum(centred**2, axis=1) / np.maximum(count - 1, 1))


def _centred_groups(rewards: ArrayLike, num_generations: int) -> Float[np.ndarray, "P G"]:
    rewards = np.asarray(rewards, np.float64)
    if rewards.size % num_generations:
        raise ValueError(f"rewards must divide into groups of {num_generations}, got {rewards.size}")
    groups = rewards.reshape(-1, num_generations)
    # Measured from the largest: the mean of equal rewards is then exact, not 1e-17 off.
    shifted = groups - np.fmax.reduce(groups, axis=1, keepdims=True)
    count = np.sum(~np.isnan(shifted), axis=1, keepdims=True)
    return shifted - np.nansum(shifted, axis=1, keepdims=True) / np.maximum(count, 1)
