"""Learning-rate schedules with the values of transformers' get_scheduler, and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# What is left of the learning rate after a share (0 to 1) of the updates that follow the warm-up.
DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "constant_with_warmup": jnp.ones_like,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}


def make_schedule(name: str, learning_rate: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """The learning rate of each update: a linear warm-up from 0, then the named decay to 0.

    As in transformers, the first update of a warm-up has rate 0, and "constant" has no warm-up.

    Args:
        name: "constant", "constant_with_warmup", "linear" or "cosine".
        learning_rate: the peak.
        warmup_steps: updates until the peak.
        total_steps: updates until a decay ends; the rate stays there afterwards.

    Returns:
        A function from the number of updates done to the rate of the next one.

    Raises:
        ValueError: when name is unknown.
    """
    if name not in DECAYS:
        raise ValueError(f"lr_scheduler_type must be one of {', '.join(DECAYS)}, got {name!r}")
    warmup_steps = 0 if name == "constant" else warmup_steps
    decay_steps = max(1, total_steps - warmup_steps)

    def schedule(count: jax.Array) -> jax.Array:
        progress = jnp.clip((count - warmup_steps) / decay_steps, 0.0, 1.0)
        warmup = jnp.minimum(1.0, count / warmup_steps) if warmup_steps else 1.0
        return learning_rate * warmup * DECAYS[name](progress)

    return schedule


def make_optimizer(
    *,
    schedule: optax.Schedule,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float | None,
) -> optax.GradientTransformation:
    """AdamW over float32 parameters, after clipping the gradient by its global norm.

    Args:
        schedule: number of updates done → learning rate.
        b1: decay of the gradient's mean, in [0, 1).
        b2: decay of the squared gradient's mean, in [0, 1).
        eps: added to the root of the latter.
        weight_decay: decoupled decay, times the learning rate; see `decay_mask`.
        max_grad_norm: largest norm of the whole gradient; 0 or None for no clipping.

    Raises:
        ValueError: when max_grad_norm is negative.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """
    if max_grad_norm and max_grad_norm < 0:
        raise ValueError(f"max_grad_norm must be >= 0 (0 for no clipping), got {max_grad_norm}")
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
    adamw = optax.adamw(
        schedule, b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32, weight_decay=weight_decay, mask=decay_mask
    )
    return optax.chain(clip, adamw)


def decay_mask(params: Any) -> Any:
    """True for the weights that decay: all but norms' scales and biases, as in HF's Trainer.

    Args:
        params: nested dict of arrays, for instance {"norm": {"scale": [D]}}.

    Returns:
        The same tree of bool.
    """

    def decays(path: tuple, _: jax.Array) -> bool:
        keys = jax.tree_util.keystr(path, simple=True, separator="/")
        return not keys.endswith(("scale", "bias")) and "norm" not in keys

    return jax.tree_util.tree_map_with_path(decays, params)
