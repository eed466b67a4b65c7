"""Learning-rate schedules with the values of transformers' get_scheduler, AdamW, and storage in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Factor on the learning rate after a share (0 to 1) of the updates that follow the warm-up.
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
    moments_dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """AdamW in float32, after clipping the gradient by its global norm.

    Gradients and parameters are passed to it in float32, also where the parameters are stored in bfloat16.

    Args:
        schedule: number of updates done → learning rate.
        b1: decay of the gradient's mean, in [0, 1).
        b2: decay of the squared gradient's mean, in [0, 1).
        eps: added to the root of the latter.
        weight_decay: decoupled decay, times the learning rate; see `decay_mask`.
        max_grad_norm: largest norm of the whole gradient; 0 or None for no clipping.
        moments_dtype: what both moments are kept in between updates; see `round_like`.

    Raises:
        ValueError: when max_grad_norm is negative.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """
    if max_grad_norm and max_grad_norm < 0:
        raise ValueError(f"max_grad_norm must be >= 0 (0 for no clipping), got {max_grad_norm}")
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
    adamw = optax.chain(
        scale_by_adam(b1, b2, eps, moments_dtype),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(clip, layer_by_layer(adamw))


def layer_by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` over the stacked weights one layer at a time and in place; `finite=False` changes nothing.

    The same arithmetic as all layers at once. But a step and the new moments are separate kernels on a
    CPU, which both read the old moments, so that XLA copies those first: all of them, unless a loop
    keeps it to one layer. At Qwen3-1.7B the update then needs 14.8 instead of 17.8 GB in addition to its
    arguments (docs/log.md).

    Args:
        inner: works on each element by itself; its state holds arrays shaped like the parameters, and
            scalars that count updates.

    Returns:
        A transformation whose state is {"layers", "rest"}, and whose `update` takes a bool `finite`.
    """

    def init(params):
        layers, rest = _split(params)
        return {"layers": inner.init(layers), "rest": inner.init(rest)}

    def skip(grads, state, params):
        return jax.tree.map(jnp.zeros_like, grads), state

    def update(grads, state, params=None, *, finite=True, **_):
        (stacked, rest), (weights, other_weights) = _split(grads), _split(params)

        def one_layer(i, carry):
            old = jax.tree.map(lambda x: x[i] if x.ndim else x, (*carry, weights))
            new = jax.lax.cond(finite, inner.update, skip, *old)
            return jax.tree.map(lambda x, y: x.at[i].set(y) if x.ndim else x, carry, new)

        updates, rest_state = jax.lax.cond(finite, inner.update, skip, rest, state["rest"], other_weights)
        layers_state = state["layers"]
        if stacked:
            L = jax.tree.leaves(stacked)[0].shape[0]
            layers_updates, layers_state = jax.lax.fori_loop(0, L, one_layer, (stacked, layers_state))
            updates = dict(updates, layers=layers_updates)
        counted = jnp.asarray(finite, jnp.int32)
        layers_state = jax.tree.map(lambda x: x if x.ndim else x + counted, layers_state)
        return updates, {"layers": layers_state, "rest": rest_state}

    return optax.GradientTransformationExtraArgs(init, update)


def _split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stacked layers, and everything else."""
    return params.get("layers", {}), {name: x for name, x in params.items() if name != "layers"}


def scale_by_adam(b1: float, b2: float, eps: float, moments_dtype) -> optax.GradientTransformation:
    """`optax.scale_by_adam` that computes in float32 and keeps both moments in another type.

    Args:
        b1, b2, eps: as `make_optimizer`.
        moments_dtype: float32, for optax's own, or bfloat16.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params):
        return adam.init(jax.tree.map(lambda p: p.astype(moments_dtype), params))

    def update(gradients, state, params=None):
        wide = state._replace(mu=in_float32(state.mu), nu=in_float32(state.nu))
        updates, new = adam.update(gradients, wide, params)
        mu = round_like(new.mu, state.mu, new.count, 1)
        return updates, new._replace(mu=mu, nu=round_like(new.nu, state.nu, new.count, 2))

    return optax.GradientTransformation(init, update)


def in_float32(tree: Any) -> Any:
    """A tree of arrays in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def round_like(values: Any, like: Any, *draw: int | jax.Array) -> Any:
    """Float32 values in the types of another tree; to bfloat16 by stochastic rounding, right on average.

    Nearest rounding would lose what accumulates in small steps. A weight has 8 bits: steps of less than a
    512th of it, all of them at the usual learning rates, would change nothing; nor would a second moment
    with b2 = 0.999 ever shrink.

    Args:
        values: tree of float32 arrays.
        like: the same tree with the types that are wanted, float32 or bfloat16.
        draw: integers that make the random draw: what is rounded, in which update.

    Source: Zamirai et al. 2020, "Revisiting BFloat16 Training", arXiv:2010.06192.
    """

    def one(i: int, value: jax.Array, dtype) -> jax.Array:
        if dtype == jnp.float32:
            return value
        key = functools.reduce(jax.random.fold_in, (*draw, i), jax.random.key(0, impl="threefry2x32"))
        # bfloat16 is the upper half of a float32's bits; the lower half is the chance of one more
        bits = jax.lax.bitcast_convert_type(value, jnp.uint32) + jax.random.bits(key, value.shape, jnp.uint16)
        upper = jax.lax.shift_right_logical(bits, jnp.uint32(16)).astype(jnp.uint16)
        return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)

    leaves, structure = jax.tree.flatten(values)
    types = [x.dtype for x in jax.tree.leaves(like)]
    return structure.unflatten([one(i, *pair) for i, pair in enumerate(zip(leaves, types, strict=True))])


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
