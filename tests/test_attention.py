"""Segment attention against a dense softmax over concatenated keys, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tracing import largest_array, temporary_bytes

from grpo_jax.models.attention import Segment, attend, even_block

B, N, K, H = 4, 4, 2, 8
BLOCKED = 1  # score_bytes: blocks become as small as they get, at most 128 keys

# (own tokens T, [(segment rows, keys), …], score_bytes)
SHAPES = {
    "own only": (5, [], None),
    "a tree": (5, [(1, 7), (2, 6)], None),
    "decode on a cache": (1, [(1, 7), (2, 6), (4, 9)], None),
    "blocks that divide": (256, [(1, 384)], BLOCKED),
    "blocks that need padding": (131, [(1, 263), (2, 149)], BLOCKED),
}
TREE, PADDED = "a tree", "blocks that need padding"


def dense(q, segments, own, score_bytes=None):
    """All keys concatenated, all scores at once, jax's own softmax and its derivative."""
    rows, T, heads, size = q.shape

    def repeat(x):
        return jnp.repeat(x, rows // x.shape[0], 0)

    every = [*segments, own]
    k, v = (jnp.concatenate([repeat(s[i]) for s in every], 2) for i in (0, 1))
    k, v = (jnp.repeat(x, heads // own.k.shape[1], 1) for x in (k, v))
    masks = [jnp.repeat(repeat(s.valid)[:, None], T, 1) for s in segments]
    masks.append(own.valid[:, None] & jnp.tril(jnp.ones((T, T), bool))[None])
    mask = jnp.concatenate(masks, 2)[:, None]
    scores = jnp.einsum("btnh,bnsh->bnts", q, k) / np.sqrt(size)
    p = jax.nn.softmax(jnp.where(mask, scores, -1e9), -1) * mask
    return jnp.einsum("bnts,bnsh->btnh", p, v)


def inputs(shape, ragged=True):
    """Random (queries, segments, own keys); ragged rows end anywhere after their middle."""
    T, sizes, _ = SHAPES[shape]
    rng = np.random.default_rng(0)

    def normal(*size):
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    def segment(n, S):
        lengths = rng.integers(S // 2 + 1, S + 1, (n, 1)) if ragged else S
        valid = np.broadcast_to(np.arange(S) < lengths, (n, S))
        return Segment(normal(n, K, S, H), normal(n, K, S, H), jnp.asarray(valid))

    return normal(B, T, N, H), tuple(segment(n, S) for n, S in sizes), segment(B, T)


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_gradients(attention, q, segments, own, score_bytes=None):
    """The output o, and the gradients of Σ o·sin(place): (q, [(k, v) of each segment], own (k, v))."""

    def output(q, kvs, own_kv):
        above = tuple(Segment(*kv, s.valid) for kv, s in zip(kvs, segments, strict=True))
        return attention(q, above, Segment(*own_kv, own.valid), score_bytes)

    o, pull_back = jax.vjp(output, q, tuple((s.k, s.v) for s in segments), (own.k, own.v))
    return o, pull_back(jnp.sin(jnp.arange(o.size)).reshape(o.shape).astype(o.dtype))


def assert_close(got, want, rtol=1e-5):
    """Equal within rtol of the largest entry, or of one."""
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * max(1, np.abs(want).max()))


def assert_equals_dense(shape, args, rtol=1e-5):
    want = value_and_gradients(dense, *args)
    jax.tree.map(
        functools.partial(assert_close, rtol=rtol),
        value_and_gradients(attend, *args, SHAPES[shape][2]),
        want,
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_dense_softmax_in_value_and_gradient(shape, ragged):
    assert_equals_dense(shape, inputs(shape, ragged))


def test_gradient_equals_finite_differences():
    """Along a random direction in all inputs; float32 central differences are good to 1e-3."""
    q, segments, own = inputs(TREE)
    floats = q, tuple((s.k, s.v) for s in segments), (own.k, own.v)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), floats)

    def scalar(step):
        q_, kvs, kv = jax.tree.map(lambda x, d: x + step * d, floats, direction)
        above = tuple(Segment(*pair, s.valid) for pair, s in zip(kvs, segments, strict=True))
        o, _ = value_and_gradients(attend, q_, above, Segment(*kv, own.valid))
        return np.sum(np.asarray(o, np.float64) * np.sin(np.arange(o.size)).reshape(o.shape))

    _, grads = value_and_gradients(attend, q, segments, own)
    slope = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    assert abs(slope) > 1
    np.testing.assert_allclose((scalar(0.01) - scalar(-0.01)) / 0.02, slope, rtol=5e-3)


def test_two_keys_by_hand():
    """Scores ln 3 and 0 give weights 3/4 and 1/4: 3/4 · 8 + 1/4 · 4 = 7."""

    def one_head(x):
        return jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 1)

    def output(q, k, v, own_k, own_v):
        yes = jnp.ones((1, 1), bool)
        segment = Segment(one_head(k), one_head(v), yes)
        return attend(one_head(q), (segment,), Segment(one_head(own_k), one_head(own_v), yes))[0, 0, 0, 0]

    log3 = 1.0986123
    o, grads = jax.jit(jax.value_and_grad(output, (0, 1, 2, 3, 4)))(log3, 1.0, 8.0, 0.0, 4.0)
    np.testing.assert_allclose(o, 7, rtol=1e-6)
    # dq = Σ p k (v − o) = 3/4 · 1 · (8 − 7), dk = p q (v − o), dv = p
    np.testing.assert_allclose(grads, [0.75, 0.75 * log3, 0.75, 0.25 * log3 * -3, 0.25], rtol=1e-5)


def test_head_n_uses_key_value_head_n_div_r():
    """With R = 2, heads 0 and 1 read the first key/value head, heads 2 and 3 the second."""
    v = jnp.asarray([5.0, 7.0]).reshape(1, 2, 1, 1)
    own = Segment(jnp.zeros((1, 2, 1, 1)), v, jnp.ones((1, 1), bool))
    assert attend(jnp.ones((1, 1, 4, 1)), (), own).ravel().tolist() == [5, 5, 7, 7]


def test_segment_row_serves_neighbouring_query_rows():
    """Two segment rows and four query rows: rows 0 and 1 read the first, 2 and 3 the second."""
    v = jnp.asarray([10.0, 20.0]).reshape(2, 1, 1, 1)
    segment = Segment(jnp.zeros((2, 1, 1, 1)), v, jnp.ones((2, 1), bool))
    own = Segment(jnp.zeros((4, 1, 1, 1)), jnp.zeros((4, 1, 1, 1)), jnp.zeros((4, 1), bool))
    assert attend(jnp.ones((4, 1, 1, 1)), (segment,), own).ravel().tolist() == [10, 10, 20, 20]


@pytest.mark.parametrize("shape", [TREE, PADDED])
def test_fully_masked_rows_give_zeros_and_finite_gradients(shape):
    """Row 1 may attend to nothing at all; the others are what they would be without it."""
    q, segments, own = inputs(shape)
    segments = tuple(s._replace(valid=s.valid.at[0].set(False)) for s in segments)  # rows 0, 1 see none
    own = own._replace(valid=own.valid.at[1].set(False))
    assert_equals_dense(shape, (q, segments, own))
    o, (d_q, _, (d_k, d_v)) = value_and_gradients(attend, q, segments, own, SHAPES[shape][2])
    assert o[0].any() and d_q[0].any() and d_v[0].any()
    assert not any(x[1].any() for x in (o, d_q, d_k, d_v))


def test_causality():
    """An output knows nothing of later own tokens, on either side of a block's edge; later ones do."""
    q, segments, own = inputs(PADDED, ragged=False)
    before, _ = value_and_gradients(attend, q, segments, own, BLOCKED)
    for t in (0, 64, 65, 66, 129):  # 131 tokens are two blocks of 66
        later = (jnp.arange(131) > t)[None, None, :, None]
        changed = own._replace(k=jnp.where(later, 3.0, own.k), v=jnp.where(later, -3.0, own.v))
        after, _ = value_and_gradients(attend, q, segments, changed, BLOCKED)
        np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
        assert jnp.abs(before - after)[:, t + 1 :].max(axis=(0, 2, 3)).min() > 1e-3


def test_content_of_invalid_slots_does_not_matter():
    q, segments, own = inputs(TREE)
    assert not any(s.valid.all() for s in (*segments, own))

    def litter(s):
        mask = s.valid[:, None, :, None]
        return Segment(jnp.where(mask, s.k, 1e4), jnp.where(mask, s.v, -1e4), s.valid)

    clean = value_and_gradients(attend, q, segments, own)
    littered = value_and_gradients(attend, q, tuple(map(litter, segments)), litter(own))
    jax.tree.map(np.testing.assert_array_equal, clean, littered)
    _, (_, d_kvs, d_own) = littered
    for pair, s in zip((*d_kvs, d_own), (*segments, own), strict=True):
        assert not any((d * ~s.valid[:, None, :, None]).any() for d in pair)


def test_cutting_a_segment_in_two_changes_nothing():
    """One log-sum-exp runs over all segments."""
    q, (preamble, prompt), own = inputs(TREE)
    cuts = slice(0, 3), slice(3, None)
    parts = tuple(Segment(preamble.k[:, :, a], preamble.v[:, :, a], preamble.valid[:, a]) for a in cuts)
    whole, _ = value_and_gradients(attend, q, (preamble, prompt), own)
    assert_close(value_and_gradients(attend, q, (*parts, prompt), own)[0], whole, rtol=1e-6)


@pytest.mark.parametrize("factor", [300.0, -300.0])
def test_large_scores_neither_overflow_nor_vanish(factor):
    """Scores of several hundred: exp without the running maximum would be infinite, or zero in all."""
    q, segments, own = inputs(TREE)
    assert_equals_dense(TREE, (q * factor, segments, own), rtol=1e-3)  # dk is q times a rounding


@pytest.mark.parametrize("shape", [TREE, PADDED])
def test_bf16_stays_close_to_fp32(shape):
    """Steps of bf16 are 0.4 %; everything within 2 % of the largest entry."""

    def cast(tree, dtype):
        return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), tree)

    args = cast(inputs(shape), jnp.bfloat16)
    got = value_and_gradients(attend, *args, SHAPES[shape][2])
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    want = value_and_gradients(dense, *cast(args, jnp.float32))
    jax.tree.map(functools.partial(assert_close, rtol=0.02), got, want)


