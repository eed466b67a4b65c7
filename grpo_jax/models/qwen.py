"""Qwen2, Qwen2.5, Qwen3 and Llama in Flax NNX, behind one pure primitive: `extend`.

Modules live in this file only. All other modules hold `params`, a nested dict of
arrays whose layers are stacked [L, …] (training) or a list of per-layer dicts
(rollout), and calls `extend(params, levels, segments)`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models import lora
from grpo_jax.models.attention import KEPT, Segment, attend, even_block, keep
from grpo_jax.models.level import KV, AnyArray, Level
from grpo_jax.models.rope import Scaling, frequencies, read_position_limit, read_rope
from grpo_jax.models.target import device_count, on_cpu

Params = dict[str, Any]
Constrain = Callable[[Any, str], Any]
SUPPORTED = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
MLP_TOKENS = 2048  # of a block, see `in_token_blocks`
FEW_LAYERS = 8  # see `_last_unrolled`


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of a checkpoint (its `config.json`).

    `positions` is the longest sequence that it was made for, None where the file does not say.
    """

    model_type: str
    V: int
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int
    rope_theta: float
    norm_eps: float
    tied: bool
    rope: Scaling | None = None
    positions: int | None = None

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 adds a bias to the query, key and value projections."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises each head's queries and keys."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """Read an HF `config.json`.

        Raises:
            ValueError: an architecture, activation or rope type that this port does not have,
                or a key that is missing or no number; names the key and what is supported.
        """
        if not isinstance(config, dict):
            raise ValueError(f"{source} must hold a JSON object, got {str(config)[:80]}; download it again")
        for key in SIZES:
            value = config.get(key, 1)
            absent = value is None and key in MAY_BE_NULL
            if not absent and (type(value) is not int or value < 1):
                raise ValueError(f"{source}: {key} must be a whole number >= 1, got {value!r}")
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in SUPPORTED:
            raise ValueError(f"{source}: model_type must be one of {sorted(SUPPORTED)}, got {kind!r}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{source}: hidden_act must be 'silu', got {config['hidden_act']!r}")
        for switch in ("use_sliding_window", "attention_bias", "mlp_bias"):
            if config.get(switch):
                raise ValueError(f"{source}: {switch} must be false, got {config[switch]!r}")
        try:
            D, N = config["hidden_size"], config["num_attention_heads"]
            theta, rope = read_rope(config, source)
            K, H = config.get("num_key_value_heads") or N, config.get("head_dim") or D // N
            if N % K or H % 2:
                raise ValueError(
                    f"{source}: num_attention_heads must be a multiple of num_key_value_heads and head_dim even, got "
                    f"{N}, {K} and {H}"
                )
            return cls(
                model_type=kind,
                V=config["vocab_size"],
                D=D,
                F=config["intermediate_size"],
                L=config["num_hidden_layers"],
                N=N,
                K=K,
                H=H,
                rope_theta=theta,
                norm_eps=float(config["rms_norm_eps"]),
                tied=config.get("tie_word_embeddings", False),
                rope=rope,
                positions=read_position_limit(config, rope),
            )
        except KeyError as error:
            raise ValueError(f"{source}: the key {error} is missing") from error
        except (TypeError, AttributeError) as error:  # null, or text where a number or object belongs
            raise ValueError(
                f"{source} holds a value of the wrong type ({error}); download it again"
            ) from None


def rms_norm(x, scale, eps: float):
    """x / rms(x) · scale, rounded in the order of the published models.

    On one device as a matrix: for [1, T, D] XLA's CPU backend sums the scale's gradient 30 times as slowly.
    """
    x32 = (x.reshape(-1, x.shape[-1]) if device_count() == 1 else x).astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (x32.astype(x.dtype) * jax.lax.expand_dims(scale, range(x32.ndim - 1))).reshape(x.shape)


@jax.checkpoint  # its inputs are kept for the backward pass anyway; intermediate values need not be
def gated(gate, up):
    """silu(gate) · up, the first factor computed in fp32."""
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


