"""AdamW against its update written out, Adafactor and Lion against formulas and transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from grpo_jax.update.optimizer import (
    decay_mask,
    in_float32,
    layer_by_layer,
    make_optimizer,
    make_rule,
    round_like,
    scale_by_adam,
)

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


def test_norms_and_biases_do_not_decay():
    assert decay_mask(PARAMS) == {
        "embed": {"embedding": True},
        "layers": {
            "attn": {"q": True, "q_bias": {"bias": False}, "q_norm": {"scale": False}},
            "mlp": {"up": True},
        },
        "norm": {"scale": False},
    }


def optimizer(weight_decay=0.0, max_grad_norm=None, rate=0.1, b2=0.95, **settings):
    rule = scale_by_adam(0.9, b2, 1e-8, **settings)
    return with_rate(rule, rate, weight_decay=weight_decay, max_grad_norm=max_grad_norm)


def with_rate(rule, rate, **settings):
    """An optimizer whose `update` is given its rate."""
    tx = make_optimizer(rule, schedule=lambda count: rate, **settings)
    return tx._replace(update=functools.partial(tx.update, learning_rate=rate))


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


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_moments_have_the_asked_type_whatever_the_weights_have(kept, weights):
    tx = optimizer(moments_dtype=kept)
    state = tx.init(jax.tree.map(lambda x: x.astype(weights), PARAMS))
    updates, after = tx.update(PARAMS, state, PARAMS)
    for one in (state, after):
        moments = [x for x in jax.tree.leaves(one) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert len(moments) == 2 * len(jax.tree.leaves(PARAMS))
        assert {x.dtype for x in moments} == {jnp.dtype(kept)}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


def test_in_float32_it_is_optaxs_adamw_after_a_clip():
    adamw = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.5, mask=decay_mask)
    theirs, gradients = optax.chain(optax.clip_by_global_norm(1.0), adamw), [random_tree(1), random_tree(2)]
    got, _ = run(optimizer(weight_decay=0.5, max_grad_norm=1.0), random_tree(0), gradients)
    want, _ = run(theirs, random_tree(0), gradients)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)
    kept = round_like(PARAMS, PARAMS)
    assert all(x is y for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves(PARAMS), strict=True))


def test_with_bf16_moments_an_update_is_close_to_float32s():
    """The first is the same. For the second each stored moment is less than a bit, 2⁻⁷ of it, off.

    Gradients keep their sign, so the new mean is off by less than 2⁻⁷ of it; so is the new
    squared mean, and its root by less than half of that (and a little): 1.5 · 2⁻⁷ together.
    """
    rng = np.random.default_rng(0)
    sign = rng.choice([-1, 1], 4096)
    gradients = [{"w": jnp.asarray(sign * rng.uniform(0.1, 1, 4096), jnp.float32)} for _ in range(2)]
    wide, narrow = optimizer(), optimizer(moments_dtype=jnp.bfloat16)
    zeros = {"w": jnp.zeros(4096)}
    states, errors = [tx.init(zeros) for tx in (wide, narrow)], []
    for gradient in gradients:
        (want, got), states = zip(
            *[tx.update(gradient, s, zeros) for tx, s in zip((wide, narrow), states, strict=True)],
            strict=True,
        )
        errors.append(np.abs(got["w"] / want["w"] - 1).max())
    assert errors[0] == 0
    assert 2**-10 < errors[1] < 1.51 * 2**-7


def test_a_bf16_second_moment_follows_gradients_that_shrink():
    """Rounded to nearest it would stand still: b2 = 0.999 takes off a thousandth, half a bit is 1 in 512 to 256.

    By the formula, 200 squared gradients of 1, then 2,000 of 0.01, leave (1 − b2²⁰⁰)·b2²⁰⁰⁰ +
    0.01·(1 − b2²⁰⁰⁰). A weight's rounding errors add up to at most 2⁻⁸/√(1 − b2²) = 9 % (one standard
    deviation), the mean over 4,096 weights to 0.14 %.
    """
    tx, zeros = optimizer(b2=0.999, moments_dtype=jnp.bfloat16), {"w": jnp.zeros(4096)}
    gradients = jnp.concatenate([jnp.ones(200), jnp.full(2000, 0.1)])

    def one(state, gradient):
        return tx.update({"w": jnp.full(4096, gradient)}, state, zeros)[1], None

    state = jax.jit(lambda state: jax.lax.scan(one, state, gradients)[0])(tx.init(zeros))
    got = np.asarray(state[1]["rest"][0].nu["w"], np.float32)
    want = (1 - 0.999**200) * 0.999**2000 + 0.01 * (1 - 0.999**2000)
    assert abs(got.mean() / want - 1) < 0.007
    assert np.abs(got / want - 1).max() < 0.45


def test_rounding_is_to_a_neighbour_and_right_on_average():
    """Three tenths of the way from 1 to the next bfloat16, 1 + 2⁻⁷: one in 10 draws of three goes up."""
    n = 40_000
    value = np.float32(1 + 0.3 * 2**-7)
    values = {"up": jnp.full(n, value), "down": jnp.full(n, -value), "exact": jnp.full(n, 1.5)}
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), values)
    got = jax.tree.map(lambda x: np.asarray(x, np.float32), round_like(values, like, 7))
    assert (
        set(got["up"]) == {1, 1 + 2**-7}
        and set(got["down"]) == {-1, -1 - 2**-7}
        and set(got["exact"]) == {1.5}
    )
    for name in ("up", "down"):  # five standard deviations of a share of 0.3
        assert abs((np.abs(got[name]) > 1).mean() - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5
    assert 0.3 < (got["up"] != -got["down"]).mean() < 0.54  # 2 · 0.3 · 0.7 of independent draws
    again, later = round_like(values, like, 7), round_like(values, like, 8)
    np.testing.assert_array_equal(again["up"], got["up"])
    assert (np.asarray(later["up"], np.float32) != got["up"]).any()
    assert {x.dtype for x in jax.tree.leaves(again)} == {jnp.dtype("bfloat16")}


# --- other optimizers ---

KERNELS = {"q": (6, 2, 3), "o": (2, 3, 6), "up": (6, 4), "q_bias": (2, 3)}  # of a layer


def kernels(seed, layers=2):
    """Stacked kernels with heads, and a norm outside of the layers."""
    rng = np.random.default_rng(seed)
    stacked = {k: jnp.asarray(rng.normal(size=(layers, *shape)), jnp.float32) for k, shape in KERNELS.items()}
    return {"layers": stacked, "norm": {"scale": jnp.asarray(rng.normal(size=6), jnp.float32)}}


def each_weight(tree):
    """Every layer's arrays by themselves, as matrices of inputs and outputs, in float64."""
    inputs = {"q": 6, "o": 6, "up": 6}
    out = {"scale": np.asarray(tree["norm"]["scale"], np.float64)}
    for name, x in tree["layers"].items():
        for i, layer in enumerate(np.asarray(x, np.float64)):
            out[f"{name}{i}"] = layer.reshape((inputs[name], -1) if name in inputs else -1)
    return out


