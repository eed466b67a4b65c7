"""Adapters: their shapes and start, the layer with them, their merging, their dropout, and their update."""

import dataclasses
import functools
import typing

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import test_update as grpo
from test_update import CFG, assert_close, base, model_step, same, weights

from grpo_jax.models.lora import (
    MODULES,
    Adapters,
    Frozen,
    LoraConfig,
    adapt,
    dropout_keys,
    init_adapters,
    join,
    merge,
)
from grpo_jax.rollout.sampler import make_sampler
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.run.fields import LoraModule
from grpo_jax.update.update import (
    batch_loss,
    init_state,
    make_score,
    make_update,
    with_dropout,
)

ALL = LoraConfig.of(rank=3, alpha=6.0, dropout=0.0, modules=["all-linear"])
DROPPING = dataclasses.replace(ALL, dropout=0.3, modules=("q_proj", "down_proj"))
SHAPES = {  # of CFG: L 2, D 16, F 24, N 4, K 2, H 4; R 3
    "q_lora_a": (2, 16, 3),
    "q_lora_b": (2, 3, 4, 4),
    "k_lora_a": (2, 16, 3),
    "k_lora_b": (2, 3, 2, 4),
    "v_lora_a": (2, 16, 3),
    "v_lora_b": (2, 3, 2, 4),
    "o_lora_a": (2, 4, 4, 3),
    "o_lora_b": (2, 3, 16),
    "gate_lora_a": (2, 16, 3),
    "gate_lora_b": (2, 3, 24),
    "up_lora_a": (2, 16, 3),
    "up_lora_b": (2, 3, 24),
    "down_lora_a": (2, 24, 3),
    "down_lora_b": (2, 3, 16),
}
PRODUCTS = {"o": "lnhr,lrd->lnhd", "gate": "ldr,lrf->ldf", "up": "ldr,lrf->ldf", "down": "lfr,lrd->lfd"}


def frozen(config=ALL, seed=7):
    return Frozen(weights(), jnp.uint32(seed), config)


@functools.cache
def adapters(config=ALL):
    return helpers.random_adapters(weights()["layers"], config)


def numpy_merged(config=ALL, scale=2.0):
    """W + 6/3·A·B of every target module in float64, written out module by module."""
    tree = grpo.float64(weights())
    for module in config.modules:
        group, name = MODULES[module]
        a, b = (np.array(adapters(config)[f"{name}_lora_{x}"], np.float64) for x in "ab")
        product = np.einsum(PRODUCTS.get(name, "ldr,lrnh->ldnh"), a, b)
        tree["layers"][group][name] = tree["layers"][group][name] + scale * product
    return tree


def merged(config=ALL):
    return jax.tree.map(jnp.asarray, merge(join(adapters(config), frozen(config))))


# Which, and how they start


def test_modules_are_hfs_names_and_defaults_are_pefts():
    assert (*MODULES, "all-linear") == typing.get_args(LoraModule)
    assert LoraConfig.of(8, 16, 0.1, None).modules == ("q_proj", "v_proj")
    assert LoraConfig.of(8, 16, 0.1, ["all-linear"]).modules == tuple(MODULES)
    assert LoraConfig.of(8, 16, 0.1, ["up_proj", "k_proj"]).modules == ("k_proj", "up_proj")
    assert LoraConfig.of(8, 16, 0.1, None).scale == 2


def test_fresh_adapters_are_pefts():
    """A uniform within 1/√inputs (kaiming_uniform with a = √5), B zero, one stack of layers each."""
    made = init_adapters(weights()["layers"], ALL, seed=0)
    assert {name: x.shape for name, x in made.items()} == SHAPES
    assert {x.dtype for x in made.values()} == {jnp.dtype("float32")}
    for name, x in made.items():
        if name.endswith("_b"):
            assert not x.any()
        else:
            bound = {"down_lora_a": 24}.get(name, 16) ** -0.5
            assert 0.9 * bound < np.abs(x).max() <= bound
            assert np.abs(x).mean() == pytest.approx(bound / 2, rel=0.25)
    draws = [made[name][i] for name in ("q_lora_a", "k_lora_a", "v_lora_a") for i in range(2)]
    assert len({draw.tobytes() for draw in map(np.asarray, draws)}) == 6


