"""The GRPO losses as formulas: arrays and scalars in, arrays out.

All arrays are on loss positions [B, J]: `mask` is True at positions that are in the loss; values elsewhere
must be finite and have no influence on a loss or a gradient. Log-probabilities are in nats, `logprobs` those of
the policy that is trained; `log_ratio` is log ρ, and `advantages` holds A, one per row or position.
A whole loss reads

    log_ratio = importance_ratio_log(logprobs, old_logprobs, mask, "token")
    per_token = clipped_surrogate(log_ratio, advantages, epsilon, epsilon_high)
    per_token += beta * k3_kl(logprobs, ref_logprobs, log_ratio)
    loss = aggregate(per_token, mask, "dapo", tokens=mask.sum(), rows=B, max_completion_length=n)

The normalisers `tokens` and `rows` are those of the whole batch, so the losses
and gradients of micro-batches add up to those of the batch. "TRL" is TRL 1.16
throughout; `tests/test_trl_update.py` compares whole updates with its trainer.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.level import AnyArray

Count = Int[AnyArray, ""] | int
Advantages = Float[AnyArray, " B"] | Float[AnyArray, "B J"]  # of rows, or of positions

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
RatioLevel = Literal["token", "sequence"]  # GRPO's ratio, or GSPO's
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def importance_ratio_log(
    logprobs: Float[Array, "B J"],
    old_logprobs: Float[Array, "B J"],
    mask: Bool[Array, "B J"],
    level: RatioLevel,
) -> Float[Array, "B J"]:
    """Log of the importance ratio ρ between the policy and the one before the update.

    token:    log ρ_t = log π(t) − log π_old(t)
    sequence: log ρ   = mean of that over the row's positions in the mask, the same at each of them

    Args:
        old_logprobs: `stop_gradient(logprobs)` when there is one update per batch.

    Returns:
        nats; with "token", 0 where the mask is False.

    Source: Zheng et al. 2025, "Group Sequence Policy Optimization", equation 7. With one
    advantage per row its gradient is that of GSPO-token (equation 13); else see `token_gradient`.
    """
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    if level == "token":
        return log_ratio
    mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    return jnp.broadcast_to(mean, log_ratio.shape)


def token_gradient(log_ratio: Float[Array, "B J"], logprobs: Float[Array, "B J"]) -> Float[Array, "B J"]:
    """A sequence's log ratio whose gradient at each position is that of the position's log-probability.

    Where the positions of a row have advantages of their own, the mean over the row would hand each of them
    to all of the row's tokens.

    Source: Zheng et al. 2025, "Group Sequence Policy Optimization", equation 14 (GSPO-token).
    """
    return jax.lax.stop_gradient(log_ratio - logprobs) + logprobs


def _of_positions(advantages: Advantages) -> Float[AnyArray, "B _"]:
    return advantages if advantages.ndim == 2 else advantages[:, None]


def clipped_surrogate(
    log_ratio: Float[Array, "B J"],
    advantages: Advantages,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Float[Array, "B J"]:
    """Clipped policy-gradient loss: −min(min(ρ, δ)·A, clip(ρ, 1 − ε, 1 + ε_high)·A).

    Args:
        delta: δ > 1 + ε_high, upper bound of the unclipped ratio; it changes the loss only where A < 0. None: no bound.

    Returns:
        The loss of each position, to be minimised.

    Source: Schulman et al. 2017, "Proximal Policy Optimization", equation 7; ε_high: Yu et al.
    2025, "DAPO"; δ: Prime Intellect 2025, "INTELLECT-2" (two-sided clipping).
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high)
    if delta is not None:
        ratio = jnp.minimum(ratio, delta)
    advantages = _of_positions(advantages)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def cispo(
    log_ratio: Float[Array, "B J"],
    logprobs: Float[Array, "B J"],
    advantages: Advantages,
    epsilon_high: float,
) -> Float[Array, "B J"]:
    """Policy gradient weighted by the clipped ratio: −stop_gradient(min(ρ, ε_high))·A·log π.

    No token loses its gradient, however far its ratio is.

    Args:
        epsilon_high: the ceiling of the ratio itself, not of ρ − 1 as in `clipped_surrogate`: 5 in ScaleRL.

    Source: MiniMax 2025, "MiniMax-M1", arXiv:2506.13585, equation 4, without its lower bound; Khatri et al.
    2025, "ScaleRL", arXiv:2510.13786.
    """
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), epsilon_high))
    return -weight * _of_positions(advantages) * logprobs


