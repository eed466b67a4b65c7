"""The losses: values worked by hand, a float64 numpy version of TRL's whole loss, gradients."""

import itertools
import typing

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

LOSS_TYPES = typing.get_args(losses.LossType)
LEVELS = ["token", "sequence"]
B, J, BUDGET = 4, 6, 10


def checked(name):
    """The function with its shape annotations enforced."""
    return jaxtyped(getattr(losses, name), typechecker=beartype)


importance_ratio_log = checked("importance_ratio_log")
clipped_surrogate = checked("clipped_surrogate")
k3_kl = checked("k3_kl")
cispo = checked("cispo")
sapo = checked("sapo")
vespo = checked("vespo")
off_policy_kept = checked("off_policy_kept")
sampler_correction = checked("sampler_correction")
aggregate = checked("aggregate")
clip_fractions = checked("clip_fractions")
entropy_floor = checked("entropy_floor")
token_gradient = checked("token_gradient")


def make_batch(seed=0):
    """Log-probabilities, old ones, reference ones, mask (one row empty, one full) and advantages."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (B, J))
    old, ref = logprobs + rng.normal(0, 0.3, (2, B, J))
    mask = np.arange(J) < np.array([[6], [3], [0], [1]])
    return logprobs, old, ref, mask, np.array([1.0, -0.5, 2.0, -1.5])


def with_credit(batch, seed=0):
    """The batch with an advantage for each position; some are 0 and rows have both signs."""
    advantages = np.random.default_rng(seed).normal(0, 1, (B, J)).round(1)
    return *batch[:-1], advantages


def whole_loss(
    logprobs,
    old,
    ref,
    mask,
    advantages,
    *,
    level="token",
    loss_type="dapo",
    totals=None,
    delta=None,
    weighted=True,
):
    """The loss as the training step puts it together; beta 0.1, clip 0.2 and 0.28."""
    tokens, rows = totals or (mask.sum(), len(mask))
    log_ratio = surrogate_ratio = importance_ratio_log(logprobs, old, mask, level)
    if level == "sequence" and advantages.ndim == 2:
        surrogate_ratio = token_gradient(log_ratio, logprobs)
    if loss_type == "cispo":
        per_token = cispo(surrogate_ratio, logprobs, advantages, 1.28)
    elif loss_type == "sapo":
        per_token = sapo(surrogate_ratio, advantages, 1.0, 1.05)
    elif loss_type == "vespo":
        token_ratio = importance_ratio_log(logprobs, old, mask, "token")
        per_token = vespo(token_ratio, logprobs, mask, advantages, (2.0, 3.0), (3.0, 2.0))
    else:
        per_token = clipped_surrogate(surrogate_ratio, advantages, 0.2, 0.28, delta)
    per_token = per_token + 0.1 * k3_kl(logprobs, ref, log_ratio if weighted else None)
    return aggregate(per_token, mask, loss_type, tokens=tokens, rows=rows, max_completion_length=BUDGET)


def trl_loss(
    logprobs, old, ref, mask, advantages, *, level, loss_type, delta=None, weighted=True, frozen=None
):
    """TRL's loss with loops over plain floats: one process, no accumulation; GSPO-token for [B, J] advantages.

    `frozen`: log-probabilities that stop-gradients see, for finite differences.
    """
    frozen = logprobs if frozen is None else frozen
    row_sums, row_means = [], []
    by_token = advantages.ndim == 2
    for lp, fixed, o, r, m, of_row in zip(logprobs, frozen, old, ref, mask, advantages, strict=True):
        where = [t for t in range(J) if m[t]]
        w = np.exp(np.clip(sum(np.clip(fixed[s] - o[s], -20, 20) for s in where), np.log(1e-8), 20))
        terms = []
        for t in where:
            span = [t] if level == "token" else where
            ratio, fixed_ratio = (np.exp(sum(x[s] - o[s] for s in span) / len(span)) for x in (lp, fixed))
            kl_ratio, adv = ratio, of_row[t] if by_token else of_row
            if by_token and level == "sequence":
                ratio = fixed_ratio * np.exp(lp[t] - fixed[t])
            if loss_type == "cispo":
                loss = -min(fixed_ratio, 1.28) * adv * lp[t]
            elif loss_type == "sapo":
                tau = 1.0 if adv > 0 else 1.05
                loss = -4 / tau / (1 + np.exp(-tau * (ratio - 1))) * adv
            elif loss_type == "vespo":
                k, rate = (2, 3) if adv >= 0 else (3, 2)
                loss = -np.exp(rate) * w**k * np.exp(-rate * w) * adv * lp[t]
            else:
                capped = ratio if delta is None else min(ratio, delta)
                loss = -min(capped * adv, min(max(ratio, 0.8), 1.28) * adv)
            kl = np.exp(r[t] - lp[t]) - (r[t] - lp[t]) - 1
            terms.append(loss + 0.1 * kl * (kl_ratio if weighted else 1))
        row_sums.append(sum(terms))
        row_means.append(sum(terms) / max(len(terms), 1))
    if loss_type in ("grpo", "sapo"):
        return np.mean(row_means)
    divisor = {"dr_grpo": len(mask) * BUDGET, "luspo": len(mask)}.get(loss_type, mask.sum())
    return sum(row_sums) / divisor


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
    """The sequence ratio is the mean over positions in the mask: (0.1 + 0.3) / 2, not (0.1 + 0.3 + 9) / 3."""
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
# dr_grpo 10 / (3 * 5); luspo 10 / 3. Leaving the empty row out of `rows` would give grpo 3.
@pytest.mark.parametrize(
    ("loss_type", "loss"),
    [
        ("grpo", 2.0),
        ("sapo", 2.0),
        ("bnpo", 2.5),
        ("dapo", 2.5),
        ("cispo", 2.5),
        ("vespo", 2.5),
        ("dr_grpo", 2 / 3),
        ("luspo", 10 / 3),
    ],
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


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_whole_loss_equals_trl_in_float64(loss_type, level, weighted):
    """1,000 random batches over all combinations; a row is empty in each, every other one has a delta."""
    seeds = range(32)
    batches = [make_batch(seed) for seed in seeds]
    for delta in (None, 1.3):
        kind = {"level": level, "loss_type": loss_type, "delta": delta, "weighted": weighted}
        stacked = (jnp.stack(x) for x in zip(*map(as_jax, batches), strict=True))
        got = jax.jit(jax.vmap(lambda *x: whole_loss(*x, **kind)))(*stacked)  # noqa: B023
        want = [trl_loss(*batch, **kind) for batch in batches]
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def assert_gradient_is_that_of_finite_differences(batch, kind):
    """The gradient by every log-probability, against the loops in float64 with the ratios' own stop-gradients."""
    logprobs, *rest = batch
    step, expected = 1e-6, np.zeros((B, J))
    for index in np.ndindex(B, J):
        shift = np.zeros((B, J))
        shift[index] = step
        up, down = (trl_loss(logprobs + s, *rest, **kind, frozen=logprobs) for s in (shift, -shift))
        expected[index] = (up - down) / (2 * step)
    got = jax.grad(lambda lp: whole_loss(lp, *as_jax(rest), **kind))(jnp.asarray(logprobs, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_equals_finite_differences_of_the_float64_loss(loss_type, level, weighted):
    """A ratio that is cut off by a stop-gradient, or a mean over padding, shows here."""
    kind = {"level": level, "loss_type": loss_type, "weighted": weighted}
    assert_gradient_is_that_of_finite_differences(make_batch(seed=1), kind)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_with_an_advantage_for_each_token_equals_the_loops(loss_type, level):
    """1,000 random batches in all; the gradient at one of them by finite differences."""
    batches = [with_credit(make_batch(seed), seed) for seed in range(63)]
    kind = {"level": level, "loss_type": loss_type}
    stacked = [jnp.stack(x) for x in zip(*map(as_jax, batches), strict=True)]
    got = jax.jit(jax.vmap(lambda *x: whole_loss(*x, **kind)))(*stacked)
    np.testing.assert_allclose(got, [trl_loss(*b, **kind) for b in batches], rtol=2e-5, atol=2e-6)
    assert_gradient_is_that_of_finite_differences(batches[1], kind)


def test_one_advantage_for_all_tokens_of_a_row_is_the_rows():
    logprobs, old, ref, mask, advantages = as_jax(make_batch())
    for level, loss_type in itertools.product(LEVELS, LOSS_TYPES):
        losses_of = [
            jax.value_and_grad(whole_loss)(logprobs, old, ref, mask, a, level=level, loss_type=loss_type)
            for a in (advantages, jnp.broadcast_to(advantages[:, None], (B, J)))
        ]
        np.testing.assert_allclose(*(loss for loss, _ in losses_of), rtol=1e-6)
        np.testing.assert_allclose(*(gradient for _, gradient in losses_of), rtol=1e-5, atol=1e-7)


def test_the_weighted_kl_has_the_gradient_of_the_kl_itself():
    """On policy, E[grad(ρ·k3)] is the KL's gradient; that of k3 alone is another.

    π = softmax(0, 0) = (1/2, 1/2), π_ref = (1/4, 3/4): KL(π ‖ π_ref) = −½ ln ¼ − ½ ln ¾ − ln 2, whose gradient in
    the first logit is π_1·(ln π_1/ref_1 − KL) = ½·(ln 2 − 0.1438410) = 0.2746531. k3 alone: Σ_t π_t·(1 −
    ref_t/π_t)·∂ log π_t = ½·½·½ − ½·(−½)·½ = 0.25.
    """

    def expected(logits, weighted):
        policy = jax.nn.softmax(logits)
        logprobs, fixed = jnp.log(policy), jax.lax.stop_gradient(policy)
        kl = k3_kl(
            logprobs[None],
            jnp.log(jnp.array([[0.25, 0.75]])),
            (logprobs - jnp.log(fixed))[None] if weighted else None,
        )
        return (fixed * kl[0]).sum()

    gradient = jax.grad(expected)(jnp.zeros(2), True)
    np.testing.assert_allclose(gradient, [0.2746531, -0.2746531], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(expected)(jnp.zeros(2), False), [0.25, -0.25], rtol=1e-6)


# log-probability −2, A = 3 or −1, ratio 1.5 or 0.5
@pytest.mark.parametrize(
    ("ratio", "advantage", "ceiling", "loss", "gradient"),
    [
        (1.5, 3.0, 5.0, 9.0, -4.5),  # 1.5 · 3 · 2
        (1.5, 3.0, 1.2, 7.2, -3.6),  # the weight stops at 1.2 and the gradient stays
        (0.5, -1.0, 1.2, -1.0, 0.5),
        (1.0, 3.0, 0.2, 1.2, -0.6),  # TRL's default: epsilon_high is epsilon
    ],
)
def test_cispo_by_hand(ratio, advantage, ceiling, loss, gradient):
    def of(logprobs):
        return cispo(logprobs + 2 + np.log(ratio), logprobs, jnp.array([advantage]), ceiling)[0, 0]

    got = jax.value_and_grad(of)(jnp.full((1, 1), -2.0))
    np.testing.assert_allclose([got[0], got[1][0, 0]], [loss, gradient], rtol=1e-6)


# σ(0) = 1/2: −(4/τ)/2·A = −2A/τ. σ(1·0.5) = 0.6224593; σ(2·−0.5) = 0.2689414.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.0, 3.0, -6.0), (1.0, -3.0, 3.0), (1.5, 1.0, -2.4898373), (0.5, -1.0, 0.5378828), (1.0, 0.0, 0.0)],
)
def test_sapo_by_hand(ratio, advantage, loss):
    """Temperature 1 above an advantage of 0, else 2."""
    got = sapo(jnp.full((1, 1), np.log(ratio)), jnp.array([advantage]), 1.0, 2.0)
    np.testing.assert_allclose(got, [[loss]], rtol=1e-6)


def test_sapo_learns_on_policy_as_an_unclipped_ratio():
    for advantage in (1.0, -1.0):
        slope = jax.grad(lambda x: sapo(x, jnp.array([advantage]), 1.0, 2.0)[0, 0])(jnp.zeros((1, 1)))  # noqa: B023
        np.testing.assert_allclose(slope, [[-advantage]], rtol=1e-6)


# Row 1: w = 2 · 0.5 = 1, φ = 1. Row 2: w = 2, A < 0: 2³·e^(2·(1 − 2)) = 8·0.1353353. Row 3: w = 2, A >= 0:
# 2²·e^(3·(1 − 2)) = 4·0.0497871; the masked third position has no part in w.
def test_vespo_by_hand():
    log_ratio = jnp.log(jnp.array([[2.0, 0.5, 1.0], [2.0, 1.0, 1.0], [2.0, 1.0, 9.0]]))
    mask = jnp.array([[True, True, True], [True, True, True], [True, True, False]])
    got = vespo(log_ratio, jnp.full((3, 3), -2.0), mask, jnp.array([1.0, -1.0, 0.5]), (2.0, 3.0), (3.0, 2.0))
    np.testing.assert_allclose(got[:, 0], [2.0, -2.1653645, 0.1991483], rtol=1e-5)


def test_vespos_ratio_takes_in_the_correction():
    """w = 1 · (2 · 1) and 1 · 2: the same from a weight per token and from one per row."""
    zero, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    pairs = (jnp.array([1.0]), (2.0, 3.0), (3.0, 2.0))
    for correction in ([[2.0, 1.0]], [[2.0]]):
        got = vespo(zero, zero - 2, mask, *pairs, jnp.array(correction))
        np.testing.assert_allclose(got, np.full((1, 2), 2 * 0.1991483), rtol=1e-5)


def test_rows_far_from_the_sampler_are_left_out_when_they_are_worse():
    """Mean fall (0.4 + 0.2) / 2 = 0.3 nats; the masked fall of 9 has no part; rises never leave a row out."""
    sampler = jnp.array([[-1.0, -1.0, -1.0]] * 5)
    now = jnp.array([[-1.4, -1.2, -10.0]] * 4 + [[-0.1, -0.1, -1.0]])
    mask = jnp.array([[True, True, False]] * 5)
    advantages = jnp.array([-1.0, 1.0, 0.0, -1e-6, -1.0])
    assert off_policy_kept(now, sampler, mask, advantages, 0.29)[:, 0].tolist() == [
        False,
        True,
        True,
        False,
        True,
    ]
    assert off_policy_kept(now, sampler, mask, advantages, 0.31).all()


# Ratios 2, 0.5, 1.2 and a masked one; their product is 1.2.
@pytest.mark.parametrize(
    ("mode", "low", "high", "weights"),
    [
        ("token_truncate", None, 1.5, [1.5, 0.5, 1.2, 1.0]),
        ("token_truncate", 0.8, None, [2.0, 0.8, 1.2, 1.0]),
        ("token_mask", 0.8, 1.5, [0.0, 0.0, 1.2, 1.0]),
        ("token_mask", None, None, [2.0, 0.5, 1.2, 1.0]),
        ("sequence_truncate", None, 1.1, [1.1]),
        ("sequence_mask", None, 1.1, [0.0]),
        ("sequence_mask", None, 1.5, [1.2]),
    ],
)
def test_sampler_correction_by_hand(mode, low, high, weights):
    old = jnp.log(jnp.array([[2.0, 0.5, 1.2, 7.0]]))
    mask = jnp.array([[True, True, True, False]])
    got = sampler_correction(old, jnp.zeros((1, 4)), mask, mode, low, high)
    np.testing.assert_allclose(got, [weights], rtol=1e-6)
    gradient = jax.grad(lambda x: sampler_correction(x, jnp.zeros((1, 4)), mask, mode, low, high).sum())(old)
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


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


def test_annotated_shapes_are_those_that_are_checked():
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        clipped_surrogate(jnp.zeros((2, 3)), jnp.zeros(3), 0.2, 0.2)