class RMSNorm(nnx.Module):
    """`rms_norm` with its scale."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x):
        return rms_norm(x, self.scale[...], self.eps)


def linear(x: Float[Array, "n T *inputs"], w: Float[Array, "*inputs_outputs"], inputs: int = 1):
    """x · w over the last `inputs` dimensions of x and the first of w.

    On one device rows and tokens are merged first, so that the product and its gradients are of matrices.
    For a weight's gradient over two dimensions XLA's CPU backend writes the whole cotangent transposed,
    inside the loop that computes it: an MLP of 8,192 × 128 tokens, forward and backward, takes 111 instead
    of 48 ms (docs/log.md). On several devices either rows or tokens are sharded, and are not merged.
    """
    if device_count() > 1:
        return jnp.tensordot(x, w, inputs)
    K = math.prod(w.shape[:inputs])
    return (x.reshape(-1, K) @ w.reshape(K, -1)).reshape(*x.shape[:-inputs], *w.shape[inputs:])


@jax.custom_vjp
def biased_heads(x_BTD, w_DNH, bias_NH):
    """x · w + bias with one rounding, as the published models' kernels do it.

    With two roundings our bf16 logits lie 1.1 to 1.25 times as far from torch's as its attention kernels
    (eager, sdpa) lie from each other; with one, 0.7 to 1.0 times: tests/test_qwen_torch.py.
    """
    y = jnp.einsum("btd,dnh->btnh", x_BTD, w_DNH, preferred_element_type=jnp.float32)
    return (y + bias_NH[None, None]).astype(x_BTD.dtype)


def _biased_heads_backward(residuals, dy_BTNH):
    # by hand: jax would multiply the float32 cotangent of the unrounded sum, not the rounded one
    x_BTD, w_DNH = residuals
    dx = jnp.einsum("btnh,dnh->btd", dy_BTNH, w_DNH)
    return dx, jnp.einsum("btd,btnh->dnh", x_BTD, dy_BTNH), dy_BTNH.sum((0, 1))


biased_heads.defvjp(lambda x, w, bias: (biased_heads(x, w, bias), (x, w)), _biased_heads_backward)


class Attention(nnx.Module):
    """Projections of grouped-query attention; `attention.attend` computes the attention itself."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        def kernel(*shape, fan_in):
            return nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)

        self.q = kernel(cfg.D, cfg.N, cfg.H, fan_in=cfg.D)
        self.k = kernel(cfg.D, cfg.K, cfg.H, fan_in=cfg.D)
        self.v = kernel(cfg.D, cfg.K, cfg.H, fan_in=cfg.D)
        self.o = kernel(cfg.N, cfg.H, cfg.D, fan_in=cfg.N * cfg.H)
        if cfg.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((cfg.N, cfg.H)))
            self.k_bias = nnx.Param(jnp.zeros((cfg.K, cfg.H)))
            self.v_bias = nnx.Param(jnp.zeros((cfg.K, cfg.H)))
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.H, cfg.norm_eps)
            self.k_norm = RMSNorm(cfg.H, cfg.norm_eps)
        self.cfg = cfg

    def project(self, x_BTD, cos_sin, adapt):
        """Rotated queries [B, T, N, H], and keys and values [B, K, T, H]."""
        if self.cfg.qkv_bias:
            q = biased_heads(x_BTD, self.q[...], self.q_bias[...])
            k = biased_heads(x_BTD, self.k[...], self.k_bias[...])
            v = biased_heads(x_BTD, self.v[...], self.v_bias[...])
        else:
            q, k, v = (linear(x_BTD, w[...]) for w in (self.q, self.k, self.v))
        q, k, v = adapt(q, "q", x_BTD), adapt(k, "k", x_BTD), adapt(v, "v", x_BTD)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        return q, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def output(self, o_BTNH, adapt):
        """Heads merged back to the model width."""
        return adapt(linear(o_BTNH, self.o[...], 2), "o", o_BTNH)


