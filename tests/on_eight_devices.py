"""Tests that need eight devices; `test_sharding.py` runs them in a separate process."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from parity import QWEN2, QWEN3, random_tensors, write_checkpoint
from safetensors.numpy import load_file

from grpo_jax.models.attention import Segment, attend
from grpo_jax.models.hf import load_params, read_config, save_model
from grpo_jax.models.logprobs import token_logprobs
from grpo_jax.models.qwen import Level, abstract_params, extend, head_weights
from grpo_jax.models.sharding import Layout, make_mesh
from grpo_jax.models.target import compiling_for
from grpo_jax.rollout.sampler import _scattered
from grpo_jax.update.optimizer import make_optimizer, make_rule, scale_by_adam
from grpo_jax.update.update import init_state, state_shardings

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2)]
CASES = {"qwen2": QWEN2, "qwen3": QWEN3 | {"tie_word_embeddings": True}}


def test_eight_devices_are_present():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("asked", "got"), [((-1, 2, 2), (2, 2, 2)), ((-1, 1, 1), (8, 1, 1)), ((1, 4, 2), (1, 4, 2))]
)
def test_data_fills_the_mesh_up(asked, got):
    assert tuple(make_mesh(*asked).shape.values()) == got


@pytest.fixture(params=CASES)
def checkpoint(request, tmp_path):
    folder = write_checkpoint(tmp_path / "source", CASES[request.param])
    return folder, read_config(folder), random_tensors(CASES[request.param])


@pytest.mark.parametrize("rollout", [False, True], ids=["training", "rollout"])
@pytest.mark.parametrize("sizes", MESHES)
def test_export_from_eight_devices_equals_one(sizes, rollout, checkpoint, tmp_path):
    """Every tensor is read into its shards and comes out of them bit for bit."""
    source, cfg, want = checkpoint
    layout = Layout(make_mesh(*sizes), rollout)
    shardings = layout.params(abstract_params(cfg))
    params = load_params(source, cfg, shardings)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    gate, parts = params["layers"]["mlp"]["gate"], sizes[1] * sizes[2]
    assert gate.addressable_shards[0].data.size * parts == gate.size
    save_model(tmp_path / "model", params, cfg, source)
    got = load_file(tmp_path / "model" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, strict=True)


def loss(params, cfg, constrain, shards=1):
    """Log-likelihood of eight rows on a preamble and two prompts: the constraint of every kind."""
    rng = np.random.default_rng(0)

    def level(n, T, start, shared=False):
        places = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (n, T))
        ids = jnp.asarray(rng.integers(0, cfg.V, (n, T)))
        return Level(ids, places, jnp.ones((n, T), bool), shared=shared)

    levels = level(1, 16, 0, True), level(2, 8, 16, True), level(8, 6, 24)
    hidden, _ = extend(params, levels, cfg=cfg, remat=True, keep_kv=False, constrain=constrain)
    logprobs, _ = token_logprobs(
        hidden[2][:, :-1], head_weights(params), levels[2].tokens[:, 1:], shards=shards, constrain=constrain
    )
    return logprobs.mean(), logprobs


def test_training_on_all_three_axes_gives_one_devices_gradient(checkpoint):
    """Other meshes, with the whole update: `test_update_sharded.py`."""
    source, cfg, _ = checkpoint
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    alone = load_params(source, cfg, jax.tree.map(lambda _: one, abstract_params(cfg)))
    layout = Layout(make_mesh(2, 2, 2))
    params = load_params(source, cfg, layout.params(abstract_params(cfg)))

    def run(params, constrain, shards=1):
        function = functools.partial(loss, cfg=cfg, constrain=constrain, shards=shards)
        return jax.jit(jax.grad(function, has_aux=True))(params)

    want_gradient, want = run(alone, lambda x, kind: x)
    gradient, got = run(params, layout.constrain, layout.head_shards(cfg.V))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(assert_close, gradient, want_gradient)


@pytest.mark.parametrize("rollout", [False, True], ids=["training", "rollout"])
def test_a_layers_weights_are_gathered_over_fsdp_in_training_only(rollout):
    layout = Layout(make_mesh(1, 4, 2), rollout)
    layer = {"mlp": {"gate": jnp.ones((16, 16)), "down": jnp.ones((16, 16))}}
    out = jax.jit(lambda w: layout.constrain(w, "layer_weights"))(layer)["mlp"]
    stay = ("fsdp", "tensor")
    want = [(None, stay), (stay, None)] if rollout else [(None, "tensor"), ("tensor", None)]
    for x, spec in zip((out["gate"], out["down"]), want, strict=True):
        assert x.sharding.is_equivalent_to(jax.NamedSharding(layout.mesh, PartitionSpec(*spec)), 2)


@pytest.mark.parametrize("blocks", [None, 1 << 20], ids=["whole", "in blocks"])
def test_queries_that_devices_share_are_attended_by_each_for_its_part(blocks):
    """The prompts of a batch above their preamble: equal on one and on eight devices, an eighth of the work on each.

    Both forms failed: merged with the heads of a group, or cut into blocks, tokens did not stay sharded.
    """
    rng, layout = np.random.default_rng(0), Layout(make_mesh(4, 2, 1))
    sizes = (4, 256, 8, 8), (4, 2, 256, 8), (1, 2, 512, 8)
    q, kv, above = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    own, segment = (Segment(x, x, jnp.ones((len(x), x.shape[2]), bool)) for x in (kv, above))

    def run(q, devices, constrain):
        with compiling_for(devices):
            o = attend(constrain(q, "shared_heads"), (segment,), own, blocks, tokens_sharded=True)
            return constrain(o, "shared_heads")

    on_one = jax.jit(functools.partial(run, devices=jax.devices()[:1], constrain=lambda x, kind: x))
    on_eight = jax.jit(functools.partial(run, devices=jax.devices(), constrain=layout.constrain))
    np.testing.assert_allclose(on_eight(q), on_one(q), atol=1e-6)
    compiled = on_eight.lower(q).compile()
    if blocks is None:  # else XLA counts one block of the loop
        whole = (
            4 * 4 * 8 * 256 * 8 * (512 + 256)
        )  # 4 NH for a query and a key, also for those that are masked
        assert compiled.cost_analysis()["flops"] < 1.5 * whole / 8
    assert not re.search(r"f32\[[^]]*256[^]]*\][^=]*all-gather\(", compiled.as_text())


@pytest.mark.parametrize("sizes", MESHES)
def test_every_device_writes_its_own_part_of_a_cache(sizes):
    """Rows and heads are divided where the mesh does so; slot 16 is out of range. Nothing is gathered."""
    rng, layout = np.random.default_rng(0), Layout(make_mesh(*sizes), rollout=True)
    old, x = (rng.normal(size=size).astype(np.float32) for size in ((8, 8, 16, 4), (8, 8, 2, 4)))
    slots = rng.permuted(np.tile(np.arange(17), (8, 1)), axis=1)[:, :2]
    want = old.copy()
    for b, t in np.ndindex(slots.shape):
        if slots[b, t] < 16:
            want[b, :, slots[b, t]] = x[b, :, t]
    write = jax.jit(functools.partial(_scattered, layout=layout))
    placed = [jax.device_put(a, layout.activation(a.shape, "rows_kv")) for a in (old, x)]
    compiled = write.lower(*placed, jnp.asarray(slots)).compile()
    np.testing.assert_array_equal(compiled(*placed, jnp.asarray(slots)), want)
    assert "all-" not in compiled.as_text()


@pytest.mark.parametrize(("fsdp", "checkpoint"), [(2, "qwen3"), (8, "qwen2")], indirect=["checkpoint"])
def test_weights_gradients_and_moments_take_a_share_of_fsdp(fsdp, checkpoint):
    """Bytes on a device, from the arrays' own shards.

    The gradient is sharded as XLA chooses in an update, whose moments say how; alone it would be whole.
    """
    source, cfg, _ = checkpoint
    layout = Layout(make_mesh(8 // fsdp, fsdp, 1))
    params = load_params(source, cfg, layout.params(abstract_params(cfg)))
    adam = scale_by_adam(0.9, 0.99, 1e-8)
    optimizer = make_optimizer(adam, schedule=lambda count: 1e-3, weight_decay=0, max_grad_norm=1)
    state = init_state(params, optimizer, layout)

    def learned(state):
        shards = layout.head_shards(cfg.V)
        function = functools.partial(loss, cfg=cfg, constrain=layout.constrain, shards=shards)
        gradient, _ = jax.grad(function, has_aux=True)(state.params)
        now = {"learning_rate": jnp.float32(1e-3), "finite": jnp.bool_(True)}
        return gradient, optimizer.update(gradient, state.opt_state, state.params, **now)

    shardings = state_shardings(layout, state)
    gradient, _ = jax.jit(learned, out_shardings=(None, (shardings.params, shardings.opt_state)))(state)
    for tree in (state.params, gradient, state.opt_state):
        matrices = [x for x in jax.tree.leaves(tree) if x.ndim > 2 or x.shape == (cfg.V, cfg.D)]
        held = sum(x.addressable_shards[0].data.nbytes for x in matrices)
        assert held * fsdp < 1.1 * sum(x.nbytes for x in matrices)  # biases are whole


def test_muon_orthogonalises_whole_matrices_wherever_their_parts_are(checkpoint):
    """Steps on fsdp 4 × tensor 2 are those of one device's layout, for gradients that are no multiple of the weights."""
    source, cfg, _ = checkpoint
    rule = make_rule("muon", 0.9, 0.99, 1e-8)
    optimizer = make_optimizer(rule, schedule=lambda count: 1.0, weight_decay=0, max_grad_norm=1)

    def steps(*sizes):
        layout = Layout(make_mesh(*sizes))
        state = init_state(load_params(source, cfg, layout.params(abstract_params(cfg))), optimizer, layout)
        gradient = jax.tree.map(lambda x: jnp.roll(x, 1, -1), state.params)
        now = {"learning_rate": jnp.float32(1.0), "finite": jnp.bool_(True)}
        update = jax.jit(optimizer.update, out_shardings=(None, state_shardings(layout, state).opt_state))
        found, moments = update(gradient, state.opt_state, state.params, **now)
        if sizes != (8, 1, 1):
            q = [
                x
                for path, x in jax.tree.leaves_with_path(moments)
                if jax.tree_util.keystr(path).endswith("['q']")
            ]
            assert q and all(x.addressable_shards[0].data.size * 4 <= x.size for x in q)
        return found

    for x, y in zip(jax.tree.leaves(steps(1, 4, 2)), jax.tree.leaves(steps(8, 1, 1)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
