"""Rollout and update on eight virtual devices give what one device gives."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 4, 2)]  # data, fsdp, tensor
FAMILIES = ["qwen2", "qwen3"]
# XLA sizes its thread pool by NPROC; with fewer threads than devices, collectives can deadlock.
ENVIRONMENT = {
    "NPROC": "32",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
    " --xla_backend_optimization_level=0",
}
BUDGET, GENERATIONS = 96, 2


@pytest.fixture(scope="module", params=FAMILIES)
def child(request):
    """One process for all meshes: what it measured, and what XLA said."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    done = subprocess.run(
        [sys.executable, __file__, request.param],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(params=MESHES, ids=["data=8", "fsdp=8", "tensor=8", "fsdp=4,tensor=2"])
def measured(child, request):
    return child[0]["x".join(map(str, request.param))]


@pytest.mark.slow
def test_the_rollouts_tokens_are_the_same(measured):
    assert measured["tool_turns"] >= 4
    assert measured["tokens_equal"]
    assert measured["logprobs"] < 1e-4


@pytest.mark.slow
def test_the_update_is_the_same(measured):
    """Largest differences from one device; an update moves weights by up to 1e-2."""
    assert measured["moved"] > 1e-3
    assert measured["loss"] < 1e-5 and measured["grad_norm"] < 1e-4
    assert measured["weights"] < 1e-5 and measured["moments"] < 1e-6
    assert measured["scores"] < 1e-4


@pytest.mark.slow
def test_the_update_of_adapters_is_the_same(measured):
    """With dropout; fsdp and tensor shard adapters as they do their weights."""
    assert measured["adapters_moved"] > 1e-3
    assert measured["adapters_loss"] < 1e-5
    assert measured["adapters"] < 1e-5 and measured["adapters_moments"] < 1e-6


@pytest.mark.slow
def test_weights_lie_in_shards(child):
    """A device holds a part of the gate's [D, F]: D over fsdp and F over tensor."""
    shares = {mesh: child[0][mesh]["gate_share"] for mesh in child[0]}
    assert shares == {"8x1x1": 1, "1x8x1": 1 / 8, "1x1x8": 1 / 8, "1x4x2": 1 / 8}


@pytest.mark.slow
def test_nothing_is_rematerialised_involuntarily(child):
    """XLA warns where it has to gather a whole tensor to change its sharding.

    It does so here, for instance, when the embedding is sharded over D instead of V.
    """
    assert "Involuntary full rematerialization" not in child[1]


# --- the child ---------------------------------------------------------------------------------------


def model(family):
    """Sizes and weights of the tiny model as one of a family."""
    import helpers

    cfg = dataclasses.replace(helpers.config(), model_type=family)
    return cfg, helpers.random_weights(cfg, seed=1)


def run_on(mesh, family):
    """One rollout with tool turns, scores and one update; everything as numpy."""
    import helpers
    import jax
    import jax.numpy as jnp

    from grpo_jax.models.sharding import Layout
    from grpo_jax.rollout.sampler import make_sampler
    from grpo_jax.rollout.sampling import Sampling
    from grpo_jax.update.batch import make_batch, make_tree
    from grpo_jax.update.optimizer import make_optimizer, scale_by_adam
    from grpo_jax.update.update import (
        GrpoObjective,
        ModelStep,
        init_state,
        make_score,
        make_update,
        place_batch,
    )

    training, (cfg, weights) = Layout(mesh), model(family)
    optimizer = make_optimizer(  # a large eps: the sign of a tiny gradient must not decide
        scale_by_adam(0.9, 0.99, 1e-2), schedule=lambda count: 1e-2, weight_decay=0.1, max_grad_norm=1.0
    )
    state = init_state(jax.tree.map(jnp.copy, weights), optimizer, training)
    prompts = [helpers.conversation().prompt_ids(helpers.messages(f"What is {i} + 1?"), []) for i in range(4)]
    sampler = make_sampler(
        cfg,
        Layout(mesh, rollout=True),
        dtype=helpers.FLOAT32,
        sampling=Sampling(),
        stop_ids=tuple(range(0, cfg.V, 8)),  # turns of about eight tokens
        budget=BUDGET,
        compact=True,  # of eight rows; on (8, 1, 1) each fills a device and none is left out
    )
    loop = helpers.tool_loop(sampler, max_iterations=2)
    tree = make_tree(prompts, BUDGET, devices=8)
    loop = dataclasses.replace(loop, tree=tree, conversation=calling(helpers.conversation()))
    rollout = helpers.roll_out_weights(loop, state.params, prompts, range(4), generations=GENERATIONS)
    advantages = [1.0, -1.0, 0.5, -0.5] * 2
    rows = [
        dataclasses.replace(t, advantage=a) for t, a in zip(rollout.trajectories, advantages, strict=True)
    ]
    batch = place_batch(training, make_batch(tree, rows, GENERATIONS))
    step = ModelStep(cfg, training, helpers.FLOAT32)
    scores = make_score(step)(state.params, batch)
    state, metrics = make_update(step, optimizer, GrpoObjective(), state)(state, batch)
    gate = state.params["layers"]["mlp"]["gate"]
    share = gate.addressable_shards[0].data.size / gate.size
    adapted = adapters_update(step, optimizer, batch, weights)
    return jax.device_get({"scores": scores, "state": state, "metrics": metrics, "adapted": adapted}) | {
        "rows": rows,
        "gate_share": share,
        "before": jax.device_get(weights),
    }


