"""The tables of weights and activations fit the models, and any mesh; eight devices change nothing.

The tables need no devices: an abstract mesh has any shape.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from parity import CASES, QWEN2, QWEN3

from grpo_jax.models.logprobs import token_logprobs
from grpo_jax.models.lora import LoraConfig, init_adapters
from grpo_jax.models.qwen import Level, ModelConfig, abstract_params, extend, head_weights
from grpo_jax.models.sharding import ACTIVATIONS, WEIGHTS, Layout, make_mesh
from grpo_jax.rollout.sampling import Sampling, sample

ROOT = Path(__file__).parent.parent
AXES = "data", "fsdp", "tensor"
QWEN25_HALF_B = ModelConfig("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 1e6, 1e-6, True)


def layout(data, fsdp, tensor, rollout=False):
    return Layout(AbstractMesh((data, fsdp, tensor), AXES), rollout)


def flat(tree):
    """{leaf's path: value}, with NamedShardings as their specs."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): getattr(x, "spec", x) for path, x in pairs}


@functools.cache
def shapes(cfg):
    """A model's weights, with adapters of rank 8 on every module of its layers."""
    params, lora = abstract_params(cfg), LoraConfig.of(8, 16, 0.0, ["all-linear"])
    adapters = jax.eval_shape(lambda: init_adapters(params["layers"], lora, seed=0))
    return params | {"layers": params["layers"] | {"lora": adapters}}


def specs(cfg, *sizes, rollout=False):
    return flat(layout(*sizes, rollout).params(shapes(cfg)))


def every_model():
    return [ModelConfig.from_hf(config) for config in CASES.values()]


def axes_of(spec):
    """Mesh axes that a table's spec names, in order."""
    return [a for axis in spec if axis is not None for a in ((axis,) if isinstance(axis, str) else axis)]


def test_every_weight_of_both_architectures_is_in_the_table_and_none_else():
    names = {path.split("/")[-1] for cfg in every_model() for path in flat(shapes(cfg))}
    assert names == WEIGHTS.keys()


def test_a_weights_specs_name_each_of_its_dimensions():
    for cfg in every_model():
        for path, leaf in flat(shapes(cfg)).items():
            rank = len(leaf.shape) - path.startswith("layers/")
            assert [len(spec) for spec in WEIGHTS[path.split("/")[-1]]] == [rank, rank], path


@functools.cache
def constrained():
    """{kind: ranks of the arrays} that the model, the head and the sampler ask constraints for."""
    seen = {"decode_logits": {2}}  # the sampler's own, which takes a whole Layout

    def note(x, kind):
        if kind != "layer_weights":
            seen.setdefault(kind, set()).add(x.ndim)
        return x

    def run(params):
        def level(n, shared):
            ids = jnp.zeros((n, 8), jnp.int32)
            return Level(ids, ids, ids == 0, shared=shared)

        hidden, _ = extend(params, (level(1, True), level(4, False)), cfg=cfg, constrain=note)
        sample(jnp.zeros((4, cfg.V)), jnp.zeros((4, 2), jnp.uint32), jnp.arange(4), Sampling().drawing, note)
        return token_logprobs(hidden[1], head_weights(params), jnp.zeros((4, 8), jnp.int32), constrain=note)

    cfg = ModelConfig.from_hf(QWEN3)
    jax.eval_shape(run, abstract_params(cfg))
    return seen


def test_activations_of_the_model_and_the_table_are_the_same():
    assert constrained().keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activations_specs_name_each_of_its_dimensions(kind):
    assert {len(spec) for spec in ACTIVATIONS[kind]} == constrained()[kind]


@pytest.mark.parametrize("table", [WEIGHTS, ACTIVATIONS], ids=["weights", "activations"])
def test_a_spec_names_axes_of_the_mesh_and_none_twice(table):
    for name, columns in table.items():
        for spec in columns:
            axes = axes_of(spec)
            assert len(set(axes)) == len(axes) and set(axes) <= set(AXES), name


@pytest.mark.parametrize("rollout", [False, True], ids=["training", "rollout"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8), (3, 5, 7)])
def test_axes_divide_what_they_shard(sizes, rollout):
    """In every model and on every mesh, 3 · 5 · 7 included, which divides next to nothing."""
    size_of = dict(zip(AXES, sizes, strict=True))
    for cfg in (*every_model(), QWEN25_HALF_B):
        got = specs(cfg, *sizes, rollout=rollout)
        for path, leaf in flat(shapes(cfg)).items():
            for n, axis in zip(leaf.shape, got[path], strict=True):
                for a in axes_of((axis,)):
                    n, rest = divmod(n, size_of[a])
                    assert rest == 0, f"{path} {leaf.shape}: {got[path]}"


