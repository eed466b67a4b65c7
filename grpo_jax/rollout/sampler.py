"""Sampling on the device: prefill, decode to the end of a turn, feed tool responses.

The trunk (preamble and prompts) is prefilled once; each row owns a cache that
holds everything but one pending token. `decode` loops on the device: no Python
per token, one host read per call. A pass feeds a row its pending token and, where texts to copy
from are given, a draft of what follows (`drafts`). Every pass reads all slots of the cache, so the cache starts
small and grows as its rows do (`Sampler.fit`), and once few rows are still running, decode may
take those alone (`Sampler.rows_for`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models import target
from grpo_jax.models.cost import weights
from grpo_jax.models.level import KV, AnyArray, Level
from grpo_jax.models.lora import merge_layer
from grpo_jax.models.qwen import ModelConfig, Params, compiler_options, extend, head_weights
from grpo_jax.models.sharding import Layout
from grpo_jax.rollout.drafts import COMPARED, COPIED, DRAFTED, NONE, propose
from grpo_jax.rollout.sampling import Drawing, Sampling, sample

Trunk = tuple[tuple[KV, Bool[AnyArray, "n S"]], ...]

# Decode takes an eighth of its rows once no more of them are running: one more program. Simulated with what a pass of
# so many rows costs (docs/log.md), that takes 0.65 to 0.74 of the time where lengths differ little and 0.30 to 0.44
# where one row in eight is eight times as long; half of the rows in addition saves 2 to 7 % more, a quarter 1 % more.
PART = 8
# Weights times tokens of budget, the cost of decoding a row: above the quickstart's model (0.9 M weights, 63 tokens), whose
# rollouts took 45 s in all and one more program 3.5 s for each way of sampling, and below one of 135 M weights, where that
# takes 13 s and a pass of 4 of 32 rows 58 instead of 150 ms (docs/log.md).
COMPACT_FROM = 10**8
# A cache starts with so many slots and doubles; a smaller first size would save little next to the weights
# and cost one more program.
FIRST_SLOTS = 128
TILE = 16  # slots that a TPU keeps together in bfloat16
# Decode returns after so many tokens, so that a rollout can report and results of tools be fed: the same number on
# every host. At 17 ms a token a return takes 0.5 % of the time (docs/log.md).
MAX_STEPS = 32


class Cache(NamedTuple):
    """A batch of rows in flight; the cache holds every token but the pending one.

    Args:
        kv: per layer [B, K, S, H] keys and values of the row's own tokens.
        length: [B] int32 slots in use; a slot is valid when it is below.
        pending: [B] int32 the token that is fed next.
        position: [B] int32 its logical position.
        ids: [B, S] int32 the tokens of the slots, and the pending one after them.
        known: [B, C] int32 what drafts may be copied from in addition to `ids`, `NONE` where there is no token;
            C = 0 for no drafts.
    """

    kv: KV
    length: Int[Array, " B"]
    pending: Int[Array, " B"]
    position: Int[Array, " B"]
    ids: Int[Array, "B S"]
    known: Int[Array, "B C"]

    @property
    def drafted(self) -> int:
        """Tokens of a draft."""
        return DRAFTED if self.known.shape[1] else 0

    @property
    def room(self) -> int:
        """Tokens that a row may hold; one more slot takes what is computed for rows that have ended."""
        return self.kv.k[0].shape[2] - 1


class Decoded(NamedTuple):
    """What one call of decode sampled: a turn, or a part of one.

    Args:
        tokens: [B, n] int32, n at least `MAX_STEPS` or the cache's room; the first `count` of a row are real.
        logprobs: [B, n] float32 nats under the full distribution at the temperature.
        count: [B] int32 tokens sampled, the stop token included.
        stopped: [B] bool, the row ended with a stop token.
        row_steps: int32 scalar, the work done: passes times rows that took part, finished ones too.
        live_steps: int32 scalar, that of live rows only.
        sampled: int32 scalar, tokens of all rows.
    """

    tokens: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    count: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    row_steps: Int[Array, ""]
    live_steps: Int[Array, ""]
    sampled: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The jitted functions of a rollout and the sizes they were made for.

    Args:
        export: (stacked params) -> rollout params: the run's dtype, one dict per layer,
            adapters merged.
        prefill: (params, trunk so far, level) -> KV of the level.
        begin: (pending [B], position [B], slots = those of the first size, known = none) -> an empty Cache.
        decode: (params, trunk, cache, keys [B, 2], remaining [B], return_at = 0, rows = B) -> (cache, Decoded).
            Rows with tokens remaining are live. Samples until at most `return_at` rows are running, a row has no room left, or
            one has sampled `MAX_STEPS` tokens or a few more; computes `rows` rows, which must hold all that are live.
        append: (params, trunk, cache, tokens [B, T], count [B], pending [B], rows = B) -> cache, which must have the
            room. Computes `rows` rows at a time, until all that have a count are fed.
        pad: (keys or values of a layer, slots) -> the same with so many slots.
        budget: tokens after the prompt that a row may reach.
        layout: the rollout column.
    """

    export: Callable[[Params], Params]
    prefill: Callable[..., KV]
    begin: Callable[..., Cache]
    decode: Callable[..., tuple[Cache, Decoded]]
    append: Callable[..., Cache]
    pad: Callable[[Array, int], Array]
    budget: int
    layout: Layout
    compact: bool

    def fit(self, cache: Cache, tokens: int) -> Cache:
        """The cache with room for so many tokens of a row: itself, or a larger one that takes its place."""
        if tokens <= cache.room:
            return cache
        slots = next(size for size in cache_sizes(self.budget) if size > tokens)

        def grown(x: Array) -> Array:
            new = self.pad(x, slots)
            x.delete()  # layer by layer, so that old and new are never held together
            return new

        ids = jnp.pad(cache.ids, ((0, 0), (0, slots - cache.ids.shape[1])), constant_values=NONE)
        return cache._replace(kv=KV(*(list(map(grown, layers)) for layers in cache.kv)), ids=ids)

    def draftable(self, tokens: int) -> bool:
        """Whether rows of so many tokens have room for a draft, in the largest cache."""
        return tokens + 1 + DRAFTED <= self.budget

    def rows_for(self, live: int, cache: Cache, trunk: Trunk) -> int:
        """The fewest rows that decode may take for `live` ones."""
        B = len(cache.length)
        sizes = part_sizes(B, cache.room + 1, trunk, self.layout) if self.compact else (B,)
        return min(size for size in sizes if size >= live)

    def rows_fed(self, cache: Cache, trunk: Trunk) -> int:
        """The rows that one append takes: few, since a response costs the same for a row that has none."""
        return part_sizes(len(cache.length), cache.room + 1, trunk, self.layout)[-1]


