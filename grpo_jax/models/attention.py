"""Attention over shared segments: a softmax of each, merged by one log-sum-exp of all; exact gradients.

A key/value segment with n rows serves B/n query rows each and is read once, as
one matrix product. Scores exist only block by block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from grpo_jax.models.target import device_count, on_cpu

KEPT = "kept"  # what `jax.checkpoint` policies call it: see `keep`
NEG = -1e30  # the first running maximum; not -inf: a fully masked row must give zeros, not NaN
MASKED = -2e30  # below NEG, so that exp(MASKED - maximum) is 0 even where everything is masked
KEY_BLOCK = 512  # keys of a block once a segment is cut


class Segment(NamedTuple):
    """Keys and values that queries may attend to.

    Args:
        k: [n, K, S, H] keys, n dividing the number of query rows.
        v: [n, K, S, H] values.
        valid: [n, S] bool, False slots are never attended to.
    """

    k: Float[Array, "n K S H"]
    v: Float[Array, "n K S H"]
    valid: Bool[Array, "n S"]


class _Blocks(NamedTuple):
    """How blocks of scores are cut; see `attend`."""

    score_bytes: int
    cut_queries: bool


class _Tiling(NamedTuple):
    """Static plan for one segment: which (query block, key block) pairs are computed."""

    query_block: int
    key_block: int
    pairs: tuple[tuple[int, int], ...]


def attend(
    q: Float[Array, "B T N H"],
    segments: tuple[Segment, ...],
    own: Segment,
    score_bytes: int | None = None,
    tokens_sharded: bool = False,
) -> Float[Array, "B T N H"]:
    """Softmax attention over every segment and, causally, over the queries' own keys.

    Args:
        q: queries; N = K·R heads, head n uses key/value head n // R.
        segments: attended in full, where valid.
        own: [B, K, T, H] keys and values of the queries' own tokens, attended causally.
        score_bytes: what one block of fp32 scores should stay under (blocks have at least
            128 queries and keys); None means 12 MB on a CPU, where blocks that stay in the
            cache are 3 to 6 times faster than 50 MB, and 512 MB elsewhere.
        tokens_sharded: on several devices each has a part of T, as in `sharding` the levels that all rows
            share: only keys are cut into blocks then, since a block of queries would lie on one device, and
            XLA would have all devices compute all of them.

    Returns:
        [B, T, N, H] in q's dtype; zeros for a query that may attend to nothing.

    Source: online softmax after Milakov & Gimelshein, arXiv:1805.02867; backward as in
        FlashAttention-2, arXiv:2307.08691, with the log-sum-exp taken over all segments.
    """
    B, T, N, H = q.shape
    K = own.k.shape[1]
    if score_bytes is None:
        score_bytes = score_block_bytes(on_cpu())
    q_BKRTH = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    blocks = _Blocks(score_bytes, cut_queries=not (tokens_sharded and device_count() > 1))
    o_BKRTH: Any = _attend(q_BKRTH, (*segments, own), blocks)
    return o_BKRTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def keep(x: Array) -> Array:
    """x, which a layer under `jax.checkpoint` keeps for its backward pass; bfloat16 as bits.

    XLA slices bfloat16 in float32 on a CPU: every layer would convert the stack of all layers' values there
    and back, and the backward pass would hold a copy of it twice as large (docs/log.md). Bits are left alone.
    """
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, KEPT)
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), KEPT)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def score_block_bytes(on_cpu: bool) -> int:
    """What one block of fp32 scores should stay under where the caller does not say."""
    return (12 if on_cpu else 512) << 20


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(q_BKRTH, segments, blocks):
    return _forward(q_BKRTH, segments, blocks)[0]


def _forward(q_BKRTH, segments, blocks):
    rows = q_BKRTH.shape[:4]
    parts = []
    for i, segment in enumerate(segments):
        n, causal = segment.k.shape[0], i == len(segments) - 1
        q = _by_segment(q_BKRTH, n, causal)
        tiling = _tile(q.shape, segment.k.shape[2], causal, blocks)
        state = _segment_forward(q, _pad_keys(segment, tiling), tiling, causal)
        parts.append(tuple(_by_row(x, rows, causal) for x in state))
    peaks, totals, accs = zip(*parts, strict=True)
    peak = functools.reduce(jnp.maximum, peaks)
    shares = [jnp.exp(part - peak) for part in peaks]
    total, acc = (functools.reduce(jnp.add, map(jnp.multiply, shares, of)) for of in (totals, accs))
    o = (acc / jnp.maximum(total, 1e-30)).astype(q_BKRTH.dtype)
    lse = peak + jnp.log(jnp.maximum(total, 1e-30))
    o, lse = keep(o), keep(lse)
    return o, (q_BKRTH, segments, o, lse)


def _segment_forward(q, segment, tiling, causal):
    """Peak, total and weighted values of a segment's own softmax, before the division; [n, K, G, T, 1 or H]."""
    (*rows, queries, H), q = q.shape, _pad_queries(q, tiling)

    def weighted(pair, peak):
        k, v, mask = _keys(segment, pair, tiling, causal)
        s = dot_fp32("nkgth,nksh->nkgts", _queries(q, pair[0], tiling), k) * H**-0.5
        s = jnp.where(mask, s, MASKED)
        peak = jnp.maximum(peak, s.max(-1, keepdims=True))
        p = jnp.exp(s - peak)
        return peak, p.sum(-1, keepdims=True), dot_fp32("nkgts,nksh->nkgth", p.astype(v.dtype), v)

    if len(tiling.pairs) == 1:
        return tuple(x[:, :, :, :queries] for x in weighted((0, 0), NEG))

    def step(carry, pair):
        peak, total, acc = (_queries(x, pair[0], tiling) for x in carry)
        new_peak, more, more_acc = weighted(pair, peak)
        shrink = jnp.exp(peak - new_peak)
        new = new_peak, total * shrink + more, acc * shrink + more_acc
        return tuple(_put(x, y, pair[0], tiling) for x, y in zip(carry, new, strict=True))

    start = ((NEG, 1), (0.0, 1), (0.0, H))
    carry = tuple(jnp.full((*rows, q.shape[3], E), x, jnp.float32) for x, E in start)
    return tuple(x[:, :, :, :queries] for x in _over_pairs(step, carry, tiling))


