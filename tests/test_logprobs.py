"""Log-probabilities and entropies against full logits in float64, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tracing import largest_array, temporary_bytes

from grpo_jax.models.logprobs import _Blocks, first_positions, token_logprobs

B, J, D, V = 2, 7, 5, 11
BLOCKS = [1, 2, 3, 4, 11]  # rows of the head per block; 2, 3 and 4 leave a rest


def inputs():
    """(hidden, head, targets), logits of a few nats."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, J, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, V, (B, J)))


def rows_per_block(n):
    return 4 * B * J * n


def full(hidden, head, targets, temperature=1.0):
    """All logits at once, in jax's own log-softmax and a gather."""
    table = jax.nn.log_softmax(jnp.einsum("bjd,vd->bjv", hidden, head) / temperature)
    return jnp.take_along_axis(table, targets[..., None], 2)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, hidden, head, targets):
    """Log-probabilities, and the gradients of their sum weighted by sin(place) in (hidden, head)."""

    def scalar(hidden, head):
        logprobs = function(hidden, head, targets)
        return (logprobs * jnp.sin(jnp.arange(logprobs.size)).reshape(logprobs.shape)).sum(), logprobs

    return jax.value_and_grad(scalar, (0, 1), has_aux=True)(hidden, head)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_equals_float64_softmax(temperature):
    hidden, head, targets = (np.asarray(x) for x in inputs())
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T / temperature
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    logprobs, entropies = token_logprobs(*inputs(), temperature)
    assert_close(logprobs, np.log(np.take_along_axis(p, targets[..., None], 2)[..., 0]))
    assert_close(entropies, -(p * np.log(p)).sum(-1))


def test_by_hand():
    """Logits 0 and ln 3: p = 1/4 and 3/4. At temperature 1/2 they are 0 and ln 9: 1/10 and 9/10."""
    hidden, head = jnp.ones((1, 2, 1)), jnp.asarray([[0.0], [1.0986123]])
    logprobs, entropies = token_logprobs(hidden, head, jnp.asarray([[0, 1]]))
    assert_close(logprobs, [[-1.3862944, -0.2876821]])
    assert_close(entropies, [[0.5623351, 0.5623351]])
    cold, _ = token_logprobs(hidden, head, jnp.asarray([[0, 1]]), 0.5)
    assert_close(cold, [[-2.3025851, -0.1053605]])


def test_even_logits_have_the_entropy_of_a_uniform_choice():
    logprobs, entropies = token_logprobs(jnp.zeros((1, 3, D)), jnp.ones((V, D)), jnp.asarray([[0, 4, 10]]))
    assert_close(logprobs, np.full((1, 3), -2.3978953))  # −ln 11
    assert_close(entropies, np.full((1, 3), 2.3978953))


@pytest.mark.parametrize("rows", BLOCKS)
def test_gradient_equals_that_of_full_logits(rows):
    def blockwise(*args):
        return token_logprobs(*args, 0.7, logits_bytes=rows_per_block(rows))[0]

    got = value_and_gradients(blockwise, *inputs())
    want = value_and_gradients(functools.partial(full, temperature=0.7), *inputs())
    jax.tree.map(assert_close, got, want)


@pytest.mark.parametrize("rows", BLOCKS)
def test_blocks_do_not_matter(rows):
    whole = token_logprobs(*inputs())
    parts = token_logprobs(*inputs(), logits_bytes=rows_per_block(rows))
    assert parts[0].shape == (B, J)
    jax.tree.map(assert_close, parts, whole)


def test_one_row_of_the_head_is_the_smallest_block():
    jax.tree.map(assert_close, token_logprobs(*inputs(), logits_bytes=0), token_logprobs(*inputs()))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_sharded_vocabulary_is_cut_within_its_shards(rows):
    """Twelve rows in three shards: each block takes rows of every shard; 3 rows a shard leave a rest of 1."""
    hidden, _, targets = inputs()
    head = jnp.asarray(np.random.default_rng(1).normal(size=(12, D)), jnp.float32)

    def blockwise(*args):
        return token_logprobs(*args, shards=3, logits_bytes=rows_per_block(3 * rows))[0]

    got = value_and_gradients(blockwise, hidden, head, targets)
    jax.tree.map(assert_close, got, value_and_gradients(full, hidden, head, targets))


@pytest.mark.parametrize("rows", BLOCKS)
def test_the_entropys_gradient_equals_that_of_full_logits(rows):
    """Alone, and added to that of the log-probabilities."""
    hidden, head, targets = inputs()
    weights = jnp.sin(jnp.arange(B * J)).reshape(B, J)

    def whole(hidden, head):
        table = jax.nn.log_softmax(jnp.einsum("bjd,vd->bjv", hidden, head) / 0.7)
        return -(jnp.exp(table) * table).sum(-1)

    def blockwise(hidden, head):
        return token_logprobs(hidden, head, targets, 0.7, logits_bytes=rows_per_block(rows))

    want = jax.grad(lambda *x: (weights * whole(*x)).sum(), (0, 1))(hidden, head)
    got = jax.grad(lambda *x: (weights * blockwise(*x)[1]).sum(), (0, 1))(hidden, head)
    jax.tree.map(assert_close, got, want)
    both = jax.grad(lambda *x: (blockwise(*x)[0] + weights * blockwise(*x)[1]).sum(), (0, 1))(hidden, head)
    alone = jax.grad(lambda *x: blockwise(*x)[0].sum(), (0, 1))(hidden, head)
    jax.tree.map(lambda x, y, z: assert_close(x - y, z), both, alone, want)