def trained(optim, gradients, weight_decay=0.1):
    tx = with_rate(make_rule(optim, 0.9, 0.99, 1e-8), 0.01, weight_decay=weight_decay, max_grad_norm=0)
    return each_weight(run(tx, kernels(0), gradients)[0])


def test_lion_and_sgd_equal_their_updates_written_out():
    gradients = [kernels(seed) for seed in (1, 2, 3)]
    lion, sgd = trained("lion", gradients), trained("sgd", gradients)
    for name, start in each_weight(kernels(0)).items():
        decay = 0.0 if "scale" in name or "bias" in name else 0.1
        x, y, m = start, start, 0.0
        for g in (each_weight(gradient)[name] for gradient in gradients):
            x = x - 0.01 * (np.sign(0.9 * m + 0.1 * g) + decay * x)
            m = 0.99 * m + 0.01 * g
            y = y - 0.01 * (g + decay * y)
        np.testing.assert_allclose(lion[name], x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sgd[name], y, rtol=1e-5, atol=1e-6)


@pytest.mark.torch
def test_adafactor_equals_that_of_hf_trainer():
    """With the settings that it gives for `optim: adafactor`, each layer's matrix by itself."""
    torch = pytest.importorskip("torch")
    from transformers.optimization import Adafactor

    gradients = [kernels(seed) for seed in (1, 2, 3)]
    got = trained("adafactor", gradients)
    weights = {
        name: torch.nn.Parameter(torch.tensor(x, dtype=torch.float32))
        for name, x in each_weight(kernels(0)).items()
    }
    plain = [name for name in weights if "scale" in name or "bias" in name]
    groups = [
        {"params": [w for name, w in weights.items() if name not in plain], "weight_decay": 0.1},
        {"params": [weights[name] for name in plain], "weight_decay": 0.0},
    ]
    theirs = Adafactor(groups, lr=0.01, scale_parameter=False, relative_step=False)
    for gradient in gradients:
        for name, g in each_weight(gradient).items():
            weights[name].grad = torch.tensor(g, dtype=torch.float32)
        theirs.step()
    for name, x in each_weight(kernels(0)).items():
        change = weights[name].detach().numpy() - x
        np.testing.assert_allclose(got[name] - x, change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_moments_of_bfloat16_weights_keep_their_type(optim):
    """The update is in float32, so that its state must be from the beginning."""
    tx = make_optimizer(
        make_rule(optim, 0.9, 0.99, 1e-8), schedule=lambda n: 0.1, weight_decay=0.1, max_grad_norm=1
    )
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), kernels(0))
    state = tx.init(weights)
    step, after = tx.update(kernels(1), state, in_float32(weights), learning_rate=0.1)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert {x.dtype for x in jax.tree.leaves(step)} == {jnp.dtype("float32")}


