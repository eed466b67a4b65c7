"""Sampling on the device: prefill, decode to the end of a turn, feed tool responses.

The trunk (preamble and prompts) is prefilled once; each row owns a cache that
holds everything but one pending token. `decode` loops on the device: no Python
per token, one host read per call. Once few rows of a call go on, it may go on with
those alone (see `compaction_pays`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, UInt32

from grpo_jax.models import target
from grpo_jax.models.lora import merge_layer
from grpo_jax.models.qwen import ALL_ROUNDINGS, KV, Level, ModelConfig, Params, extend, head_weights
from grpo_jax.models.sharding import Layout

Trunk = tuple[tuple[KV, Bool[Array, "n S"]], ...]

# Decode goes on with half of its rows, then with an eighth, once no more of them go on: each is a program more.
# With one row in eight eight times as long, and lengths spread by 20 %, finished rows are then 12 % of the work
# on 128 rows and not 80 % (simulated); a quarter between the two saves no point more, a sixteenth after them three.
PARTS = (1, 2, 8)
# tokens of budget: two more programs take 7 s of CPU time to compile for the quickstart's model, and as much again
# for the greedy sampler; the whole rollouts of its 110 steps, half as long, take 45 s
COMPACT_FROM = 128
BLOCKS = 128  # of the vocabulary, for drawing a token in two steps


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

    @property
    def truncates(self) -> bool:
        """Whether any token is left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


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
        row_steps: int32 scalar, the work done: steps times rows that took part, finished ones too.
        live: int32 scalar, rows that have not come to the end of their turn, on all hosts.
    """

    tokens: Int[Array, "B budget"]
    logprobs: Float[Array, "B budget"]
    count: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    row_steps: Int[Array, ""]
    live: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The jitted functions of a rollout and the sizes they were made for.

    Args:
        export: (stacked params) -> rollout params: the run's dtype, one dict per layer,
            adapters merged.
        prefill: (params, trunk so far, level) -> KV of the level.
        begin: (pending [B], position [B]) -> an empty Cache.
        decode: (params, trunk, cache, keys [B, 2], live [B], remaining [B], stop_at = 0) ->
            (cache, Turn). Samples until at most `stop_at` rows go on.
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
    compact: bool | None = None,
) -> Sampler:
    """Build the jitted functions of a rollout for one model, mesh and way of sampling.

    Args:
        cfg: the model's sizes.
        layout: the rollout column.
        dtype: of weights and caches.
        sampling: how a token is drawn.
        stop_ids: tokens that end a row's turn.
        budget: tokens after the prompt that a row may reach.
        compact: leave finished rows out of decode; None: where `compaction_pays`.
    """
    run, shared = _shared_functions(cfg, layout, jnp.dtype(dtype), budget)
    compact = compaction_pays(budget) if compact is None else compact

    def decode(params, trunk, cache, keys, live, remaining, stop_at=0):
        step = functools.partial(_sample_step, run, params, sampling, stop_ids, layout)
        B = live.shape[0]
        sizes = part_sizes(B, budget + 1, trunk, layout) if compact else (B,)
        return _decode(step, sizes, layout, trunk, cache, keys, live, remaining, stop_at, budget)

    decode = jax.jit(decode, donate_argnames="cache", compiler_options=ALL_ROUNDINGS)
    return Sampler(**shared, decode=decode, budget=budget, layout=layout)


def compaction_pays(budget: int, on_cpu: bool | None = None) -> bool:
    """Whether decode should leave finished rows out: on a CPU, where its cost follows the rows.

    An accelerator's decode follows the bytes read. For Qwen3-1.7B in bf16 (3.44 GB of weights and
    115 kB a token; a preamble of 5,888 tokens, prompts of 128 in groups of 8, 513 slots a row, of
    which all are read) weights are 43 % of a step's 8.0 GB at 64 rows and 18 % of 19.6 GB at 256.
    By these bytes it would pay at 256 rows. It is off there all the same: no accelerator has
    measured it, and it holds up to half of the rows' slots and prompts a second time.

    Args:
        budget: tokens after the prompt that a row may reach.
        on_cpu: None: as the program's target.
    """
    on_cpu = target.on_cpu() if on_cpu is None else on_cpu
    return on_cpu and budget >= COMPACT_FROM


def part_sizes(B: int, slots: int, trunk: Trunk, layout: Layout) -> tuple[int, ...]:
    """Row counts that decode may shrink to, falling from B; each fills the devices along data.

    Rows taken out have their prompt's keys and values copied beside their own; a size whose
    copies would outgrow what the B rows hold (long prompts, nothing shared) is left out.
    """
    data = layout.mesh.shape["data"]
    sizes = {-(-B // (part * data)) * data for part in PARTS}
    own = [valid.shape for _, valid in trunk if valid.shape[0] > 1] + [(B, slots)]
    held, copied = sum(n * S for n, S in own), sum(S for _, S in own)
    return (B, *sorted((n for n in sizes if n < B and n * copied <= held), reverse=True))


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
        params = dict(params)
        stacked = params["layers"], params.pop("lora", None)
        layers = [merge_layer(*jax.tree.map(lambda w, i=i: w[i], stacked)) for i in range(cfg.L)]
        exported = jax.tree.map(lambda w: w.astype(dtype), params | {"layers": layers})
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


class _State(NamedTuple):
    """What decode changes: by row, but for scalars."""

    cache: Cache
    live: Bool[Array, " B"]
    turn: Turn
    t: Int[Array, ""]


def _decode(step, sizes, layout, trunk, cache, keys, live, remaining, stop_at, budget):
    """Sample on all rows until those that go on fit the next size, then on so many, and so on."""
    B = live.shape[0]
    zeros = jnp.zeros((B, budget), jnp.int32)
    turn = Turn(zeros, zeros.astype(jnp.float32), zeros[:, 0], zeros[:, 0] > 0, jnp.int32(0), jnp.int32(0))
    state = _State(cache, live & (remaining > 0), turn, jnp.int32(0))

    def on_few_rows(size, until, state):
        rows = jnp.argsort(~state.live, stable=True)[:size]  # all that go on, filled up with finished ones
        of_rows = [_take(s, rows * s[1].shape[0] // B, layout) for s in trunk]
        go_on = functools.partial(step, tuple(of_rows), keys[rows], remaining[rows])
        return _put(state, rows, _while_above(until, go_on, _take(state, rows, layout)), layout)

    if target.on_cpu() and target.device_count() == 1:
        trunk, step = _turned_once(trunk), functools.partial(_with_turned, step)
    first, *ends = (jnp.maximum(fewer, stop_at) for fewer in (*sizes[1:], 0))
    state = _while_above(first, functools.partial(step, trunk, keys, remaining), state)
    for size, until in zip(sizes[1:], ends, strict=True):
        few_rows = functools.partial(on_few_rows, size, until)
        state = jax.lax.cond(state.live.sum() > until, few_rows, lambda same: same, state)
    return state.cache, state.turn._replace(live=state.live.sum())


def _turned(trunk: Trunk) -> Trunk:
    """The trunk with its keys as [n, K, H, S]; its own inverse."""
    return tuple((KV([k.swapaxes(2, 3) for k in kv.k], kv.v), valid) for kv, valid in trunk)


def _turned_once(trunk: Trunk) -> Trunk:
    """`_turned`, and laid out so in memory, as a CPU multiplies keys.

    XLA would else turn every layer's keys at every token: 1.0 of 8.4 ms at the recipe's 5,800 (docs/log.md).
    """

    def laid_out(k):
        return with_layout_constraint(k, MemoryLayout((0, 1, 2, 3)))

    return tuple((KV(list(map(laid_out, kv.k)), kv.v), valid) for kv, valid in _turned(trunk))


def _with_turned(step, trunk, *args):
    return step(_turned(trunk), *args)


def _while_above(until, body, state: _State) -> _State:
    """Repeat `body` while more than `until` rows go on."""
    return jax.lax.while_loop(lambda s: s.live.sum() > until, body, state)


def _take(tree, rows, layout):
    """Some rows of every array; scalars, and what all rows share, as they are."""
    return jax.tree.map(lambda x: _placed(x[rows], layout) if x.ndim and x.shape[0] > 1 else x, tree)


def _put(tree, rows, taken, layout):
    """The inverse of `_take` for arrays by row."""
    return jax.tree.map(lambda x, new: _placed(x.at[rows].set(new), layout) if x.ndim else new, tree, taken)


def _placed(x, layout):
    return layout.constrain(x, "rows_kv") if x.ndim == 4 else x


def _sample_step(run, params, sampling, stop_ids, layout, trunk, keys, remaining, state: _State) -> _State:
    """Feed each row's pending token and sample the next; rows that have ended stay as they are."""
    _, live, turn, t = state
    hidden, cache = _step(run, params, trunk, state.cache, live)
    logits = jnp.einsum("bd,vd->bv", hidden, head_weights(params), preferred_element_type=jnp.float32)
    logits = layout.constrain(logits, "decode_logits")
    token, logprob = sample(logits, keys, cache.position, sampling)
    stopped = live & (token[:, None] == jnp.asarray(stop_ids, jnp.int32)).any(1)
    turn = Turn(
        turn.tokens.at[:, t].set(jnp.where(live, token, 0)),
        turn.logprobs.at[:, t].set(jnp.where(live, logprob, 0)),
        turn.count + live,
        turn.stopped | stopped,
        turn.row_steps + live.shape[0],
        turn.live,
    )
    cache = cache._replace(pending=jnp.where(live, token, cache.pending))
    return _State(cache, live & ~stopped & (turn.count < remaining), turn, t + 1)