def _backward(blocks, residuals, do):
    q_BKRTH, segments, o, lse = residuals
    rows = q_BKRTH.shape[:4]
    delta = dot_fp32("bkrth,bkrth->bkrt", do, o)[..., None]
    dqs, d_segments = [], []
    for i, segment in enumerate(segments):
        n, causal = segment.k.shape[0], i == len(segments) - 1
        args = tuple(_by_segment(x, n, causal) for x in (q_BKRTH, do, lse, delta))
        tiling = _tile(args[0].shape, segment.k.shape[2], causal, blocks)
        dq, dk, dv = _segment_backward(args, _pad_keys(segment, tiling), tiling, causal)
        dqs.append(_by_row(dq, rows, causal))
        S = segment.k.shape[2]
        dk, dv = dk[:, :, :S].astype(segment.k.dtype), dv[:, :, :S].astype(segment.v.dtype)
        d_segments.append(segment._replace(k=dk, v=dv, valid=None))
    return functools.reduce(jnp.add, dqs).astype(q_BKRTH.dtype), tuple(d_segments)


def _segment_backward(args, segment, tiling, causal):
    queries, scale = args[0].shape[3], args[0].shape[-1] ** -0.5
    q, do, lse, delta = (_pad_queries(x, tiling) for x in args)

    def step(carry, pair):
        dq, dk, dv = carry
        i, j = pair
        qi, doi, lsei, deltai = (_queries(x, i, tiling) for x in (q, do, lse, delta))
        k, v, mask = _keys(segment, pair, tiling, causal)
        # Scores lie [s, g·t] here, so that no product has to transpose a whole block: on a CPU
        # that costs five times the product itself (docs/log.md).
        s = jnp.where(_transposed(mask), dot_fp32("nksh,nkgth->nksgt", k, qi) * scale, MASKED)
        p = jnp.exp(s - _transposed(lsei))
        ds = (p * (dot_fp32("nksh,nkgth->nksgt", v, doi) - _transposed(deltai)) * scale).astype(q.dtype)
        dqi = jnp.moveaxis(dot_fp32("nksh,nksgt->nkhgt", k, ds), 2, -1)
        dkj = dot_fp32("nksgt,nkgth->nksh", ds, qi)
        dvj = dot_fp32("nksgt,nkgth->nksh", p.astype(do.dtype), doi)
        dq = _put(dq, _queries(dq, i, tiling) + dqi, i, tiling)
        dk, dv = (_add_at(x, y, j, tiling) for x, y in ((dk, dkj), (dv, dvj)))
        return dq, dk, dv

    zeros = jnp.zeros(segment.k.shape, jnp.float32)
    dq, dk, dv = _over_pairs(step, (jnp.zeros(q.shape, jnp.float32), zeros, zeros), tiling)
    return dq[:, :, :, :queries], dk, dv


_attend.defvjp(_forward, _backward)


def dot_fp32(spec: str, a: Array, b: Array) -> Array:
    """An einsum whose products are summed in fp32 for inputs of any type."""
    if on_cpu():  # which lacks bf16 × bf16 = fp32 in some layouts; the cast is exact
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _transposed(x):
    """[n, k, g, t, s or 1] -> [n, k, s or 1, g, t]."""
    return jnp.moveaxis(x, -1, 2)