def test_logits_of_hundreds_of_nats_stay_finite():
    """The target's logit is 800 above the rest: p = 1 and 0, log-probabilities 0 and −800."""
    hidden, head = jnp.full((1, 2, 1), 800.0), jnp.asarray([[1.0], [0.0]])
    logprobs, entropies = token_logprobs(hidden, head, jnp.asarray([[0, 1]]))
    assert_close(logprobs, [[0, -800]])
    assert_close(entropies, [[0, 0]])


def test_bf16_hidden_states_give_fp32_results():
    """Products are summed in fp32: equal to fp32 arithmetic on the rounded inputs."""
    hidden, head, targets = inputs()
    hidden = hidden.astype(jnp.bfloat16)
    logprobs, entropies = token_logprobs(hidden, head, targets)  # the head is rounded to bf16 inside
    assert logprobs.dtype == entropies.dtype == jnp.float32
    rounded = hidden.astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32)
    assert_close(logprobs, full(*rounded, targets))


def large(V=8192, J=64):
    """Shapes whose full logits are 4 · 64 · 8192 numbers, 8 MB."""
    hidden = jax.ShapeDtypeStruct((4, J, 8), jnp.float32)
    return hidden, jax.ShapeDtypeStruct((V, 8), jnp.float32), jax.ShapeDtypeStruct((4, J), jnp.int32)


def eighth_of_the_vocabulary(hidden, head, targets):
    def blockwise(*args):
        return token_logprobs(*args, logits_bytes=4 * 4 * 64 * 1024)[0]

    return value_and_gradients(blockwise, hidden, head, targets)


def whole_vocabulary(hidden, head, targets):
    return value_and_gradients(full, hidden, head, targets)


def test_full_logits_are_never_made():
    assert largest_array(eighth_of_the_vocabulary, *large()) == 4 * 8 * 8192
    assert largest_array(whole_vocabulary, *large()) == 4 * 64 * 8192


def test_memory_is_that_of_one_chunk():
    """A chunk of logits is 1 MB, all of them are 8 MB; the head's gradient is 0.25 MB."""
    assert temporary_bytes(eighth_of_the_vocabulary, *large()) < 4 << 20
    assert temporary_bytes(whole_vocabulary, *large()) >= 8 << 20


def test_the_head_is_not_copied():
    """64 positions of width 64, a head of 65,536 rows: 16 MB, its blocks of logits 1 MB."""
    args = jnp.ones((1, 64, 64)), jnp.ones((65536, 64)), jnp.zeros((1, 64), jnp.int32)

    def blockwise(*args):
        return token_logprobs(*args, logits_bytes=1 << 20)[0]

    # as it is optimised outside the suite
    options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    assert temporary_bytes(functools.partial(value_and_gradients, blockwise), *args, **options) < 8 << 20


@pytest.mark.parametrize(
    ("V", "limit", "on_cpu", "count", "width"),
    [
        (24, 5, True, 6, 4),
        (151936, 817, True, 128, 1187),
        (26, 5, True, 6, 5),
        (151936, 6553, True, 32, 4748),
        (151936, 6553, False, 16, 9496),
        (1002, 30, False, 32, 32),
    ],
    ids=[
        "smaller ones divide",
        "larger ones by less than half do",
        "none near does: 4 rows of padding",
        "any width on a CPU",
        "elsewhere whole tiles of 8 rows",
        "of padding too",
    ],
)
def test_blocks_divide_the_vocabulary_where_they_can(V, limit, on_cpu, count, width):
    plan = _Blocks.of(V, 1, limit, None, on_cpu)
    assert (plan.count, plan.width) == (count, width)


def test_first_positions_by_hand():
    mask = jnp.asarray([[False, True, False, True, True], [True, False, False, False, False]])
    index, real = first_positions(mask, 2)
    assert index[0].tolist() == [1, 3] and real[0].tolist() == [True, True]
    assert index[1, 0] == 0 and real[1].tolist() == [True, False]


@given(arrays.arrays(bool, (3, 6)), st.integers(1, 6))
def test_first_positions_are_numpys_nonzero(mask, J):
    index, real = first_positions(jnp.asarray(mask), J)
    for row in range(3):
        wanted = np.nonzero(mask[row])[0][:J]
        np.testing.assert_array_equal(index[row][: len(wanted)], wanted)
        np.testing.assert_array_equal(real[row], np.arange(J) < len(wanted))
