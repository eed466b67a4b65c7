"""AdamW and the other optimizers, and storage in bfloat16."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from grpo_jax.models.sharding import input_dimensions


class Optimizer(NamedTuple):
    """An optax transformation whose `update` takes the learning rate, and the schedule that gives it.

    The rate is an argument of a compiled update, so that another rate or schedule compiles nothing again.

    Args:
        update: optax's, with the keywords `learning_rate`, a scalar, and `finite`, see `layer_by_layer`.
        schedule: number of updates done → learning rate.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    schedule: optax.Schedule


def make_optimizer(
    rule: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    weight_decay: float,
    max_grad_norm: float | None,
) -> Optimizer:
    """A rule in float32, after clipping the gradient by its global norm, with decoupled weight decay.

    Gradients and parameters are passed to it in float32, also where the parameters are stored in bfloat16.

    Args:
        rule: gradient → step of rate 1, such as `scale_by_adam`; see `make_rule`.
        weight_decay: decoupled decay, times the learning rate; see `decay_mask`.
        max_grad_norm: largest norm of the whole gradient, >= 0; 0 or None for no clipping.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """

    def by_rate(updates, state, params=None, **given):
        return jax.tree.map(lambda x: -given["learning_rate"] * x, updates), state

    scale = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), by_rate)
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
    decayed = optax.chain(rule, optax.add_decayed_weights(weight_decay, decay_mask), scale)
    whole = optax.chain(clip, layer_by_layer(decayed))
    return Optimizer(lambda params: whole.init(in_float32(params)), whole.update, schedule)


def make_rule(
    optim: Literal["adamw", "adafactor", "lion", "muon", "sgd"],
    b1: float,
    b2: float,
    eps: float,
    moments_dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """The step of an optimizer at rate 1: adamw, adafactor, lion, muon or sgd.

    adafactor has HF Trainer's settings: no first moment, no relative steps, a second moment that is
    factored over the inputs and outputs of each layer's matrix, steps clipped to a root mean square of 1.
    muon moves each layer's matrices by their orthogonalised momentum, scaled to the root mean square of
    AdamW's steps, so that learning rates are AdamW's; all other weights by AdamW with Nesterov momentum.

    Args:
        b1, b2, eps: those of `scale_by_adam`; lion takes b1 and b2, adafactor and sgd none.
        moments_dtype: what the moments of adamw and lion are kept in; the others' stay float32.

    Source: Shazeer and Stern 2018, "Adafactor", algorithm 4; Chen et al. 2023, "Symbolic Discovery of
    Optimization Algorithms" (lion); Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2.
    """
    if optim == "adafactor":
        factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1, decay_rate=0.8, epsilon=1e-30)
        return optax.chain(_on_matrices(factored), optax.clip_by_block_rms(1.0))
    if optim == "muon":
        # the rates are applied later, and to a step that goes up
        return optax.contrib.muon(
            -1.0, eps=eps, adam_b1=b1, adam_b2=b2, consistent_rms=0.2, muon_weight_dimension_numbers=_matrix_axes
        )  # fmt: skip
    rules = {
        "adamw": lambda: scale_by_adam(b1, b2, eps, moments_dtype),
        "lion": lambda: _kept_in(moments_dtype, optax.scale_by_lion(b1, b2)),
        "sgd": optax.identity,
    }
    return rules[optim]()


def _matrix_axes(params: Any) -> Any:
    """For each weight of a layer that is a matrix, inputs × outputs, which dimensions are which; None for others."""

    def axes(path, x):
        n = input_dimensions(path[-1].key)
        return None if n is None else optax.contrib.MuonDimensionNumbers((*range(n),), (*range(n, x.ndim),))

    return jax.tree_util.tree_map_with_path(axes, params)