def test_a_modules_start_depends_on_the_seed_and_not_on_the_other_modules():
    layers, alone = weights()["layers"], dataclasses.replace(ALL, modules=("up_proj",))
    made = init_adapters(layers, ALL, seed=0)
    assert same(
        init_adapters(layers, alone, seed=0), {name: made[name] for name in ("up_lora_a", "up_lora_b")}
    )
    assert not same(init_adapters(layers, alone, seed=1)["up_lora_a"], made["up_lora_a"])


# What they compute; `test_lora_torch.py` compares with PEFT


def logits(params):
    return parity.logits(params, np.arange(40).reshape(2, 20) % CFG.V, CFG)


def test_fresh_adapters_change_nothing():
    fresh = init_adapters(weights()["layers"], ALL, seed=0)
    assert same(logits(join(fresh, frozen())), logits(weights()))


def test_merging_adds_the_scaled_product_and_touches_nothing_else():
    assert_close(merged(), numpy_merged(), rtol=1e-6)
    config = dataclasses.replace(ALL, modules=("q_proj",))
    got = merged(config)
    assert_close(got, numpy_merged(config), rtol=1e-6)
    got["layers"]["attention"]["q"] = weights()["layers"]["attention"]["q"]
    assert same(got, weights())


def test_a_model_without_adapters_is_its_own_merge():
    assert merge(weights()) is weights()


def test_adapted_and_merged_models_are_the_same():
    """Once through the layer, once through the weights."""
    got = logits(join(adapters(), frozen()))
    assert np.abs(got - logits(weights())).max() > 1
    np.testing.assert_allclose(got, logits(merged()), atol=2e-4)


def test_the_rollout_gets_merged_weights():
    sampler = make_sampler(
        CFG, helpers.layouts()[1], dtype=helpers.FLOAT32, sampling=Sampling(), stop_ids=(1,), budget=8
    )
    exported = sampler.export(join(adapters(), frozen()))
    assert exported.keys() == {"embedding", "layers", "norm"}
    want = numpy_merged()
    for i, layer in enumerate(exported["layers"]):
        assert_close(layer, jax.tree.map(lambda w, i=i: w[i], want["layers"]), rtol=1e-6)


# Dropout


def dropped(rate=0.3, rows=4, T=50, name="q", step=0, seed=7):
    """What is left of an input of ones: A and B are identities and the scale is 1."""
    D = 16
    config = LoraConfig(rank=D, alpha=D, dropout=rate, modules=("q_proj", "k_proj"))
    pair = {f"{n}_lora_{x}": jnp.eye(D) for n in "qk" for x in "ab"}
    keys = dropout_keys(Frozen({}, jnp.uint32(seed), config), jnp.int32(step), rows)
    x = jnp.ones((rows, T, D))
    return np.asarray(adapt(Adapters(pair, config), keys, jnp.zeros_like(x), name, x))


def test_dropout_zeroes_its_share_and_scales_the_rest():
    x = dropped()
    np.testing.assert_allclose(np.unique(x), [0, 1 / 0.7], rtol=1e-6)
    assert (x == 0).mean() == pytest.approx(0.3, abs=0.03)  # 3200 draws: three deviations are 0.024


def test_dropout_differs_between_rows_tokens_modules_updates_and_seeds():
    x = dropped()
    masks = [x[0], x[1], dropped(name="k")[0], dropped(step=1)[0], dropped(seed=8)[0]]
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    assert len({token.tobytes() for token in x[0]}) > 40


def test_a_rows_dropout_does_not_depend_on_padding_or_on_other_rows():
    np.testing.assert_array_equal(dropped(rows=2, T=20), dropped()[:2, :20])


# The update


@functools.cache
def updater(micro_batches=1):
    optimizer = grpo.make_optimizer(schedule=lambda count: grpo.RATES[0], **grpo.ADAMW)
    # recomputed layers drop what they dropped before
    step, on = dataclasses.replace(model_step(micro_batches), remat=micro_batches > 1), frozen(DROPPING)
    state = init_state(adapters(DROPPING), optimizer, step.layout)
    return make_update(step, optimizer, grpo.OBJECTIVE, state, on), state