def test_muon_takes_heads_for_one_dimension_of_a_matrix_and_norms_and_biases_by_adam():
    """Three updates are those of optax's own on each layer's weights as matrices, of which it takes all by Muon."""
    gradients = [kernels(seed) for seed in (1, 2, 3)]
    got = trained("muon", gradients, weight_decay=0.0)
    as_float32 = [{k: jnp.asarray(x, jnp.float32) for k, x in each_weight(g).items()} for g in gradients]
    start = {k: jnp.asarray(x, jnp.float32) for k, x in each_weight(kernels(0)).items()}
    theirs = optax.contrib.muon(0.01, adam_b1=0.9, adam_b2=0.99, consistent_rms=0.2)
    state, weights = theirs.init(start), start
    for gradient in as_float32:
        steps, state = theirs.update(gradient, state, weights)
        weights = optax.apply_updates(weights, steps)
    for name, x in weights.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.torch
def test_a_first_step_of_muon_is_that_of_torch():
    """torch orthogonalises in bfloat16, and has AdamW's root mean square as an option."""
    torch = pytest.importorskip("torch")
    gradient = kernels(1)
    got, start = trained("muon", [gradient], weight_decay=0.1), each_weight(kernels(0))
    for name in (name for name, x in start.items() if x.ndim == 2):
        weight = torch.nn.Parameter(torch.tensor(start[name], dtype=torch.float32))
        weight.grad = torch.tensor(each_weight(gradient)[name], dtype=torch.float32)
        torch.optim.Muon([weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
        change = weight.detach().numpy() - start[name]
        assert np.linalg.norm(got[name] - start[name] - change) < 0.03 * np.linalg.norm(change), name


@pytest.mark.torch
@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_the_weights_that_decay_are_those_of_hf_trainer(case, tmp_path):
    """Of a model of each kind: `Trainer.get_decay_parameter_names`, under the names of a published checkpoint."""
    pytest.importorskip("torch")
    import parity
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer

    config = parity.CASES[case]
    parity.write_checkpoint(tmp_path, config, parity.random_tensors(config, seed=1))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    want = set(Trainer.get_decay_parameter_names(None, model))
    cfg, params = parity.load(tmp_path)
    decays = jax.tree.map(lambda decay, x: np.full(x.shape, decay), decay_mask(params), params)
    got = {name for name, x in parity.in_published_layout(cfg, decays).items() if x.all()}
    assert got == want and len(want) < len(parity.published_shapes(config))
