"""Schedules against transformers' formulas; AdamW against its update written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.optimizer import decay_mask, layer_by_layer, make_optimizer, make_schedule

PARAMS = {
    "embed": {"embedding": jnp.full((3, 2), 0.5)},
    "layers": {
        "attn": {
            "q": jnp.full((2, 2), -1.0),
            "q_bias": {"bias": jnp.ones(2)},
            "q_norm": {"scale": jnp.ones(2)},
        },
        "mlp": {"up": jnp.full((2, 2), 2.0)},
    },
    "norm": {"scale": jnp.ones(2)},
}


# Peak 2.0, 2 warm-up updates, 6 in all; HF's lambdas at steps 0..6, by hand.
# cosine: (1 + cos(pi * k / 4)) for k = 0..4 = 2, 1.7071068, 1, 0.2928932, 0.
@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("constant", [2, 2, 2, 2, 2, 2, 2]),
        ("constant_with_warmup", [0, 1, 2, 2, 2, 2, 2]),
        ("linear", [0, 1, 2, 1.5, 1, 0.5, 0]),
        ("cosine", [0, 1, 2, 1.7071068, 1, 0.2928932, 0]),
    ],
)
def test_schedule_has_the_values_of_transformers(name, rates):
    schedule = jax.jit(make_schedule(name, 2.0, 2, 6))
    got = [schedule(jnp.int32(step)) for step in range(7)]
    np.testing.assert_allclose(got, rates, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_without_warmup_the_first_update_has_the_peak_and_the_end_stays_zero(name):
    schedule = make_schedule(name, 3e-4, 0, 10)
    np.testing.assert_allclose(schedule(0), 3e-4, rtol=1e-6)
    np.testing.assert_allclose([schedule(10), schedule(15)], 0.0, atol=1e-12)


def test_unknown_schedule_is_refused_with_the_valid_names():
    with pytest.raises(
        ValueError, match="one of constant, constant_with_warmup, linear, cosine, got 'polynomial'"
    ):
        make_schedule("polynomial", 1.0, 0, 1)


def test_norms_and_biases_do_not_decay():
    assert decay_mask(PARAMS) == {
        "embed": {"embedding": True},
        "layers": {
            "attn": {"q": True, "q_bias": {"bias": False}, "q_norm": {"scale": False}},
            "mlp": {"up": True},
        },
        "norm": {"scale": False},
    }


def optimizer(weight_decay=0.0, max_grad_norm=None, rate=0.1):
    return make_optimizer(
        schedule=make_schedule("constant", rate, 0, 1),
        b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay, max_grad_norm=max_grad_norm,
    )  # fmt: skip


def run(tx, params, gradients):
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(g, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def test_adamw_equals_its_update_written_out():
    """Two updates of one decaying weight and one norm scale, in float64 by Loshchilov's algorithm 2."""
    gradients = [0.3, -0.2]
    params, _ = run(
        optimizer(weight_decay=0.5),
        {"w": jnp.array(2.0), "norm": {"scale": jnp.array(2.0)}},
        [{"w": jnp.array(g), "norm": {"scale": jnp.array(g)}} for g in gradients],
    )
    for got, decay in ((params["w"], 0.5), (params["norm"]["scale"], 0.0)):
        x, m, v = 2.0, 0.0, 0.0
        for t, g in enumerate(gradients, start=1):
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            x -= 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decay * x)
        np.testing.assert_allclose(got, x, rtol=1e-6)


def test_the_norm_of_the_whole_gradient_is_clipped_before_adam_sees_it():
    """Gradient (3, 4) has norm 5; clipped to 1 the first moment is 0.1 * (0.6, 0.8)."""
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    for max_grad_norm, scale in ((1.0, 0.2), (100.0, 1.0), (0, 1.0), (None, 1.0)):
        tx = optimizer(max_grad_norm=max_grad_norm)
        _, state = tx.update(gradient, tx.init(zeros), zeros)
        np.testing.assert_allclose(state[1]["rest"][0].mu["a"], [0.3 * scale], rtol=1e-6)
        np.testing.assert_allclose(state[1]["rest"][0].mu["b"], [0.4 * scale], rtol=1e-6)


def random_tree(seed):
    """Three stacked layers and what is around them."""
    keys = iter(jax.random.split(jax.random.key(seed), 3))
    return {
        "embedding": jax.random.normal(next(keys), (5, 2)),
        "layers": {"mlp": {"up": jax.random.normal(next(keys), (3, 2, 4))}},
        "norm": {"scale": jax.random.normal(next(keys), (2,))},
    }


def test_layer_by_layer_gives_what_all_layers_at_once_give():
    inner = optax.adamw(lambda count: 0.1 / (1 + count), weight_decay=0.1, mask=decay_mask)
    gradients = [random_tree(seed) for seed in (1, 2, 3)]
    got, _ = run(layer_by_layer(inner), random_tree(0), gradients)
    want, _ = run(inner, random_tree(0), gradients)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)


def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments_nor_counts():
    tx, params = optimizer(), random_tree(0)
    state = tx.init(params)
    updates, after = tx.update(jax.tree.map(lambda x: x * jnp.nan, params), state, params, finite=False)
    assert not any(u.any() for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_negative_max_grad_norm_is_refused():
    with pytest.raises(ValueError, match=r"max_grad_norm must be >= 0 .* got -1"):
        optimizer(max_grad_norm=-1)


def test_moments_are_float32():
    state = optimizer().init(PARAMS)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(PARAMS))
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}