def cache_sizes(budget: int) -> tuple[int, ...]:
    """Slots that a cache may have, rising: doubled while that saves a third of the last, which holds the budget.

    Except on a CPU the last fills whole tiles: `_scattered` would have to copy others.
    """
    last = budget + 1 if target.on_cpu() else -(-(budget + 1) // TILE) * TILE
    sizes = [FIRST_SLOTS]
    while sizes[-1] * 3 <= 2 * last:
        sizes.append(sizes[-1] * 2)
    return (*sizes[:-1], last)


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
        dtype: that weights and caches have.
        budget: tokens after the prompt that a row may reach.
        compact: leave finished rows out of decode; None: where `compaction_pays`.
    """
    functions = dict(_functions_of(cfg, layout, jnp.dtype(dtype), stop_ids, budget))
    jitted, drawing = functions.pop("decode"), sampling.drawing
    decode = lambda params, *args, **rows: jitted((params, drawing), *args, **rows)  # noqa: E731
    decode.lower = lambda params, *args, **rows: jitted.lower((params, drawing), *args, **rows)
    compact = compaction_pays(cfg, budget) if compact is None else compact
    return Sampler(**functions, decode=decode, budget=budget, layout=layout, compact=compact)


def compaction_pays(cfg: ModelConfig, budget: int) -> bool:
    """Whether decode should leave finished rows out: on a CPU, where its cost follows the rows.

    An accelerator's decode follows the bytes read. For Qwen3-1.7B in bf16 (3.44 GB of weights and
    115 kB a token; a preamble of 5,888 tokens, prompts of 128 in groups of 8, 513 slots a row, of
    which all are read) weights are 43 % of a step's 8.0 GB at 64 rows and 18 % of 19.6 GB at 256.
    By these bytes it would pay at 256 rows. It is off there all the same: no accelerator has
    measured it, and it holds an eighth of the rows' slots and prompts a second time.

    Args:
        budget: tokens after the prompt that a row may reach.
    """
    return target.on_cpu() and weights(cfg) * budget >= COMPACT_FROM


def part_sizes(B: int, slots: int, trunk: Trunk, layout: Layout) -> tuple[int, ...]:
    """Row counts that decode may take: B, and a part of it that fills the devices along data.

    Rows taken out have their prompt's keys and values copied next to their own; without the part where
    these copies would outgrow what the B rows hold (long prompts, nothing shared).
    """
    data = layout.mesh.shape["data"]
    few = -(-B // (PART * data)) * data
    own = [valid.shape for _, valid in trunk if valid.shape[0] > 1] + [(B, slots)]
    held, copied = sum(n * S for n, S in own), sum(S for _, S in own)
    return (B, few) if few < B and few * copied <= held else (B,)


@functools.cache
def _functions_of(cfg: ModelConfig, layout: Layout, dtype: jnp.dtype, stop_ids: tuple[int, ...], budget: int):
    """The jitted functions of a `Sampler` by name; samplers that differ in how a token is drawn share them."""

    def run(params, levels, segments):
        return extend(params, levels, segments, cfg=cfg, dtype=dtype, constrain=layout.constrain)

    def prefill(params, trunk, level):
        return run(params, (level,), trunk)[1][0]

    def begin(pending, position, slots=None, known=None):
        B, slots = len(pending), slots or cache_sizes(budget)[0]
        shape = (B, cfg.K, slots, cfg.H)
        empty = [layout.constrain(jnp.zeros(shape, dtype), "rows_kv") for _ in range(2 * cfg.L)]
        ids = jnp.full((B, slots), NONE).at[:, 0].set(pending)
        known = jnp.zeros((B, 0), jnp.int32) if known is None else known
        return Cache(
            KV(empty[: cfg.L], empty[cfg.L :]), jnp.zeros_like(pending), pending, position, ids, known
        )

    def pad(x, slots):
        return layout.constrain(jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))), "rows_kv")

    def append(params, trunk, cache, tokens, count, pending, rows=None):
        B = len(count)
        if rows is None or rows == B:
            return _append(run, params, trunk, cache, (tokens, count, pending), layout)
        order = jnp.argsort(count == 0, stable=True)

        def feed(state):
            first, cache = state
            at = jnp.minimum(first, B - rows) + jnp.arange(rows)
            chosen, now = order[at], at >= first  # those before are fed already
            of_rows = tuple(_take(s, chosen * s[1].shape[0] // B, layout) for s in trunk)
            given = tokens[chosen], jnp.where(now, count[chosen], 0), pending[chosen]
            part = _append(run, params, of_rows, _take(cache, chosen, layout), given, layout)
            return first + rows, _put(cache, chosen, part, layout)

        return jax.lax.while_loop(lambda state: state[0] < (count > 0).sum(), feed, (0, cache))[1]

    @jax.jit
    def placed(params):
        weights = jax.tree.map(lambda w: w.astype(dtype), params)
        return jax.lax.with_sharding_constraint(weights, layout.params(weights))

    @jax.jit
    def export_layer(stacked, i):
        return placed(merge_layer(*jax.tree.map(lambda w: w[i], stacked)))

    def export(params):
        stacked = params["layers"], params.get("lora")
        others = {name: weights for name, weights in params.items() if name not in ("layers", "lora")}
        # one small program for every layer: a single one took 3 to 6 s to compile for 30 of them
        return placed(others) | {"layers": [export_layer(stacked, i) for i in range(cfg.L)]}

    options = compiler_options(cfg.L)
    return {
        "export": export,
        "decode": _decode_function(run, cfg, layout, stop_ids),
        "prefill": jax.jit(prefill, compiler_options=options),
        "begin": jax.jit(begin, static_argnames="slots"),
        "pad": jax.jit(pad, static_argnames="slots"),
        "append": jax.jit(append, static_argnames="rows", donate_argnames="cache", compiler_options=options),
    }


def _decode_function(run, cfg: ModelConfig, layout: Layout, stop_ids: tuple[int, ...]):
    """`Sampler.decode`, given (weights, how a token is drawn) in place of the weights."""

    def decode_pass(trunk: Trunk, inputs: _Inputs, state: _State) -> _State:
        """Feed each row's pending token and its draft, sample what follows each of them, and keep what the draft
        had right and one token more; rows that have ended stay as they are."""
        # 1. Feed the pending token and the draft.
        params, cache, live, turn = inputs.params, state.cache, state.live, state.turn
        if cache.drafted:
            places = cache.length[:, None] - jnp.arange(COMPARED)[None]
            recent = jnp.take_along_axis(cache.ids, jnp.maximum(places, 0), 1)
            recent = jnp.where(places < 0, NONE, recent)
            draft, copied = propose(recent, jnp.concatenate([inputs.texts, cache.ids], 1), state.copied)
        else:
            draft, copied = jnp.zeros((len(live), 0), jnp.int32), state.copied
        fed = jnp.concatenate([cache.pending[:, None], jnp.maximum(draft, 0)], 1)
        B, T = fed.shape
        hidden, kv = _feed(run, params, trunk, cache, fed, live, layout)
        # 2. Draw the token that follows each fed token.
        logits = jnp.einsum(
            "bd,vd->bv", hidden.reshape(B * T, -1), head_weights(params), preferred_element_type=jnp.float32
        )
        logits = layout.constrain(logits, "decode_logits")
        to_come = (cache.position + live)[:, None] + jnp.arange(T)[None]
        keys = jnp.repeat(inputs.keys, T, 0)
        drawn = sample(logits, keys, to_come.reshape(-1), inputs.drawing, layout.constrain)
        token, logprob = (x.reshape(B, T) for x in drawn)
        # 3. Keep the drawn tokens as far as the draft was right, and one more.
        stops = (token[..., None] == jnp.asarray(stop_ids, jnp.int32)[None, None]).any(-1)
        accepted = jnp.cumprod((token[:, :-1] == draft) & ~stops[:, :-1], 1)
        kept = live[:, None] & jnp.pad(accepted, ((0, 0), (1, 0)), constant_values=1).astype(bool)
        kept &= turn.count[:, None] + jnp.arange(T)[None] < inputs.remaining[:, None]
        n, stopped = kept.sum(1), (kept & stops).any(1)
        last = jnp.take_along_axis(token, jnp.maximum(n - 1, 0)[:, None], 1)[:, 0]
        # 4. Advance the rows.
        cache = cache._replace(
            kv=kv,
            length=cache.length + n,
            position=cache.position + n,
            pending=jnp.where(live, last, cache.pending),
            ids=_written(cache.ids, token, cache.length + 1, kept),
        )
        turn = Decoded(
            _written(turn.tokens, token, turn.count, kept),
            _written(turn.logprobs, logprob, turn.count, kept),
            turn.count + n,
            turn.stopped | stopped,
            turn.row_steps + B,
            turn.live_steps + live.sum(),
            turn.sampled + n.sum(),
        )
        copied = jnp.where(n > COPIED, copied + n, state.copied)
        return _State(cache, live & ~stopped & (turn.count < inputs.remaining), turn, copied)

    def decode(policy, trunk, cache, keys, remaining, return_at=0, rows=None):
        params, drawing = policy
        B, live, zero = len(remaining), remaining > 0, jnp.int32(0)
        zeros = jnp.zeros((B, min(MAX_STEPS, cache.room) + cache.drafted), jnp.int32)
        turn = Decoded(zeros, zeros.astype(jnp.float32), zeros[:, 0], zeros[:, 0] > 0, zero, zero, zero)
        state = _State(cache, live, turn, zeros[:, 0])
        read = _Inputs(params, drawing, keys, remaining, _texts(cache, trunk))
        few = rows is not None and rows < B
        if few:
            chosen = jnp.argsort(~state.live, stable=True)[:rows]  # all that are live, and finished ones
            trunk = tuple(_take(s, chosen * s[1].shape[0] // B, layout) for s in trunk)
            read, whole = _Inputs(params, drawing, *_take(read[2:], chosen, layout)), state
            state = _take(state, chosen, layout)
        step = decode_pass
        if target.on_cpu() and target.device_count() == 1:
            # The keys lie in memory as a CPU multiplies them. Otherwise XLA transposes those of every layer at
            # every token: 1.0 of 8.4 ms at the original TRL recipe's 5,800 tokens (docs/log.md).
            in_order = functools.partial(with_layout_constraint, layouts=MemoryLayout((0, 1, 2, 3)))
            trunk = tuple(
                (KV(list(map(in_order, kv.k)), kv.v), valid) for kv, valid in _keys_transposed(trunk)
            )
            step = lambda trunk, *args: decode_pass(_keys_transposed(trunk), *args)  # noqa: E731

        def unfinished(state):
            longest = jnp.where(state.live, state.cache.length, 0).max()
            room = longest + cache.drafted < cache.room
            return (state.live.sum() > return_at) & (state.turn.count.max() < MAX_STEPS) & room

        state = jax.lax.while_loop(unfinished, functools.partial(step, trunk, read), state)
        if few:
            state = _put(whole, chosen, state, layout)
        return state.cache, state.turn

    return jax.jit(
        decode, static_argnames="rows", donate_argnames="cache", compiler_options=compiler_options(cfg.L)
    )


class _Inputs(NamedTuple):
    """What decode reads and does not change; the trunk is passed separately."""

    params: Params
    drawing: Drawing
    keys: Any
    remaining: Int[Array, " B"]
    texts: Int[Array, "B C"]


class _State(NamedTuple):
    """What decode changes: by row, except for scalars; `copied` is where in its texts a row copied last."""

    cache: Cache
    live: Bool[Array, " B"]
    turn: Decoded
    copied: Int[Array, " B"]


def _keys_transposed(trunk: Trunk) -> Trunk:
    """The trunk with its keys as [n, K, H, S]; its own inverse."""
    return tuple((KV([k.swapaxes(2, 3) for k in kv.k], kv.v), valid) for kv, valid in trunk)


def _take(tree, rows, layout):
    """Some rows of every array; scalars, and what all rows share, as they are."""
    return jax.tree.map(lambda x: _placed(x[rows], layout) if x.ndim and x.shape[0] > 1 else x, tree)


def _put(tree, rows, taken, layout):
    """The inverse of `_take` for arrays by row."""
    return jax.tree.map(lambda x, new: _placed(x.at[rows].set(new), layout) if x.ndim else new, tree, taken)


def _placed(x, layout):
    return layout.constrain(x, "rows_kv") if x.ndim == 4 else x


def _feed(run, params, trunk, cache, tokens, live, layout):
    """Feed live rows their next tokens [B, T]; returns the hidden states, and the cache's keys and values with theirs."""
    B, T = tokens.shape
    positions = cache.position[:, None] + jnp.arange(T)[None]
    level = Level(tokens, positions, jnp.broadcast_to(live[:, None], (B, T)))
    (hidden,), (new,) = run(params, (level,), (*trunk, _own(cache)))
    # The slot is `length`. It waits for the last layer, because XLA copies a cache whole, twice a step, when it
    # cannot tell that the write comes after every read (a barrier is gone by the time it decides).
    slot = jnp.where(jnp.isfinite(hidden[:, 0, 0]), cache.length, 0)

    def write(old, x, at, live):
        # a row that is not live may have no room for T; one token has a slot of its own, after the last
        if T > 1:
            x = jnp.where(live, x, jax.lax.dynamic_slice_in_dim(old, at, T, 1))
        return jax.lax.dynamic_update_slice(old, x, (0, at, 0))

    def written(old, x):
        if target.on_cpu():
            return jax.vmap(write)(old, x, slot, live)
        slots = slot[:, None] + jnp.arange(T)[None]
        return _scattered(old, x, slots if T == 1 else jnp.where(live[:, None], slots, old.shape[2]), layout)

    return hidden, KV(*(list(map(written, old, x)) for old, x in zip(cache.kv, new, strict=True)))


