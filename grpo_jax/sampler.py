"""Sampling on the device: prefill, decode to the end of a turn, feed tool responses.

The trunk (preamble and prompts) is prefilled once; each row owns a cache that
holds everything but one pending token. `decode` is one `lax.while_loop` per
turn: no Python per token, one host read per turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from grpo_jax.models.qwen import ALL_ROUNDINGS, KV, Level, ModelConfig, Params, extend, head_weights
from grpo_jax.sharding import Layout

Trunk = tuple[tuple[KV, Bool[Array, "n S"]], ...]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; `temperature` 0 is greedy.

    Args:
        temperature: divides the logits.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose mass reaches it.
        min_p: keep tokens with at least this share of the likeliest token's probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Cache(NamedTuple):
    """A batch of rows in flight; the cache holds every token but the pending one.

    Args:
        kv: per layer [B, K, S, H] keys and values of the row's own tokens.
        length: [B] int32 slots in use; a slot is valid when it is below.
        pending: [B] int32 the token that is fed next.
        position: [B] int32 its logical position.
    """

    kv: KV
    length: Int[Array, " B"]
    pending: Int[Array, " B"]
    position: Int[Array, " B"]


class Turn(NamedTuple):
    """What one decode produced.

    Args:
        tokens: [B, budget] int32, the first `count` of a row are real.
        logprobs: [B, budget] float32 nats under the full distribution at the temperature.
        count: [B] int32 tokens sampled, the stop token included.
        stopped: [B] bool, the row ended with a stop token.
    """

    tokens: Int[Array, "B budget"]
    logprobs: Float[Array, "B budget"]
    count: Int[Array, " B"]
    stopped: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The jitted functions of a rollout and the sizes they were made for.

    Args:
        export: (stacked params) -> rollout params: the run's dtype, one dict per layer.
        prefill: (params, trunk so far, level) -> KV of the level.
        begin: (pending [B], position [B]) -> an empty Cache.
        decode: (params, trunk, cache, keys [B, 2], live [B], remaining [B]) -> (cache, Turn).
        append: (params, trunk, cache, tokens [B, T], count [B], pending [B]) -> cache.
        budget: tokens after the prompt that a row may reach.
        layout: the rollout column.
    """

    export: Callable[[Params], Params]
    prefill: Callable[..., KV]
    begin: Callable[..., Cache]
    decode: Callable[..., tuple[Cache, Turn]]
    append: Callable[..., Cache]
    budget: int
    layout: Layout


def make_sampler(
    cfg: ModelConfig,
    layout: Layout,
    *,
    dtype: jnp.dtype,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    budget: int,
) -> Sampler:
    """Build the jitted functions of a rollout for one model, mesh and way of sampling."""
    run, shared = _shared_functions(cfg, layout, jnp.dtype(dtype), budget)

    def decode(params, trunk, cache, keys, live, remaining):
        return _decode(run, params, trunk, cache, keys, live, remaining, sampling, stop_ids, budget, layout)

    decode = jax.jit(decode, donate_argnames="cache", compiler_options=ALL_ROUNDINGS)
    return Sampler(**shared, decode=decode, budget=budget, layout=layout)


@functools.cache
def _shared_functions(cfg: ModelConfig, layout: Layout, dtype: jnp.dtype, budget: int):
    """What does not depend on the way of sampling: greedy and random samplers compile it once."""

    def run(params, levels, segments):
        return extend(params, levels, segments, cfg=cfg, dtype=dtype, constrain=layout.constrain)

    def prefill(params, trunk, level):
        return run(params, (level,), trunk)[1][0]

    def begin(pending, position):
        shape = (pending.shape[0], cfg.K, budget + 1, cfg.H)
        empty = [layout.constrain(jnp.zeros(shape, dtype), "rows_kv") for _ in range(2 * cfg.L)]
        return Cache(KV(empty[: cfg.L], empty[cfg.L :]), jnp.zeros_like(pending), pending, position)

    def append(params, trunk, cache, tokens, count, pending):
        return _append(run, params, trunk, cache, tokens, count, pending)

    def export(params):
        layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(cfg.L)]
        exported = jax.tree.map(lambda w: w.astype(dtype), dict(params, layers=layers))
        return jax.lax.with_sharding_constraint(exported, layout.params(exported))

    return run, {
        "export": jax.jit(export),
        "prefill": jax.jit(prefill, compiler_options=ALL_ROUNDINGS),
        "begin": jax.jit(begin),
        "append": jax.jit(append, donate_argnames="cache", compiler_options=ALL_ROUNDINGS),
    }


@jax.jit
def row_keys(
    seed: Int[Array, ""], draws: Int[Array, " B"], generations: Int[Array, " B"]
) -> UInt32[Array, "B 2"]:
    """A row's own randomness: fold_in(seed, global draw index, generation); `decode` adds the position."""

    def one(draw, generation):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), draw)
        return jax.random.key_data(jax.random.fold_in(key, generation))

    return jax.vmap(one)(draws, generations)