def _step(run, params, trunk, cache, live):
    """Feed the pending tokens of live rows; afterwards `position` is that of the token to come."""
    level = Level(cache.pending[:, None], cache.position[:, None], live[:, None])
    (hidden,), (new,) = run(params, (level,), (*trunk, _own(cache)))
    # The slot is `length`. It waits for the last layer, because XLA copies a cache whole, twice a step, when it
    # cannot tell that the write comes after every read (a barrier is gone by the time it decides).
    slot = jnp.where(jnp.isfinite(hidden[:, 0, 0]), cache.length, 0)

    def write(old, x):
        return jax.vmap(lambda o, n, at: jax.lax.dynamic_update_slice(o, n, (0, at, 0)))(old, x, slot)

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
    if sampling.temperature != 0:
        logits = logits / sampling.temperature
    log_z = jax.nn.logsumexp(_block_log_masses(logits), 1)
    if sampling.temperature == 0:
        token = jnp.argmax(logits, -1)
    else:
        drawn = logits
        if sampling.truncates:
            mass = jnp.exp(logits - logits.max(-1, keepdims=True))
            drawn = jnp.where(_kept(mass, sampling), logits, -jnp.inf)
        token = _inverse_cdf(drawn, jax.vmap(_uniforms)(keys, positions))
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