class MLP(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        def kernel(fan_in, fan_out):
            return nnx.Param(jax.random.normal(rngs.params(), (fan_in, fan_out)) * fan_in**-0.5)

        self.gate, self.up = kernel(cfg.D, cfg.F), kernel(cfg.D, cfg.F)
        self.down = kernel(cfg.F, cfg.D)

    def __call__(self, x, constrain, rows, adapt):
        y = gated(adapt(linear(x, self.gate[...]), "gate", x), adapt(linear(x, self.up[...]), "up", x))
        y = constrain(y, f"{rows}_mlp")
        return adapt(linear(y, self.down[...]), "down", y)


def in_token_blocks(mlp: Callable[[Array], Array], x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
    """mlp(x), at most 2,048 tokens at a time; the backward pass recomputes a block's hidden values.

    They are F wide, and those of all tokens would be most of what an update under remat holds at once: 15.1
    and 13.6 GB for Qwen3-1.7B (docs/log.md). Not on several devices, which share the tokens out.
    """
    n, T, D = x.shape
    size = even_block(n * T, MLP_TOKENS)
    if size == n * T or n * T % size or device_count() > 1:
        return mlp(x)
    blocks = x.reshape(-1, 1, size, D)
    return jax.lax.map(jax.checkpoint(mlp, prevent_cse=False), blocks).reshape(n, T, D)


class DecoderLayer(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(cfg.D, cfg.norm_eps)
        self.attention = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg.D, cfg.norm_eps)
        self.mlp = MLP(cfg, rngs)

    def __call__(self, x, valid, cos_sin, segments, constrain, rows, adapt, in_blocks):
        q, k, v = self.attention.project(self.attention_norm(x), cos_sin, adapt)
        q = constrain(q, f"{rows}_heads")
        own = Segment(constrain(k, f"{rows}_kv"), constrain(v, f"{rows}_kv"), valid)
        attended = attend(q, segments, own, tokens_sharded=rows == "shared")
        o = constrain(attended, f"{rows}_heads")
        x = constrain(x + self.attention.output(o, adapt), f"{rows}_x")
        mlp = functools.partial(self.mlp, constrain=constrain, rows=rows, adapt=adapt)
        y = self.mlp_norm(x)
        x = constrain(x + (in_token_blocks(mlp, y) if in_blocks else mlp(y)), f"{rows}_x")
        return x, own


class Qwen(nnx.Module):
    """The parameters around the layers; `layers` holds one stack of L decoder layers."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        # rows of the table have the length of a token's logit vector: fan-in D when tied
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (cfg.V, cfg.D)) * cfg.D**-0.5)
        self.layers = nnx.vmap(functools.partial(DecoderLayer, cfg))(rngs.split(cfg.L))
        self.norm = RMSNorm(cfg.D, cfg.norm_eps)
        if not cfg.tied:
            self.head = nnx.Param(jax.random.normal(rngs.params(), (cfg.V, cfg.D)) * cfg.D**-0.5)


@functools.cache
def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes and dtypes (float32) of a model's parameters, layers stacked, nothing allocated."""
    return _pure(nnx.eval_shape(lambda: Qwen(cfg, nnx.Rngs(0))))


def init_params(cfg: ModelConfig, seed: int = 0) -> Params:
    """Random float32 parameters of a fresh model, layers stacked."""
    return jax.jit(lambda key: _pure(Qwen(cfg, nnx.Rngs(key))))(jax.random.key(seed))


def check_params(cfg: ModelConfig, params: Params) -> None:
    """Compare names and shapes with the model's: NNX merges by position and would swap weights silently.

    Raises:
        ValueError: names the first leaf that is missing, unknown or misshapen.
    """
    want = {
        jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(abstract_params(cfg))
    }
    have = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(params)}
    for name in want.keys() ^ have.keys():
        raise ValueError(f"parameter {name} is {'missing' if name in want else 'unknown'}")
    for name, shape in want.items():
        if have[name] != shape:
            raise ValueError(f"parameter {name} must have shape {shape}, got {have[name]}")


def _pure(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module))