def update(micro_batches=1, step=0):
    """(state, metrics) after one update, the `step`-th."""
    run, state = updater(micro_batches)
    state = dataclasses.replace(jax.tree.map(jnp.copy, state), step=jnp.int32(step))
    return jax.device_get(run(state, base()))


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule():
    """dA = s·dW·Bᵀ and dB = s·Aᵀ·dW, with dW from full fine-tuning at the merged weights."""
    step = dataclasses.replace(model_step(), remat=False)

    @jax.jit
    @jax.value_and_grad
    def adapted(trained, batch):
        return batch_loss(step, grpo.OBJECTIVE, join(trained, frozen()), batch)[0]

    loss, grads = adapted(adapters(), base())
    want_loss, _, at_merged = grpo.gradient(base(), params=merged())
    assert loss == pytest.approx(want_loss, rel=1e-4)
    for group, name in MODULES.values():
        a, b = (np.array(adapters()[f"{name}_lora_{x}"], np.float64) for x in "ab")
        W = np.array(at_merged["layers"][group][name], np.float64).reshape(2, -1, np.prod(b.shape[2:]))
        a, b = a.reshape(2, -1, 3), b.reshape(2, 3, -1)
        for leaf, want in (("a", 2 * W @ b.swapaxes(1, 2)), ("b", 2 * a.swapaxes(1, 2) @ W)):
            got = np.reshape(grads[f"{name}_lora_{leaf}"], want.shape)
            assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want), (name, leaf)


def test_an_update_trains_adapters_alone():
    """The state holds them and two moments of each; the frozen base is read and not taken."""
    before = jax.device_get(weights())
    state, metrics = update()
    assert not metrics["skipped"] and metrics["grad_norm"] > 0
    names = {"q_lora_a", "q_lora_b", "down_lora_a", "down_lora_b"}
    assert state.params.keys() == names
    for name in names:
        assert not same(state.params[name], adapters(DROPPING)[name])
    trained = sum(int(np.prod(SHAPES[name])) for name in names)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * trained + 1  # and a counter
    assert same(weights(), before)


def test_an_update_repeats_bit_for_bit_and_the_next_drops_anew():
    """What is dropped follows from seed and update alone, so that a resumed run drops the same."""
    assert same(update(), update())
    assert abs(update(step=1)[1]["loss"] - update()[1]["loss"]) > 1e-3


@pytest.mark.parametrize("micro_batches", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_what_is_dropped_does_not_depend_on_the_split(micro_batches):
    (whole, metrics), (split, metrics_m) = update(), update(micro_batches)
    assert metrics_m["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert_close(split.opt_state, whole.opt_state)


def test_every_row_of_every_level_has_a_key_of_its_own():
    """Shared rows take theirs from the first completion below them: 1 preamble, 4 prompts, 8 rows."""
    keys = dropout_keys(frozen(DROPPING), jnp.int32(0), 8)
    batch = with_dropout(jax.tree.map(jnp.asarray, base()), keys)
    levels = [level.dropout_keys for level in (*batch.trunk, batch.completions.level)]
    assert [len(k) for k in levels] == [1, 4, 8]
    assert len(np.unique(np.concatenate(levels), axis=0)) == 13


def test_without_dropout_nothing_is_drawn():
    def drawn(config):
        keys = dropout_keys(frozen(config), jnp.int32(0), 8)
        params, batch = join(adapters(config), frozen(config)), with_dropout(base(), keys)
        return str(jax.make_jaxpr(functools.partial(batch_loss, model_step(), grpo.OBJECTIVE))(params, batch))

    assert "random_bits" in drawn(DROPPING)
    assert "random" not in drawn(dataclasses.replace(DROPPING, dropout=0.0))


def test_scores_drop_nothing():
    score = make_score(model_step())
    want = grpo.score(base(), params=merged(DROPPING))
    np.testing.assert_allclose(score(join(adapters(DROPPING), frozen(DROPPING)), base()), want, atol=2e-5)
    assert np.abs(want - grpo.score(base())).max() > 0.1