def _decode(run, params, trunk, cache, keys, live, remaining, sampling, stop_ids, budget, layout):
    B = live.shape[0]
    head = head_weights(params)
    stops = jnp.asarray(stop_ids, jnp.int32)

    def body(carry):
        cache, live, turn, t = carry
        hidden, cache = _step(run, params, trunk, cache, live)
        logits = jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)
        logits = layout.constrain(logits[:, None], "logits")[:, 0]
        token, logprob = sample(logits, keys, cache.position, sampling)
        stopped = live & (token[:, None] == stops).any(1)
        turn = Turn(
            turn.tokens.at[:, t].set(jnp.where(live, token, 0)),
            turn.logprobs.at[:, t].set(jnp.where(live, logprob, 0)),
            turn.count + live,
            turn.stopped | stopped,
        )
        cache = cache._replace(pending=jnp.where(live, token, cache.pending))
        return cache, live & ~stopped & (turn.count < remaining), turn, t + 1

    turn = Turn(
        jnp.zeros((B, budget), jnp.int32),
        jnp.zeros((B, budget), jnp.float32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(B, bool),
    )
    live = live & (remaining > 0)
    cache, _, turn, _ = jax.lax.while_loop(lambda c: c[1].any(), body, (cache, live, turn, 0))
    return cache, turn


def _step(run, params, trunk, cache, live):
    """Feed the pending tokens of live rows; afterwards `position` is that of the token to come."""
    level = Level(cache.pending[:, None], cache.position[:, None], live[:, None])
    (hidden,), (new,) = run(params, (level,), (*trunk, _own(cache)))

    def write(old, x):
        return jax.vmap(lambda o, n, at: jax.lax.dynamic_update_slice(o, n, (0, at, 0)))(old, x, cache.length)

    kv = KV(*(list(map(write, old, x)) for old, x in zip(cache.kv, new, strict=True)))
    advanced = Cache(kv, cache.length + live, cache.pending, cache.position + live)
    return hidden[:, 0], advanced


def _append(run, params, trunk, cache, tokens, count, pending):
    """Feed `count` known tokens per row (the pending one and a response but for its last)."""
    B, T = tokens.shape
    t = jnp.arange(T)
    valid = t < count[:, None]
    level = Level(tokens, cache.position[:, None] + t, valid)
    _, (new,) = run(params, (level,), (*trunk, _own(cache)))
    S = cache.kv.k[0].shape[2]
    slots = jnp.where(valid, cache.length[:, None] + t, S)  # out of range is dropped

    def write(old, x):
        return old.at[jnp.arange(B)[:, None], :, slots].set(x.swapaxes(1, 2), mode="drop")

    kv = KV(*(list(map(write, old, x)) for old, x in zip(cache.kv, new, strict=True)))
    pending = jnp.where(count > 0, pending, cache.pending)
    return Cache(kv, cache.length + count, pending, cache.position + count)


def _own(cache: Cache):
    S = cache.kv.k[0].shape[2]
    return cache.kv, jnp.arange(S) < cache.length[:, None]


def sample(
    logits: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    positions: Int[Array, " B"],
    sampling: Sampling,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token per row, and its log-probability in nats under the untruncated distribution.

    Inverse CDF in two steps with two uniforms: one float32 uniform never reaches some
    40 k of 151,936 tokens. 6.7 ms against 106 ms for `jax.random.categorical` (B = 16, CPU).
    """
    if sampling.temperature == 0:
        token = jnp.argmax(logits, -1)
    else:
        logits = logits / sampling.temperature
    peak = logits.max(-1, keepdims=True)
    mass = jnp.exp(logits - peak)
    log_z = peak[:, 0] + jnp.log(mass.sum(-1))
    if sampling.temperature != 0:
        uniforms = jax.vmap(_uniforms)(keys, positions)
        token = _inverse_cdf(jnp.where(_kept(mass, sampling), mass, 0), uniforms)
    logprob = jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - log_z
    return token.astype(jnp.int32), logprob


def _uniforms(key_data, position):
    key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(key, position), (2,))


def _kept(mass, sampling):
    """The tokens that top-k, top-p and min-p leave, as transformers' warpers do in this order."""
    kept = jnp.ones(mass.shape, bool)
    if sampling.top_k > 0:
        kth = jax.lax.top_k(mass, min(sampling.top_k, mass.shape[-1]))[0][:, -1:]
        kept = mass >= kth
    if sampling.top_p < 1:
        allowed = jnp.where(kept, mass, 0)
        ordered = jnp.sort(allowed, -1, descending=True)
        before = jnp.cumsum(ordered, -1) - ordered
        needed = before < sampling.top_p * allowed.sum(-1, keepdims=True)
        kept &= mass >= jnp.where(needed, ordered, jnp.inf).min(-1, keepdims=True)
    if sampling.min_p > 0:
        kept &= mass >= sampling.min_p  # the likeliest token has mass 1
    return kept


def _inverse_cdf(mass, uniforms):
    """First choose a block by its mass, then a token within the block by its own."""
    B, V = mass.shape
    blocks = 128
    width = -(-V // blocks)
    mass = jnp.pad(mass, ((0, 0), (0, blocks * width - V))).reshape(B, blocks, width)
    block = _first_above(mass.sum(-1), uniforms[:, 0])
    inside = jnp.take_along_axis(mass, block[:, None, None], 1)[:, 0]
    return block * width + _first_above(inside, uniforms[:, 1])


def _first_above(mass, u):
    """The first entry where the cumulated mass exceeds u of the total; never one without mass."""
    cumulated = jnp.cumsum(mass, -1)
    positive = mass > 0
    above = positive & (cumulated > u[:, None] * cumulated[:, -1:])
    last = mass.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], -1)
    return jnp.where(above.any(-1), jnp.argmax(above, -1), last)