@functools.cache
def _layer_graph(cfg: ModelConfig):
    """The structure of one decoder layer, and of its parameters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: DecoderLayer(cfg, nnx.Rngs(0))))
    return graph, jax.tree.structure(nnx.to_pure_dict(state))


def _bind_layer(cfg: ModelConfig, weights: Params) -> DecoderLayer:
    """The one place where a module is made from parameters."""
    graph, structure = _layer_graph(cfg)
    if jax.tree.structure(weights) != structure:
        raise ValueError(f"layer parameters must have the structure {structure}")
    return nnx.merge(graph, weights)


def compiler_options(L: int) -> dict[str, bool | int | str]:
    """XLA's options for every program that runs `extend` with L layers.

    By default XLA drops roundings to bfloat16 inside fusions, different ones in each program. With all of them kept,
    they are those of the published models, and sampler and update round alike: their log-probabilities in bf16 differ
    by 0.0021 nats on average instead of 0.0030 (tests/test_loop.py).

    On a CPU XLA's reshape-mover undoes what its simplifier does, in 50 rounds over an unrolled deep model: decode of
    30 layers compiles in 8.2 instead of 5.0 s. Shallow models keep it: their decode is a seventh faster with it
    (docs/log.md).
    """
    options: dict[str, bool | int | str] = {"xla_allow_excess_precision": False}
    if on_cpu() and L > FEW_LAYERS:
        options["xla_disable_hlo_passes"] = "reshape-mover"
    return options


def rope_tables(cfg: ModelConfig, positions: Int[AnyArray, "n T"]):
    """cos and sin [n, T, 1, H/2] in fp32; bf16 angles would turn position 5801 into 5792."""
    frequency = jnp.asarray(frequencies(cfg.rope_theta, cfg.H, cfg.rope))
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    scale = 1.0 if cfg.rope is None else cfg.rope.attention_factor
    return (jnp.cos(angle) * scale)[..., None, :], (jnp.sin(angle) * scale)[..., None, :]


def rotate(x, cos_sin):
    """Rotary embedding in the half-split form of the published models, with their roundings."""
    cos, sin = (table.astype(x.dtype) for table in cos_sin)
    x1, x2 = jnp.split(x, 2, -1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def head_weights(params: Params) -> Float[Array, "V D"]:
    """The output head: its own, or the embedding table when tied."""
    return params.get("head", params["embedding"])


def extend(
    params: Params,
    levels: tuple[Level, ...],
    segments: tuple[tuple[KV, Bool[Array, "_n _S"]], ...] = (),
    *,
    cfg: ModelConfig,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    keep_kv: bool = True,
    constrain: Constrain = lambda x, kind: x,
) -> tuple[tuple[Float[Array, "_n _T D"], ...], tuple[KV, ...]]:
    """Run new tokens through the model on top of what is already known.

    Tokens attend to every segment, to the levels above their own and causally to
    themselves. All levels pass through a layer before the next layer starts, so a
    layer's keys and values of the upper levels need not outlive it.

    Args:
        params: stacked layers run under `lax.scan`, the last separately where that pays; a list of layers
            is unrolled. With adapters under "lora" (see `lora.join`) the layers are stacked.
        levels: from the most shared to the least; rows of each divide the rows of the next.
        segments: (keys and values of every layer, valid [n, S]) of earlier calls.
        dtype: that activations have; weights are cast to it layer by layer.
        remat: recompute each layer in the backward pass, except for what attention returned; the MLP takes
            its tokens in blocks.
        constrain: sharding constraint on an array, by kind; see `sharding`.

    Returns:
        (final hidden states after the last norm, one per level;
         keys and values, one KV per level, empty without keep_kv).
    """
    tables = [rope_tables(cfg, level.positions) for level in levels]
    names = ["shared" if level.shared else "rows" for level in levels]
    valids = [valid for _, valid in segments]
    layers = params["layers"] | {"lora": params["lora"]} if "lora" in params else params["layers"]

    def run_layer(xs, weights, kvs, keys):
        xs = tuple(map(_kept_input, xs)) if remat else xs
        weights = constrain(jax.tree.map(lambda w: w.astype(dtype), weights), "layer_weights")
        adapters = weights.pop("lora", None)
        layer = _bind_layer(cfg, weights)
        above = tuple(Segment(kv.k, kv.v, valid) for kv, valid in zip(kvs, valids, strict=True))
        out = []
        for x, level, table, name, key in zip(xs, levels, tables, names, keys, strict=True):
            adapt = functools.partial(lora.adapt, adapters, key)
            in_blocks = remat and key is None  # dropout's keys are a row's, not a block's
            x, own = layer(x, level.valid, table, above, constrain, name, adapt, in_blocks)
            out.append(x)
            above = (*above, own)
        new = tuple(KV(s.k, s.v) for s in above[len(kvs) :]) if keep_kv else ()
        return tuple(out), new

    if remat:
        policy = jax.checkpoint_policies.save_only_these_names(KEPT)
        run_layer = jax.checkpoint(run_layer, prevent_cse=not isinstance(layers, dict), policy=policy)
    xs = _embed(constrain(params["embedding"], "embedding"), levels, dtype)
    xs = tuple(constrain(x, f"{name}_x") for x, name in zip(xs, names, strict=True))
    kvs = tuple(kv for kv, _ in segments)
    in_layers = jax.vmap(lora.fold_in, (None, 0))  # a level's dropout keys in every layer, [L, n, 2]
    keys = tuple(
        None if level.dropout_keys is None else in_layers(level.dropout_keys, jnp.arange(cfg.L))
        for level in levels
    )
    if isinstance(layers, dict):
        xs, new = _scan(run_layer, xs, layers, kvs, keys, _last_unrolled(levels, cfg.L))
    else:
        xs, new = _unroll(run_layer, xs, layers, kvs, keys)
    scale = params["norm"]["scale"].astype(dtype)
    return tuple(rms_norm(x, scale, cfg.norm_eps) for x in xs), new


_kept_input = jax.custom_vjp(keep)  # the bits of `keep` carry no gradient
_kept_input.defvjp(lambda x: (keep(x), None), lambda _, dx: (dx,))


def _embed(table, levels, dtype):
    """One lookup for all levels: its backward pass is then one scatter into the table, not three."""
    tokens = jnp.concatenate([level.tokens.reshape(-1) for level in levels])
    ends = np.cumsum([level.tokens.size for level in levels])[:-1]
    parts = jnp.split(table[tokens].astype(dtype), ends)
    return tuple(x.reshape(*lv.tokens.shape, -1) for x, lv in zip(parts, levels, strict=True))


def _scan(run_layer, xs, layers, kvs, keys, last_unrolled):
    """Layers under one loop; with `last_unrolled` the last one is unrolled after it."""

    def step(xs, per_layer):
        return run_layer(xs, *per_layer)

    per_layer = (layers, kvs, keys)
    if not last_unrolled:
        return jax.lax.scan(step, xs, per_layer)
    xs, new = jax.lax.scan(step, xs, jax.tree.map(lambda x: x[:-1], per_layer))
    xs, new_last = step(xs, jax.tree.map(lambda x: x[-1], per_layer))
    return xs, jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), new, new_last)


def _last_unrolled(levels, L: int) -> bool:
    """Whether the last layer leaves the loop over layers, at the price of a longer compilation.

    Of shared levels it then makes keys and values only, since their output is not used; inside the loop it
    must do all. That pays where they hold most of the tokens and a layer is a good part of the model: the
    original's update of 1 × 8 rows 2.97 -> 2.68 s, compiled in 13.0 instead of 11.5 s (docs/log.md). Weights are
    copied when cut from their stack, so deep models, which would gain little, keep one loop.
    """
    shared = sum(level.tokens.size for level in levels if level.shared)
    return L <= FEW_LAYERS and 2 * shared > sum(level.tokens.size for level in levels)


def _unroll(run_layer, xs, layers, kvs, keys):
    """Layers one by one; returned KVs hold lists (slicing a stack inside decode is 1.5–4x slower)."""
    per_layer = []
    for i, weights in enumerate(layers):
        own_keys = jax.tree.map(lambda key, i=i: key[i], keys)
        xs, new = run_layer(xs, weights, tuple(KV(kv.k[i], kv.v[i]) for kv in kvs), own_keys)
        per_layer.append(new)
    return xs, tuple(
        KV([kv.k for kv in level], [kv.v for kv in level]) for level in zip(*per_layer, strict=True)
    )