def sapo(
    log_ratio: Float[Array, "B J"],
    advantages: Advantages,
    temperature_pos: float,
    temperature_neg: float,
) -> Float[Array, "B J"]:
    """Surrogate with a soft gate for the clip: −(4/τ)·σ(τ·(ρ − 1))·A; at ρ = 1 its gradient is that of −ρ·A.

    Args:
        temperature_pos: τ where A > 0; larger closes the gate sooner.
        temperature_neg: τ elsewhere.

    Source: Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv:2511.20347, equations 5 and 6.
    """
    advantages = _of_positions(advantages)
    tau = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    return -4 / tau * jax.nn.sigmoid(tau * jnp.expm1(log_ratio)) * advantages


def vespo(
    token_log_ratio: Float[Array, "B J"],
    logprobs: Float[Array, "B J"],
    mask: Bool[Array, "B J"],
    advantages: Advantages,
    positive: tuple[float, float],
    negative: tuple[float, float],
    correction: Float[Array, "B _"] | None = None,
) -> Float[Array, "B J"]:
    """Policy gradient weighted by a gamma kernel of the sequence's ratio: −stop_gradient(φ(w))·A·log π.

    φ(w) = w^k · e^(λ·(1 − w)), 1 at w = 1; log w is the sum of log ρ over the row's positions in the mask.

    Args:
        token_log_ratio: log ρ of each token, whatever the loss's own level; cut to ± 20, as their sum is to
            [log 1e-8, 20].
        positive: (k, λ) where A >= 0.
        negative: (k, λ) elsewhere.
        correction: what `sampler_correction` gives, a factor of w; None: no correction.

    Source: "VESPO: Variational Sequence-Level Soft Policy Optimization", arXiv:2602.10693, as in TRL.
    """
    lowest = math.log(1e-8)
    log_w = jnp.where(mask, jnp.clip(token_log_ratio, -20, 20), 0).sum(-1)
    if correction is not None:  # 1 where the mask is False
        log_w = log_w + jnp.clip(jnp.log(correction), lowest, 20).sum(-1)
    log_w, advantages = jnp.clip(log_w, lowest, 20)[:, None], _of_positions(advantages)
    k, rate = (jnp.where(advantages >= 0, *pair) for pair in zip(positive, negative, strict=True))
    weight = jnp.exp(rate + k * log_w - rate * jnp.exp(log_w))
    return -jax.lax.stop_gradient(weight * advantages) * logprobs


def k3_kl(
    logprobs: Float[Array, "B J"],
    ref_logprobs: Float[Array, "B J"],
    log_ratio: Float[Array, "B J"] | None = None,
) -> Float[Array, "B J"]:
    """Estimate of KL(π ‖ π_ref) at a sampled token: ρ·(e^(ref − π) − (ref − π) − 1), never negative.

    The ratio is neither clipped nor cut off from the gradient. With token ratios its gradient is then an
    unbiased one of the KL, on policy too, where the weight is 1: that of the unweighted k3 alone is not.

    Args:
        log_ratio: of the tokens or of their sequences, as TRL does by default (`use_bias_correction_kl`); None
            for ρ = 1.

    Returns:
        nats.

    Source: Schulman 2020, "Approximating KL Divergence" (k3); Shao et al. 2024, "DeepSeekMath",
    equation 4; the ratio: DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556, equation 7.
    """
    difference = ref_logprobs - logprobs
    # expm1: near the reference, exp − 1 in float32 is only rounding error.
    kl = jnp.expm1(difference) - difference
    return kl if log_ratio is None else kl * jnp.exp(log_ratio)


def off_policy_kept(
    logprobs: Float[Array, "B J"],
    sampler_logprobs: Float[Array, "B J"],
    mask: Bool[Array, "B J"],
    advantages: Advantages,
    threshold: float,
) -> Bool[AnyArray, "B _"]:
    """Where the surrogate is kept: A >= 0, or mean(log π_sampler − log π) <= threshold over the row.

    Args:
        sampler_logprobs: those with which the tokens were sampled.
        threshold: δ in nats per token.

    Source: DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556, equation 9.
    """
    gap = jnp.where(mask, sampler_logprobs - jax.lax.stop_gradient(logprobs), 0).sum(-1)
    gap = (gap / jnp.maximum(mask.sum(-1), 1))[:, None]
    return (_of_positions(advantages) >= 0) | (gap <= threshold)