def training_shapes(T0, T2=32):
    """One preamble row under four query rows, as in an update; shapes only."""

    def segment(n, S):
        k = jax.ShapeDtypeStruct((n, K, S, H), jnp.float32)
        return Segment(k, k, jax.ShapeDtypeStruct((n, S), bool))

    return jax.ShapeDtypeStruct((B, T2, N, H), jnp.float32), (segment(1, T0),), segment(B, T2)


def blocked(attention):
    return lambda *args: value_and_gradients(attention, *args, BLOCKED)


def test_scores_are_never_materialised():
    """The largest array is one block of scores: 2 key/value heads · 128 queries · 512 keys."""
    assert largest_array(blocked(attend), *training_shapes(T0=4096)) == 2 * 128 * 512
    assert largest_array(blocked(dense), *training_shapes(T0=4096)) == 4 * 4 * 32 * (4096 + 32)


def test_memory_does_not_grow_with_the_scores():
    """4096 more keys: their scores would be 8 MB, the fp32 gradients of one block row are 0.5 MB."""

    def growth(attention):
        small, large = (temporary_bytes(blocked(attention), *training_shapes(T0)) for T0 in (4096, 8192))
        return large - small

    assert growth(attend) < 2 << 20 < 8 << 20 <= growth(dense)


@pytest.mark.parametrize(
    ("size", "limit", "block"),
    [
        (100, 128, 100),
        (384, 128, 128),
        (300, 128, 100),
        (263, 128, 88),
        (5888, 512, 368),
        (4096, 512, 512),
    ],
)
def test_blocks_divide_the_keys_or_waste_few_slots(size, limit, block):
    """263 is prime: three blocks of 88, one slot of padding."""
    assert even_block(size, limit) == block
