"""The losses: values worked by hand, a float64 numpy version of TRL's whole loss, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from grpo_jax.update import losses

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo"]
LEVELS = ["token", "sequence"]
B, J, BUDGET = 4, 6, 10


def checked(name):
    """The function with its shape annotations enforced."""
    return jaxtyped(getattr(losses, name), typechecker=beartype)


importance_ratio_log = checked("importance_ratio_log")
clipped_surrogate = checked("clipped_surrogate")
k3_kl = checked("k3_kl")
aggregate = checked("aggregate")
clip_fractions = checked("clip_fractions")
entropy_floor = checked("entropy_floor")


def make_batch(seed=0):
    """Log-probabilities, old ones, reference ones, mask (one row empty, one full) and advantages."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (B, J))
    old, ref = logprobs + rng.normal(0, 0.3, (2, B, J))
    mask = np.arange(J) < np.array([[6], [3], [0], [1]])
    return logprobs, old, ref, mask, np.array([1.0, -0.5, 2.0, -1.5])


def whole_loss(
    logprobs, old, ref, mask, advantages, *, level="token", loss_type="dapo", totals=None, delta=None
):
    """The loss as the training step puts it together; beta 0.1, clip 0.2 and 0.28."""
    tokens, rows = totals or (mask.sum(), len(mask))
    per_token = clipped_surrogate(
        importance_ratio_log(logprobs, old, mask, level), advantages, 0.2, 0.28, delta
    )
    per_token = per_token + 0.1 * k3_kl(logprobs, ref)
    return aggregate(per_token, mask, loss_type, tokens=tokens, rows=rows, max_completion_length=BUDGET)


def trl_loss(logprobs, old, ref, mask, advantages, *, level, loss_type, delta=None):
    """TRL's loss with loops over plain floats: one process, no accumulation."""
    row_sums, row_means = [], []
    for lp, o, r, m, adv in zip(logprobs, old, ref, mask, advantages, strict=True):
        where = [t for t in range(J) if m[t]]
        terms = []
        for t in where:
            span = [t] if level == "token" else where
            ratio = np.exp(sum(lp[s] - o[s] for s in span) / len(span))
            clipped = min(max(ratio, 0.8), 1.28)
            capped = ratio if delta is None else min(ratio, delta)
            kl = np.exp(r[t] - lp[t]) - (r[t] - lp[t]) - 1
            terms.append(-min(capped * adv, clipped * adv) + 0.1 * kl)
        row_sums.append(sum(terms))
        row_means.append(sum(terms) / max(len(terms), 1))
    divisor = {"grpo": 1, "bnpo": mask.sum(), "dapo": mask.sum(), "dr_grpo": B * BUDGET}[loss_type]
    return np.mean(row_means) if loss_type == "grpo" else sum(row_sums) / divisor


def as_jax(batch):
    """Float32 device arrays; the mask stays bool."""
    return tuple(jnp.asarray(x, bool if x.dtype == bool else jnp.float32) for x in batch)