def sampler_correction(
    old_logprobs: Float[Array, "B J"],
    sampler_logprobs: Float[Array, "B J"],
    mask: Bool[Array, "B J"],
    mode: Correction,
    clip_min: float | None,
    clip_max: float | None,
) -> Float[Array, "B _"]:
    """Weight of each token for the gap between sampler and trainer: ρ = π_old / π_sampler, bounded.

    Args:
        old_logprobs: the trainer's before the batch's first update.
        sampler_logprobs: those with which the tokens were sampled.
        mode: token_… has a ratio per token, sequence_… their product over the row; …_truncate moves a ratio
            to the nearest bound, …_mask gives 0 to those outside.
        clip_min: lower bound, at most 1; None: no bound.
        clip_max: upper bound, at least 1; None: no bound.

    Returns:
        [B, J], or [B, 1] where a row has one ratio; 1 where the mask is False. No gradient passes.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training";
    the names, and the sum over a sequence where `importance_ratio_log` takes the mean, are TRL's.
    """
    log_ratio = jnp.where(mask, jax.lax.stop_gradient(old_logprobs) - sampler_logprobs, 0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdims=True)
    ratio = jnp.exp(log_ratio)
    bounded = jnp.clip(ratio, clip_min, clip_max)
    return bounded if mode.endswith("truncate") else jnp.where(ratio == bounded, ratio, 0.0)


def entropy_floor(
    entropies: Float[Array, "*shape"], mask: Bool[Array, "*shape"], share: float
) -> Float[Array, ""]:
    """The entropy that the most uncertain `share` of all positions reach: the (1 − share) quantile.

    Args:
        entropies: nats, of every position of the batch.
        share: how many of the positions are to learn, in (0, 1].

    Returns:
        Nats, linear between two positions; NaN, which nothing reaches, when the mask is empty.

    Source: Wang et al. 2025, "Beyond the 80/20 Rule", arXiv:2506.01939.
    """
    ordered = jnp.sort(jnp.where(mask, entropies, jnp.inf).reshape(-1))
    at = (1 - share) * jnp.maximum(mask.sum() - 1, 0)
    low, high = (ordered[f(at).astype(jnp.int32)] for f in (jnp.floor, jnp.ceil))
    return low + (at - jnp.floor(at)) * (high - low)


def aggregate(
    per_token: Float[Array, "B J"],
    mask: Bool[Array, "B J"],
    loss_type: LossType,
    *,
    tokens: Count,
    rows: Count,
    max_completion_length: int,
) -> Float[Array, ""]:
    """One number from the losses of all positions; what each loss type divides by.

    grpo, sapo:               Σ_rows (mean over the row's positions) / rows
    bnpo, dapo, cispo, vespo: Σ / tokens
    dr_grpo:                  Σ / (rows · max_completion_length)
    luspo:                    Σ / rows

    TRL's bnpo divides by the tokens of each process's micro-batch, its dapo by those of the
    whole batch. Here splitting a batch never changes the result, so the two coincide.
    A row whose mask is empty (`mask_truncated_completions`) adds 0 and still counts in
    `rows`; its tokens are not in `tokens`; both as in TRL.

    Args:
        tokens: positions in the mask, of the whole batch; 0 is taken as 1.
        rows: the whole batch's B.
        max_completion_length: a completion's budget in tokens.

    Returns:
        This micro-batch's share of the loss: the shares add up to the batch's.

    Source: grpo: Shao et al. 2024, "DeepSeekMath", equation 3; dapo: Yu et al. 2025, "DAPO"
    (token-level loss); dr_grpo: Liu et al. 2025, "Understanding R1-Zero-Like Training"; luspo: Liu et al.
    2026, "Length-Unbiased Sequence Policy Optimization", arXiv:2602.05261.
    """
    row_sums = jnp.where(mask, per_token, 0.0).sum(-1)
    if loss_type in ("grpo", "sapo"):
        return (row_sums / jnp.maximum(mask.sum(-1), 1)).sum() / rows
    if loss_type == "dr_grpo":
        return row_sums.sum() / (rows * max_completion_length)
    if loss_type == "luspo":
        return row_sums.sum() / rows
    return row_sums.sum() / jnp.maximum(tokens, 1)


def clip_fractions(
    log_ratio: Float[Array, "B J"],
    advantages: Advantages,
    mask: Bool[Array, "B J"],
    epsilon: float,
    epsilon_high: float,
    *,
    tokens: Count,
) -> dict[str, Float[Array, ""]]:
    """Share of positions where the clip took the gradient away, under TRL's metric names.

    low: ρ < 1 − ε and A < 0; high: ρ > 1 + ε_high and A > 0; region: either.

    Args:
        tokens: positions in the mask, of the whole batch; 0 is taken as 1.

    Returns:
        `clip_ratio/{low,high,region}_mean`, this micro-batch's share of each in [0, 1].
        With sequence ratios a row weighs by its length (in TRL each row weighs the same).
    """
    ratio = jnp.exp(log_ratio)
    advantages = _of_positions(advantages)
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    kinds = {"low": low, "high": high, "region": low | high}
    return {f"clip_ratio/{k}_mean": (v & mask).sum() / jnp.maximum(tokens, 1) for k, v in kinds.items()}
