"""The GRPO losses as formulas: arrays and scalars in, arrays out.

Everything lives on loss positions [B, J] with a bool mask [B, J]. What lies at
masked positions must be finite and has no influence on a loss or a gradient.
A whole loss reads

    log_ratio = importance_ratio_log(logprobs, old_logprobs, mask, "token")
    per_token = clipped_surrogate(log_ratio, advantages, epsilon, epsilon_high)
    per_token += beta * k3_kl(logprobs, ref_logprobs)
    loss = aggregate(per_token, mask, "dapo", tokens=mask.sum(), rows=B, max_completion_length=n)

The normalisers `tokens` and `rows` are those of the whole batch, so the losses
and gradients of micro-batches add up to those of the batch.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Count = Int[Array, ""] | int


def importance_ratio_log(
    logprobs: Float[Array, "B J"], old_logprobs: Float[Array, "B J"], mask: Bool[Array, "B J"], level: str
) -> Float[Array, "B J"]:
    """Log of the importance ratio ρ between the policy and the one before the update.

    token:    log ρ_t = log π(t) − log π_old(t)
    sequence: log ρ   = mean of that over the row's masked positions, the same at each of them

    Args:
        logprobs: nats, of the policy that is trained.
        old_logprobs: nats; `stop_gradient(logprobs)` when there is one update per batch.
        mask: True where the loss acts.
        level: "token" (GRPO) or "sequence" (GSPO).

    Returns:
        nats; 0 at masked positions ("token").

    Raises:
        ValueError: when level is unknown.

    Source: Zheng et al. 2025, "Group Sequence Policy Optimization", equation 7. With one
    advantage per row its gradient is that of GSPO-token (equation 13).
    """
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    if level == "token":
        return log_ratio
    if level == "sequence":
        mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
        return jnp.broadcast_to(mean, log_ratio.shape)
    raise ValueError(f"importance_sampling_level must be token or sequence, got {level!r}")


def clipped_surrogate(
    log_ratio: Float[Array, "B J"],
    advantages: Float[Array, " B"],
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Float[Array, "B J"]:
    """Clipped policy-gradient loss: −min(min(ρ, δ)·A, clip(ρ, 1 − ε, 1 + ε_high)·A).

    Args:
        log_ratio: log ρ in nats.
        advantages: A, one per row.
        epsilon: how far below 1 the ratio still earns.
        epsilon_high: how far above 1.
        delta: δ > 1 + ε_high, upper bound of the unclipped ratio; it acts where A < 0. None for none.

    Returns:
        The loss of each position, to be minimised.

    Source: Schulman et al. 2017, "Proximal Policy Optimization", equation 7; ε_high: Yu et al.
    2025, "DAPO"; δ: Prime Intellect 2025, "INTELLECT-2" (two-sided clipping).
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high)
    if delta is not None:
        ratio = jnp.minimum(ratio, delta)
    return -jnp.minimum(ratio * advantages[:, None], clipped * advantages[:, None])


def k3_kl(logprobs: Float[Array, "B J"], ref_logprobs: Float[Array, "B J"]) -> Float[Array, "B J"]:
    """Estimate of KL(π ‖ π_ref) at a sampled token: e^(ref − π) − (ref − π) − 1, never negative.

    Args:
        logprobs: nats, of the policy that is trained.
        ref_logprobs: nats, of the frozen reference.

    Returns:
        nats; not weighted by the importance ratio, as in TRL.

    Source: Schulman 2020, "Approximating KL Divergence" (k3); Shao et al. 2024,
    "DeepSeekMath", equation 4.
    """
    difference = ref_logprobs - logprobs
    # expm1: near the reference, exp − 1 in float32 is all rounding.
    return jnp.expm1(difference) - difference


def entropy_floor(
    entropies: Float[Array, "*shape"], mask: Bool[Array, "*shape"], share: float
) -> Float[Array, ""]:
    """The entropy that the most uncertain `share` of all positions reach: the (1 − share) quantile.

    Args:
        entropies: nats, of every position of the batch.
        mask: True where the loss acts.
        share: of the positions that are to learn, in (0, 1].

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
    loss_type: str,
    *,
    tokens: Count,
    rows: Count,
    max_completion_length: int,
) -> Float[Array, ""]:
    """One number from the losses of all positions; what each loss type divides by.

    grpo:       Σ_rows (mean over the row's positions) / rows
    bnpo, dapo: Σ / tokens
    dr_grpo:    Σ / (rows · max_completion_length)

    TRL's bnpo divides by the tokens of each process's micro-batch, its dapo by those of the
    whole batch. Here splitting a batch never changes the result, so the two coincide.
    A row whose mask is empty (`mask_truncated_completions`) adds 0 and still counts in
    `rows`, as in TRL. In TRL's dapo its tokens count in the divisor too; here they count
    when the caller counts them in `tokens`.

    Args:
        per_token: the loss of each position.
        mask: True where the loss acts.
        loss_type: "grpo", "bnpo", "dr_grpo" or "dapo".
        tokens: masked positions of the whole batch; 0 is taken as 1.
        rows: B of the whole batch.
        max_completion_length: budget of a completion in tokens.

    Returns:
        This micro-batch's share of the loss: the shares add up to the batch's.

    Raises:
        ValueError: when loss_type is unknown.

    Source: grpo: Shao et al. 2024, "DeepSeekMath", equation 3; dapo: Yu et al. 2025, "DAPO"
    (token-level loss); dr_grpo: Liu et al. 2025, "Understanding R1-Zero-Like Training".
    """
    row_sums = jnp.where(mask, per_token, 0.0).sum(-1)
    if loss_type == "grpo":
        return (row_sums / jnp.maximum(mask.sum(-1), 1)).sum() / rows
    if loss_type in ("bnpo", "dapo"):
        return row_sums.sum() / jnp.maximum(tokens, 1)
    if loss_type == "dr_grpo":
        return row_sums.sum() / (rows * max_completion_length)
    raise ValueError(f"loss_type must be grpo, bnpo, dr_grpo or dapo, got {loss_type!r}")


def clip_fractions(
    log_ratio: Float[Array, "B J"],
    advantages: Float[Array, " B"],
    mask: Bool[Array, "B J"],
    epsilon: float,
    epsilon_high: float,
    *,
    tokens: Count,
) -> dict[str, Float[Array, ""]]:
    """Share of positions where the clip took the gradient away, under TRL's metric names.

    low: ρ < 1 − ε and A < 0; high: ρ > 1 + ε_high and A > 0; region: either.

    Args:
        log_ratio: log ρ in nats.
        advantages: A, one per row.
        mask: True where the loss acts.
        epsilon: how far below 1 the ratio still earns.
        epsilon_high: how far above 1.
        tokens: masked positions of the whole batch; 0 is taken as 1.

    Returns:
        `clip_ratio/{low,high,region}_mean`, this micro-batch's share of each in [0, 1].
        With sequence ratios a row weighs by its length (in TRL each row weighs the same).
    """
    ratio = jnp.exp(log_ratio)
    low = (ratio < 1 - epsilon) & (advantages[:, None] < 0)
    high = (ratio > 1 + epsilon_high) & (advantages[:, None] > 0)
    kinds = {"low": low, "high": high, "region": low | high}
    return {f"clip_ratio/{k}_mean": (v & mask).sum() / jnp.maximum(tokens, 1) for k, v in kinds.items()}
