"""From rewards to advantages: plain numpy functions, run on the host in float64.

NaN means "no reward applies to this row" throughout: such a row is left out of
every mean and deviation and has zero advantage.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

Scale = Literal["group", "batch", "none"]
Estimator = Literal["group", "loo", "none"]

# TRL's constant; it keeps nearly equal rewards of a group from being amplified.
STD_EPSILON = 1e-4


def combine_rewards(values: ArrayLike, weights: ArrayLike) -> Float[np.ndarray, " B"]:
    """Weighted sum of the reward functions' values: r_i = Σ_k w_k · R_ik over the k that apply.

    Args:
        values: [B, n] one column per reward function; NaN where it does not apply.
        weights: [n].

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
    counted = weights != 0 if weights.any() else np.ones(weights.shape, bool)
    return np.where(np.isnan(values[:, counted]).all(axis=1), np.nan, np.nansum(values * weights, axis=1))


def batch_advantages(
    values: ArrayLike,
    weights: ArrayLike,
    num_generations: int,
    *,
    scale: Scale = "group",
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
    estimator: Estimator = "group",
) -> Float[np.ndarray, " B"]:
    """The advantages of a batch from the values of its reward functions.

    Args:
        values: [B, n] one column per reward function; NaN or None where it does not apply.
        weights: [n].
        num_generations: G, rows per group.
        aggregation: "sum_then_normalize", `group_advantages` of the sum of rewards, or "normalize_then_sum",
            `decoupled_advantages`, which takes no scale and no estimator.

    Returns:
        [B] float64.

    Raises:
        ValueError: as the two do.
    """
    if aggregation == "normalize_then_sum":
        return decoupled_advantages(values, weights, num_generations)
    return group_advantages(combine_rewards(values, weights), num_generations, scale, estimator)


def group_advantages(
    rewards: ArrayLike, num_generations: int, scale: Scale, estimator: Estimator = "group"
) -> Float[np.ndarray, " B"]:
    """How much better a row did than its group: A_i = (r_i − b_i) / (std + 1e-4).

    The mean and the deviation (Bessel's correction) are over the rows with a
    reward. A group with one such row has nothing to compare it with: advantage 0
    (except with the estimator "none"), as has every row without a reward. With a baseline, equal rewards
    give exactly 0.

    Args:
        rewards: [B] the rows of a group next to each other; NaN where there is none.
        num_generations: G, rows per group.
        scale: "group" divides by the group's deviation, "batch" by that of all rows,
            "none" by nothing (Dr. GRPO).
        estimator: the baseline b_i: "group" the mean of the group, "loo" that of the group's other rows,
            which is unbiased (RLOO), "none" 0 (REINFORCE).

    Returns:
        [B] float64.

    Raises:
        ValueError: when B does not divide by num_generations.

    Source: Shao et al. 2024, "DeepSeekMath", section 4.1.2; "none": Liu et al. 2025,
    "Understanding R1-Zero-Like Training". Bessel's correction and 1e-4 are TRL's. "loo": Kool et al. 2019,
    "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, "Back to Basics".
    """
    advantages = _centred_groups(rewards, num_generations)  # r_i − mean of the group
    if estimator == "loo":  # r_i − mean of the others = (r_i − mean of all)·n / (n − 1)
        n = np.sum(~np.isnan(advantages), axis=1, keepdims=True)
        advantages = advantages * n / np.maximum(n - 1, 1)
    elif estimator == "none":
        advantages = np.asarray(rewards, np.float64).reshape(advantages.shape)
    if scale == "group":
        advantages = advantages / (group_std(rewards, num_generations)[:, None] + STD_EPSILON)
    elif scale == "batch":
        advantages = advantages / (group_std(rewards, np.size(rewards)) + STD_EPSILON)
    return np.nan_to_num(advantages, nan=0.0).reshape(-1)


def decoupled_advantages(
    values: ArrayLike, weights: ArrayLike, num_generations: int
) -> Float[np.ndarray, " B"]:
    """Each reward function normalised separately: A = s / (std_batch(s) + 1e-4), s = Σ_k w_k · A_k.

    A_k are the `group_advantages` of function k with scale "group", so that a function whose values lie close
    together counts as much as one whose values are widely spread. The deviation is over all rows to which
    some function applies; their mean is 0, as that of every group is.

    Args:
        values: [B, n] one column per reward function; NaN or None where it does not apply.
        weights: [n].
        num_generations: G, rows per group.

    Returns:
        [B] float64; 0 for a row to which no reward function applies.

    Source: Liu et al. 2026, "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward
    RL Optimization", arXiv:2601.05242; rows without a reward as in TRL.
    """
    values = np.asarray(values, np.float64)
    scored = ~np.isnan(combine_rewards(values, weights))
    of_functions = [group_advantages(column, num_generations, "group") for column in values.T]
    total = np.asarray(weights, np.float64) @ np.array(of_functions)
    if scored.sum() < 2:
        return np.zeros(len(values))
    return np.where(scored, total / (total[scored].std(ddof=1) + STD_EPSILON), 0.0)


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