def test_weights_where_everything_divides():
    """Qwen3 of 4 heads and 2 key/value heads, fsdp 2 · tensor 2, all layers stacked."""
    got = specs(ModelConfig.from_hf(QWEN3), 2, 2, 2)
    assert got["embedding"] == got["head"] == PartitionSpec(("fsdp", "tensor"), None)
    assert got["layers/attention/q"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert got["layers/attention/k"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert got["layers/attention/o"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert got["layers/mlp/down"] == PartitionSpec(None, "tensor", "fsdp")
    assert got["layers/attention/q_norm/scale"] == PartitionSpec(None, None)
    # adapters: the input's dimensions, then the rank; the rank, then the output's
    assert got["layers/lora/q_lora_a"] == PartitionSpec(None, "fsdp", None)
    assert got["layers/lora/q_lora_b"] == PartitionSpec(None, None, "tensor", None)
    assert got["layers/lora/o_lora_a"] == PartitionSpec(None, "tensor", None, None)
    assert got["layers/lora/o_lora_b"] == PartitionSpec(None, None, "fsdp")
    assert got["layers/lora/down_lora_a"] == PartitionSpec(None, "tensor", None)
    assert got["layers/lora/down_lora_b"] == PartitionSpec(None, None, "fsdp")


def test_dimensions_that_do_not_divide_are_replicated():
    """Qwen2.5-0.5B on tensor 4: 14 query and 2 key/value heads stay whole, the MLP and D do not."""
    got = specs(QWEN25_HALF_B, 1, 2, 4)
    assert got["layers/attention/q"] == PartitionSpec(None, "fsdp", None, None)
    assert got["layers/attention/k_bias"] == PartitionSpec(None, None, None)
    assert got["layers/attention/o"] == PartitionSpec(None, None, None, "fsdp")
    assert got["layers/mlp/gate"] == PartitionSpec(None, "fsdp", "tensor")
    by_two = specs(QWEN25_HALF_B, 1, 4, 2)
    assert by_two["layers/attention/k"] == PartitionSpec(None, "fsdp", "tensor", None)


def test_rollout_weights_stay_whole_along_the_contracted_dimension():
    """A decode step then sums small activations instead of gathering weights."""
    got = specs(ModelConfig.from_hf(QWEN3), 2, 1, 2, rollout=True)
    assert got["layers/attention/q"] == PartitionSpec(None, None, ("fsdp", "tensor"), None)
    assert got["layers/mlp/up"] == PartitionSpec(None, None, ("fsdp", "tensor"))
    assert got["layers/mlp/down"] == PartitionSpec(None, ("fsdp", "tensor"), None)


def test_a_list_of_layers_has_the_same_specs_without_the_layer_dimension():
    params = abstract_params(ModelConfig.from_hf(QWEN2))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params["layers"])
    rollout = layout(1, 1, 2, rollout=True)
    stacked, alone = flat(rollout.params(params["layers"])), flat(rollout.params(one))
    assert {path: PartitionSpec(*spec[1:]) for path, spec in stacked.items()} == alone


def test_what_is_no_weight_is_replicated():
    """An optimizer's counter; moments carry their weights' names and lie where the weights lie."""
    got = layout(1, 2, 2).params({"count": jnp.zeros(()), "mu": {"gate": jnp.zeros((2, 8, 8))}})
    assert got["count"].spec == PartitionSpec()
    assert got["mu"]["gate"].spec == PartitionSpec(None, "fsdp", "tensor")


def test_rows_run_over_data_and_fsdp_in_training_and_over_data_in_the_rollout():
    rows = jnp.zeros((8, 5))
    assert layout(2, 2, 2).rows(rows).spec == PartitionSpec(("data", "fsdp"))
    assert layout(2, 2, 2, rollout=True).rows(rows).spec == PartitionSpec("data")
    assert layout(4, 4, 1).rows(rows).spec == PartitionSpec(None)  # 8 rows on 16


def test_one_device_has_no_constraints():
    x = jnp.ones((2, 3, 4))
    assert Layout(make_mesh()).constrain(x, "rows_x") is x


def test_a_mesh_that_does_not_fill_the_devices_is_an_error():
    n = jax.device_count()
    assert make_mesh().shape == {"data": n, "fsdp": 1, "tensor": 1}
    message = rf"must equal the number of devices, {n}, got 3 · 1 · {n}; set mesh_data to -1 to fill up"
    with pytest.raises(ValueError, match=message):
        make_mesh(3, 1, n)
    with pytest.raises(ValueError, match=f"got 1 · {2 * n} · 1"):
        make_mesh(-1, 2 * n)


def test_on_eight_devices():
    """`on_eight_devices.py`, in a process that sees eight virtual devices."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_eight_devices.py"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