def _in_blocks(logits):
    """[B, 128, V / 128], filled up with -inf."""
    B, V = logits.shape
    return jnp.pad(logits, ((0, 0), (0, -V % BLOCKS)), constant_values=-jnp.inf).reshape(B, BLOCKS, -1)


def _block_log_masses(logits):
    """[B, 128] log Σ exp over a block; -inf where nothing has mass.

    Each block is measured by its own peak: a CPU then does all of it in two passes over the logits, where one
    peak for the row took four (docs/log.md).
    """
    blocks = _in_blocks(logits)
    peaks = jnp.maximum(blocks.max(-1, keepdims=True), jnp.finfo(logits.dtype).min)
    return (peaks + jnp.log(jnp.exp(blocks - peaks).sum(-1, keepdims=True)))[..., 0]


def _inverse_cdf(logits, uniforms):
    """First choose a block by its mass, then a token within the block by its own."""
    blocks, log_masses = _in_blocks(logits), _block_log_masses(logits)
    block = _first_above(jnp.exp(log_masses - log_masses.max(-1, keepdims=True)), uniforms[:, 0])[:, None]
    chosen = jnp.take_along_axis(blocks, block[..., None], 1)[:, 0]
    inside = jnp.exp(chosen - jnp.take_along_axis(log_masses, block, 1))
    return block[:, 0] * blocks.shape[2] + _first_above(inside, uniforms[:, 1])


def _first_above(mass, u):
    """The first entry where the cumulated mass exceeds u of the total; never one without mass."""
    cumulated = jnp.cumsum(mass, -1)
    positive = mass > 0
    above = positive & (cumulated > u[:, None] * cumulated[:, -1:])
    last = mass.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], -1)
    return jnp.where(above.any(-1), jnp.argmax(above, -1), last)