def _scattered(old, x, slots, layout):
    """old [B, K, S, H] with x [B, K, T, H] in each row's slots [B, T]; S, out of range, is dropped.

    As a scatter of rows of one matrix, which a TPU does in place. Compiled for one, the form of a CPU becomes a loop
    over the rows of every layer's keys and values, and one with rows, heads and slots as dimensions changes the
    layout that attention reads (docs/log.md). Every device writes its own heads: no matrix of all is sharded.
    """

    def write(old, x, slots):
        (B, K, S, H), T = old.shape, x.shape[2]
        first = S * jnp.arange(B * K).reshape(B, K, 1)
        at = jnp.where(slots[:, None] < S, first + slots[:, None], B * K * S)
        matrix = old.reshape(-1, H).at[at.reshape(-1)].set(x.reshape(B * K * T, H), mode="drop")
        return matrix.reshape(old.shape)

    if layout.mesh.size == 1:
        return write(old, x, slots)
    of_old, of_x = (layout.activation(a.shape, "rows_kv").spec for a in (old, x))
    specs = (of_old, of_x, layout.rows(slots).spec)
    return jax.shard_map(write, mesh=layout.mesh, in_specs=specs, out_specs=of_old)(old, x, slots)


def _texts(cache, trunk):
    """What each row's draft may be copied from: what it knows, and what its group has written so far, [B, C]."""
    if not cache.drafted:
        return cache.known
    B, S = cache.ids.shape
    groups = trunk[-1][1].shape[0] if trunk else B
    of_group = jnp.repeat(cache.ids.reshape(groups, B // groups * S), B // groups, 0)
    return jnp.concatenate([cache.known, of_group], 1)


def _written(old, new, start, kept):
    """old [B, n] with the kept ones of new [B, T] from `start` [B] on."""
    rows, places = jnp.arange(len(old))[:, None], start[:, None] + jnp.arange(new.shape[1])[None]
    return old.at[rows, jnp.where(kept, places, old.shape[1])].set(new, mode="drop")


def _append(run, params, trunk, cache, fed, layout):
    """Feed (tokens, count, new pending token) of each row: the pending one and a response except for its last."""
    tokens, count, pending = fed
    B, T = tokens.shape
    t = jnp.arange(T)[None]
    valid = t < count[:, None]
    level = Level(tokens, cache.position[:, None] + t, valid)
    _, (new,) = run(params, (level,), (*trunk, _own(cache)))
    S = cache.kv.k[0].shape[2]
    slots = jnp.where(valid, cache.length[:, None] + t, S)  # out of range is dropped

    def write(old, x):
        if not target.on_cpu():
            return _scattered(old, x, slots, layout)
        return old.at[jnp.arange(B)[:, None], :, slots].set(x.swapaxes(1, 2), mode="drop")

    kv = KV(*(list(map(write, old, x)) for old, x in zip(cache.kv, new, strict=True)))
    length, grown = cache.length + count, count > 0
    ids = _written(cache.ids, tokens, cache.length, valid)
    return cache._replace(
        kv=kv,
        length=length,
        position=cache.position + count,
        pending=jnp.where(grown, pending, cache.pending),
        ids=_written(ids, pending[:, None], length, grown[:, None]),
    )


def _own(cache: Cache):
    S = cache.kv.k[0].shape[2]
    return cache.kv, jnp.arange(S)[None] < cache.length[:, None]