# Advantage +1 keeps ratio up to 1.28, -1 keeps it down to 0.8; log 2 and log 0.5 lie outside.
@pytest.mark.parametrize(
    ("ratio", "advantage", "delta", "loss"),
    [
        (1.1, 1.0, None, -1.1),
        (2.0, 1.0, None, -1.28),
        (0.5, 1.0, None, -0.5),
        (2.0, -1.0, None, 2.0),
        (0.5, -1.0, None, 0.8),
        (2.0, -1.0, 1.5, 1.5),
        (2.0, 1.0, 1.5, -1.28),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, delta, loss):
    got = clipped_surrogate(jnp.full((1, 1), np.log(ratio)), jnp.array([advantage]), 0.2, 0.28, delta)
    np.testing.assert_allclose(got, [[loss]], rtol=1e-6)


def test_importance_ratio_by_hand():
    """The sequence ratio is the mean over masked positions: (0.1 + 0.3) / 2, not (0.1 + 0.3 + 9) / 3."""
    logprobs, mask = jnp.array([[0.1, 0.3, 9.0]]), jnp.array([[True, True, False]])
    token = importance_ratio_log(logprobs, jnp.zeros((1, 3)), mask, "token")
    sequence = importance_ratio_log(logprobs, jnp.zeros((1, 3)), mask, "sequence")
    np.testing.assert_allclose(token, [[0.1, 0.3, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(sequence, [[0.2, 0.2, 0.2]], rtol=1e-6)


def test_k3_by_hand_and_close_to_the_reference():
    """e^d - d - 1 at d = 1, -1, 0 and 1e-4; float32 exp(d) - d - 1 gives 0 or 1e-7 for the last."""
    difference = jnp.array([[1.0, -1.0, 0.0, 1e-4]])
    got = k3_kl(jnp.zeros((1, 4)), difference)
    np.testing.assert_allclose(got, [[0.7182818, 0.3678794, 0.0, 5.00017e-9]], rtol=2e-3)


# Row sums 1 + 2 + 3 = 6 (three positions), 4 (one), 0 (none). grpo (2 + 4 + 0) / 3; dapo 10 / 4;
# dr_grpo 10 / (3 * 5). Leaving the empty row out of `rows` would give grpo 3.
@pytest.mark.parametrize(
    ("loss_type", "loss"), [("grpo", 2.0), ("bnpo", 2.5), ("dapo", 2.5), ("dr_grpo", 2 / 3)]
)
def test_aggregate_by_hand(loss_type, loss):
    per_token = jnp.array([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = jnp.array([[True, True, True], [True, False, False], [False, False, False]])
    got = aggregate(per_token, mask, loss_type, tokens=4, rows=3, max_completion_length=5)
    np.testing.assert_allclose(got, loss, rtol=1e-6)


def test_a_batch_without_active_tokens_has_loss_zero():
    for loss_type in LOSS_TYPES:
        zero = aggregate(
            jnp.ones((2, 3)), jnp.zeros((2, 3), bool), loss_type, tokens=0, rows=2, max_completion_length=5
        )
        assert zero == 0.0


@pytest.mark.parametrize("delta", [None, 1.3])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_whole_loss_equals_trl_in_float64(loss_type, level, delta):
    batch = make_batch()
    got = whole_loss(*as_jax(batch), level=level, loss_type=loss_type, delta=delta)
    np.testing.assert_allclose(
        got, trl_loss(*batch, level=level, loss_type=loss_type, delta=delta), rtol=2e-6
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_equals_finite_differences_of_the_float64_loss(loss_type, level):
    """A ratio that is cut off by a stop-gradient, or a mean over padding, shows here."""
    logprobs, *rest = make_batch(seed=1)
    step, expected = 1e-6, np.zeros((B, J))
    for index in np.ndindex(B, J):
        shift = np.zeros((B, J))
        shift[index] = step
        up, down = (trl_loss(logprobs + s, *rest, level=level, loss_type=loss_type) for s in (shift, -shift))
        expected[index] = (up - down) / (2 * step)
    got = jax.grad(lambda lp: whole_loss(lp, *as_jax(rest), level=level, loss_type=loss_type))(
        jnp.asarray(logprobs, jnp.float32)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_a_positive_advantage_raises_the_log_probability(level):
    """On policy (old = stop_gradient of the current) the gradient of -loss is A / tokens everywhere."""

    def loss(logprobs):
        log_ratio = importance_ratio_log(logprobs, jax.lax.stop_gradient(logprobs), mask, level)
        per_token = clipped_surrogate(log_ratio, jnp.array([2.0, -1.0]), 0.2, 0.2)
        return aggregate(per_token, mask, "dapo", tokens=4, rows=2, max_completion_length=5)

    mask = jnp.ones((2, 2), bool)
    ascent = -jax.grad(loss)(jnp.full((2, 2), -0.7))
    np.testing.assert_allclose(ascent, [[0.5, 0.5], [-0.25, -0.25]], rtol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_positions_change_neither_loss_nor_gradient(loss_type, level):
    logprobs, old, ref, mask, advantages = as_jax(make_batch())

    def value_and_grad(junk):
        noisy = [jnp.where(mask, x, junk * (i + 1)) for i, x in enumerate((logprobs, old, ref))]
        return jax.value_and_grad(
            lambda lp: whole_loss(lp, *noisy[1:], mask, advantages, level=level, loss_type=loss_type)
        )(noisy[0])

    clean, noisy = value_and_grad(0.0), value_and_grad(-3.0)
    assert clean[0] == noisy[0]
    np.testing.assert_array_equal(clean[1], noisy[1])
    np.testing.assert_array_equal(np.asarray(clean[1])[~np.asarray(mask)], 0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_to_the_batch(loss_type, level):
    """Uneven in tokens: a mean of the micro-batches' own means would differ."""
    batch = as_jax(make_batch())
    totals = (batch[3].sum(), B)
    parts = [
        whole_loss(*(x[i : i + 1] for x in batch), level=level, loss_type=loss_type, totals=totals)
        for i in range(B)
    ]
    np.testing.assert_allclose(sum(parts), whole_loss(*batch, level=level, loss_type=loss_type), rtol=1e-6)


def test_clip_fractions_count_only_where_the_gradient_is_lost():
    """Ratio 2 and 0.5 in each row; A > 0 loses the first, A < 0 the second; the last is masked."""
    log_ratio = jnp.log(jnp.array([[2.0, 0.5, 1.0, 2.0], [2.0, 0.5, 1.0, 0.5], [2.0, 0.5, 2.0, 2.0]]))
    mask = jnp.array([[True, True, True, False]] * 3)
    got = clip_fractions(log_ratio, jnp.array([1.0, -1.0, 0.0]), mask, 0.2, 0.28, tokens=9)
    assert {k: round(float(v) * 9, 5) for k, v in got.items()} == {
        "clip_ratio/low_mean": 1.0,
        "clip_ratio/high_mean": 1.0,
        "clip_ratio/region_mean": 2.0,
    }


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 12, width=32), st.booleans()), min_size=1, max_size=40),
    st.floats(0.01, 1),
)
def test_the_entropy_floor_is_numpys_quantile(positions, share):
    entropies, mask = (np.array(x)[None] for x in zip(*positions, strict=True))
    floor = float(entropy_floor(jnp.asarray(entropies, jnp.float32), jnp.asarray(mask), share))
    if mask.any():
        assert floor == pytest.approx(np.quantile(entropies[mask], 1 - share), abs=1e-4)
    else:
        assert not (entropies >= floor).any()


def test_unknown_names_are_refused_with_the_valid_ones():
    x, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    with pytest.raises(ValueError, match="loss_type must be grpo, bnpo, dr_grpo or dapo, got 'ppo'"):
        aggregate(x, mask, "ppo", tokens=1, rows=1, max_completion_length=1)
    with pytest.raises(ValueError, match="must be token or sequence, got 'turn'"):
        importance_ratio_log(x, x, mask, "turn")


def test_annotated_shapes_are_those_that_are_checked():
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        clipped_surrogate(jnp.zeros((2, 3)), jnp.zeros(3), 0.2, 0.2)