def adapters_update(step, optimizer, batch, weights):
    """One update of adapters with dropout: (state, loss, adapters before)."""
    import helpers
    import jax
    import jax.numpy as jnp

    from grpo_jax.models.lora import Frozen, LoraConfig
    from grpo_jax.update.update import GrpoObjective, init_state, make_update

    lora = LoraConfig.of(4, 4, 0.1, ["all-linear"])
    base = jax.device_put(weights, step.layout.params(weights))
    adapters = helpers.random_adapters(base["layers"], lora)
    state = init_state(jax.tree.map(jnp.copy, adapters), optimizer, step.layout)
    frozen = Frozen(base, jnp.uint32(0), lora)
    state, metrics = make_update(step, optimizer, GrpoObjective(), state, frozen)(state, batch)
    return state, metrics["loss"], adapters


def calling(conversation):
    """A conversation in which every turn of the model is read as the same call."""
    from grpo_jax.rollout.conversation import Conversation
    from grpo_jax.types import ParsedTurn, ToolCall

    class Calling(Conversation):
        def parse(self, ids, schemas):
            return ParsedTurn("", None, (ToolCall("add", {"a": 3, "b": 4}),), None)

    return Calling(**{f.name: getattr(conversation, f.name) for f in dataclasses.fields(conversation)})


def compare(one, many):
    import jax
    import numpy as np

    def gap(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(np.abs(np.subtract(x, y)).max()) for x, y in pairs)

    return {
        "tool_turns": sum(len(row.calls) for row in one["rows"]),
        "tokens_equal": [r.completion_ids for r in one["rows"]] == [r.completion_ids for r in many["rows"]],
        "logprobs": gap([r.logprobs for r in one["rows"]], [r.logprobs for r in many["rows"]]),
        "moved": gap(one["state"].params, one["before"]),
        "loss": gap(one["metrics"]["loss"], many["metrics"]["loss"]),
        "grad_norm": gap(one["metrics"]["grad_norm"], many["metrics"]["grad_norm"]),
        "weights": gap(one["state"].params, many["state"].params),
        "moments": gap(one["state"].opt_state, many["state"].opt_state),
        "scores": gap(one["scores"], many["scores"]),
        "gate_share": many["gate_share"],
        "adapters_moved": gap(one["adapted"][2], one["adapted"][0].params),
        "adapters_loss": gap(one["adapted"][1], many["adapted"][1]),
        "adapters": gap(one["adapted"][0].params, many["adapted"][0].params),
        "adapters_moments": gap(one["adapted"][0].opt_state, many["adapted"][0].opt_state),
    }


def main(family):
    import jax

    from grpo_jax.models.sharding import make_mesh

    names, auto = ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3
    one = run_on(jax.make_mesh((1, 1, 1), names, axis_types=auto, devices=jax.devices()[:1]), family)
    found = {m: compare(one, run_on(make_mesh(*m), family)) for m in MESHES}
    print(json.dumps({"x".join(map(str, m)): measured for m, measured in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