def _on_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on kernels as matrices, inputs × outputs: heads are one dimension with their size."""

    def matrix(path, x):
        name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else ""
        n = input_dimensions(name)
        if n is None or x.ndim <= 2:
            return x.reshape(-1) if name.endswith("_bias") else x
        return x.reshape(math.prod(x.shape[:n]), -1)

    def flat(tree):
        return jax.tree_util.tree_map_with_path(matrix, tree)

    def update(updates, state, params=None):
        steps, state = inner.update(flat(updates), state, None if params is None else flat(params))
        return jax.tree.map(lambda step, x: step.reshape(x.shape), steps, updates), state

    return optax.GradientTransformation(lambda params: inner.init(flat(params)), update)


def layer_by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` over the stacked weights one layer at a time and in place; `finite=False` changes nothing.

    The same arithmetic as all layers at once, where `inner` works on each element by itself. But a step and
    the new moments are separate kernels on a CPU, which both read the old moments, so that XLA copies those
    first: all of them, unless a loop keeps it to one layer. At Qwen3-1.7B the update then needs 14.8 instead
    of 17.8 GB in addition to its arguments (docs/log.md).

    Args:
        inner: an optimizer of one layer's weights, and of those outside of the layers.

    Returns:
        A transformation whose state is {"layers", "rest"}, the former with a first dimension of layers, and
        whose `update` takes a bool `finite`, and passes other keywords on to `inner`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        layers, rest = _split(params)
        return {"layers": jax.vmap(inner.init)(layers) if layers else {}, "rest": inner.init(rest)}

    def skip(grads, state, params, more):
        return jax.tree.map(jnp.zeros_like, grads), state

    def run(grads, state, params, more):
        return inner.update(grads, state, params, **more)

    def update(updates, state, params=None, *, finite=True, **more):
        (stacked, rest), (weights, other_weights) = _split(updates), _split(params or {})

        def one_layer(i, carry):
            old = jax.tree.map(lambda x: x[i], (*carry, weights))
            new = jax.lax.cond(finite, run, skip, *old, more)
            return jax.tree.map(lambda x, y: x.at[i].set(y), carry, new)

        steps, rest_state = jax.lax.cond(finite, run, skip, rest, state["rest"], other_weights, more)
        layers_state = state["layers"]
        if stacked:
            L = jax.tree.leaves(stacked)[0].shape[0]
            layers_updates, layers_state = jax.lax.fori_loop(0, L, one_layer, (stacked, layers_state))
            steps = dict(steps, layers=layers_updates)
        return steps, {"layers": layers_state, "rest": rest_state}

    return optax.GradientTransformationExtraArgs(init, update)


def _split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stacked layers, and everything else."""
    return params.get("layers", {}), {name: x for name, x in params.items() if name != "layers"}


def scale_by_adam(
    b1: float, b2: float, eps: float, moments_dtype: jax.typing.DTypeLike = jnp.float32
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` that computes in float32 and keeps both moments in another type.

    Args:
        b1: decay of the gradient's mean, in [0, 1).
        b2: decay of the squared gradient's mean, in [0, 1); eps is added to that mean's root.
        moments_dtype: float32, for optax's own, or bfloat16; see `round_like`.
    """
    return _kept_in(moments_dtype, optax.scale_by_adam(b1, b2, eps))


def _kept_in(dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, whose state has the moments `mu` and perhaps `nu`, with these kept in another type."""

    def init(params):
        return inner.init(jax.tree.map(lambda p: p.astype(dtype), params))

    def update(updates, state, params=None):
        kept = {name: getattr(state, name) for name in ("mu", "nu") if name in state._fields}
        wide = state._replace(**{name: in_float32(moment) for name, moment in kept.items()})
        updated: tuple[Any, Any] = inner.update(updates, wide, params)
        steps, new = updated
        rounded = {
            name: round_like(getattr(new, name), moment, new.count, draw)
            for draw, (name, moment) in enumerate(kept.items(), start=1)
        }
        return steps, new._replace(**rounded)

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

    Returns:
        A tree of bool like params, which is for instance {"norm": {"scale": [D]}}.
    """

    def decays(path: tuple, _: jax.Array) -> bool:
        keys = jax.tree_util.keystr(path, simple=True, separator="/")
        return not keys.endswith(("scale", "bias")) and "norm" not in keys

    return jax.tree_util.tree_map_with_path(decays, params)