def _tile(q_shape, S, causal, blocks: _Blocks) -> _Tiling:
    """Blocks whose fp32 scores stay under `score_bytes`; causal pairs above the diagonal are left out.

    Where queries are not cut there are no such pairs: the device with the last tokens would wait for none.

    Args:
        q_shape: [n, K, G, T, H] as `_by_segment` makes it.
        S: keys.
        causal: query t sees keys up to t only.
    """
    n, K, G, T, _ = q_shape
    heads = 4 * n * K * G  # bytes of one (query, key) pair over all heads
    score_bytes = blocks.score_bytes
    if heads * T * S <= score_bytes:
        return _Tiling(T, S, ((0, 0),))
    if not blocks.cut_queries:
        key_block = even_block(S, KEY_BLOCK)
        return _Tiling(T, key_block, tuple((0, j) for j in range(-(-S // key_block))))
    if causal:
        block = even_block(T, max(128, int((score_bytes / heads) ** 0.5)))
        nb = -(-T // block)
        return _Tiling(block, block, tuple((i, j) for i in range(nb) for j in range(i + 1)))
    key_block = even_block(S, KEY_BLOCK)
    query_block = even_block(T, max(128, score_bytes // (heads * key_block)))
    pairs = ((i, j) for i in range(-(-T // query_block)) for j in range(-(-S // key_block)))
    return _Tiling(query_block, key_block, tuple(pairs))


def even_block(size: int, limit: int) -> int:
    """The largest divisor of size in [limit/2, limit], else an even split to be padded."""
    if size <= limit:
        return size
    for block in range(limit, limit // 2, -1):
        if size % block == 0:
            return block
    return -(-size // -(-size // limit))


def _pad_keys(segment: Segment, tiling: _Tiling) -> Segment:
    """Key slots padded to whole blocks; the padding is not valid."""
    k, v = (_pad_to(x, 2, tiling.key_block) for x in (segment.k, segment.v))
    return Segment(k, v, _pad_to(segment.valid, 1, tiling.key_block))


def _pad_queries(x, tiling: _Tiling):
    return _pad_to(x, 3, tiling.query_block)


def _pad_to(x, axis: int, block: int):
    extra = -x.shape[axis] % block
    if not extra:
        return x
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)])


def _by_segment(x, n, causal):
    """[B, K, R, T, E] -> [n, K, G, T', E], or unchanged where each row has its own keys.

    All queries of a segment row see the same keys. On one device they are one long dimension
    to cut blocks from (G = 1). On several, tokens stay a separate dimension (G = R·B/n), since rows
    or tokens are sharded: merged they could not stay so, and all queries would be gathered everywhere.
    """
    if causal:
        return x
    B, K, R, T, E = x.shape
    x = x.reshape(n, B // n, K, R, T, E).swapaxes(1, 2)
    return x.reshape(n, K, 1, -1, E) if device_count() == 1 else x.reshape(n, K, -1, T, E)


def _by_row(x, rows, causal):
    """The inverse of `_by_segment`."""
    if causal:
        return x
    B, K, R, T = rows
    n, E = x.shape[0], x.shape[-1]
    return x.reshape(n, K, B // n, R, T, E).swapaxes(1, 2).reshape(B, K, R, T, E)


def _queries(x, i, tiling):
    """Query block i."""
    if x.shape[3] == tiling.query_block:
        return x
    return jax.lax.dynamic_slice_in_dim(x, i * tiling.query_block, tiling.query_block, 3)


def _put(x, block_value, i, tiling):
    if x.shape[3] == tiling.query_block:
        return block_value
    return jax.lax.dynamic_update_slice_in_dim(x, block_value, i * tiling.query_block, 3)


def _keys(segment, pair, tiling, causal):
    """Key block j with its mask [n, 1, 1, t or 1, s]."""
    i, j = pair
    size = tiling.key_block
    k, v, valid = segment
    if k.shape[2] != size:
        k, v = (jax.lax.dynamic_slice_in_dim(x, j * size, size, 2) for x in (k, v))
        valid = jax.lax.dynamic_slice_in_dim(valid, j * size, size, 1)
    mask = valid[:, None, None, None, :]
    if causal and tiling.query_block > 1:
        t, s = i * tiling.query_block + jnp.arange(tiling.query_block), j * size + jnp.arange(size)
        mask = mask & (s[None, :] <= t[:, None])[None, None, None]
    return k, v, mask


def _add_at(x, y, j, tiling):
    size = tiling.key_block
    if x.shape[2] == size:
        return x + y
    old = jax.lax.dynamic_slice_in_dim(x, j * size, size, 2)
    return jax.lax.dynamic_update_slice_in_dim(x, old + y, j * size, 2)


def _over_pairs(step, carry, tiling):
    if len(tiling.pairs) == 1:
        return step(carry, tiling.pairs[0])
    pairs = jnp.asarray(np.array(tiling.pairs, np.int32))
    # Not lax.scan: under jax.checkpoint it would compute the masks of all pairs beforehand and keep them.
    n, step_at = len(tiling.pairs), lambda x: (x[0] + 1, step(x[1], (pairs[x[0], 0], pairs[x[0], 1])))
    return jax.lax.while_loop(lambda x: x[0] < n, step_at, (0, carry))[1]
