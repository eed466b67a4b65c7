"""Times rollout, reward and update of one GRPO step apart.

    python benchmarks/step.py --shape tiny
    python benchmarks/step.py --shape recipe --prompts 1 --generations 8

`tiny` is the quickstart's model and prompts; `recipe` is the original recipe's job: about
5,800 shared preamble tokens (8 financial tools), 160 completion tokens, a 4-layer model of
width 128 with the published vocabulary of 151,936 rows. Weights and tokens are random (the
work does not depend on them); every row samples the same number of tokens, end-of-turn
suppressed. The reward is one real tool call per row and the built-in `accuracy`.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.qwen import Level, ModelConfig, init_params
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.prefix_tree import Tree, make_tree, step_batch, trunk_arrays
from grpo_jax.rewards import call_rewards, load_rewards
from grpo_jax.sampler import Sampling, make_sampler, row_keys
from grpo_jax.sharding import Layout, make_mesh
from grpo_jax.tools import ToolRunner, load_tools
from grpo_jax.train_step import GrpoObjective, ModelStep, init_state, make_update, place_batch
from grpo_jax.types import Status, ToolCall, Trajectory


@dataclasses.dataclass(frozen=True)
class Shape:
    """Lengths in tokens, vocabulary rows, and the default batch."""

    preamble: int
    prompt: int
    completion: int
    vocabulary: int
    prompts: int
    generations: int
    remat: bool


SHAPES = {
    "tiny": Shape(291, 20, 44, 700, 8, 8, False),
    "recipe": Shape(5800, 100, 160, 151_936, 1, 8, True),
}


def model_config(shape: Shape) -> ModelConfig:
    """The 4-layer model of width 128 with the shape's vocabulary."""
    return ModelConfig("qwen3", shape.vocabulary, 128, 384, 4, 4, 2, 32, 1e4, 1e-6, True)


def timed(function, repeats: int) -> tuple[float, float, object]:
    """(first call with its compilation, median of the others, last result), in seconds."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        result = jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return times[0], statistics.median(times[1:]), result


def random_prompts(shape: Shape, prompts: int) -> list[list[int]]:
    """Prompts that share a preamble and differ from their first own token on."""
    rng = np.random.default_rng(0)
    preamble = rng.integers(0, 600, shape.preamble).tolist()
    return [[*preamble, 600 + i % 100, *rng.integers(0, 600, shape.prompt).tolist()] for i in range(prompts)]


def rollout_function(shape: Shape, sampler, state, tree: Tree, prompts, generations):
    """One rollout without tool turns: export, both prefills, and exactly `completion` decode steps."""
    B = len(prompts) * generations
    arrays = jax.tree.map(jnp.asarray, trunk_arrays(tree, prompts))
    positions = jnp.arange(tree.T0, dtype=jnp.int32)[None]
    preamble = Level(arrays["preamble"], positions, arrays["preamble_valid"], shared=True)
    own = Level(arrays["prompts"], arrays["prompts_positions"], arrays["prompts_valid"], shared=True)
    rows = [p for p in prompts for _ in range(generations)]
    pending = jnp.array([p[-1] for p in rows], jnp.int32)
    position = jnp.array([len(p) - 1 for p in rows], jnp.int32)
    keys = row_keys(0, jnp.arange(B), jnp.arange(B))

    def rollout():
        params = sampler.export(state[0].params)
        trunk = ((sampler.prefill(params, (), preamble), preamble.valid),)
        trunk += ((sampler.prefill(params, trunk, own), own.valid),)
        cache = sampler.begin(pending, position)
        budget = jnp.full(B, shape.completion, jnp.int32)
        return sampler.decode(params, trunk, cache, keys, jnp.ones(B, bool), budget)[1]

    return rollout


def reward_function(rows: int):
    """One distinct tool call per row in worker processes, and the built-in reward."""
    runner = ToolRunner(load_tools(module="tools_funcs.math_tools"), cache=False)
    rewards = load_rewards(None, None)

    def reward():
        calls = [ToolCall("add", {"a": i, "b": 27}) for i in range(rows)]
        results = runner.run(calls, range(rows))
        messages = [[{"role": "tool", "name": "add", "content": r.text}] for r in results]
        values = call_rewards(
            rewards,
            completions=messages,
            answer=["Sum: 42"] * rows,
            prompts=[[]] * rows,
            completion_ids=[[]] * rows,
            trainer_state={},
            columns={},
        ).values
        return values

    return runner, reward


def update_gflop(cfg: ModelConfig, shape: Shape, P: int, G: int) -> dict[str, float]:
    """Arithmetic of one update by level, in GFLOP, padding not counted.

    Per token and layer: 2 FLOP a weight forward, twice that backward; attention 4·N·H a key forward and
    10·N·H backward, a causal token seeing half its own level; `remat` runs the forward twice. Head: 2·D·V a
    token, forward, again and twice backward.
    """
    weights = 2 * cfg.D * cfg.H * (cfg.N + cfg.K) + 3 * cfg.D * cfg.F
    forward = 2 if shape.remat else 1

    def level(tokens: int, keys: float) -> float:
        attention = (4 * forward + 10) * cfg.N * cfg.H * keys
        return tokens * cfg.L * ((forward + 2) * 2 * weights + attention) / 1e9

    T0, T1, T2 = shape.preamble, shape.prompt, shape.completion
    rows = P * G * T2
    return {
        "preamble": level(T0, T0 / 2),
        "prompts": level(P * T1, T0 + T1 / 2),
        "completions": level(rows, T0 + T1 + T2 / 2) + rows * 4 * 2 * cfg.D * cfg.V / 1e9,
    }


def main() -> None:
    """Print the times, tokens per second and peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--generations", type=int)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs after the first (default 3)")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    P, G = args.prompts or shape.prompts, args.generations or shape.generations
    cfg, mesh = model_config(shape), make_mesh()
    prompts = random_prompts(shape, P)
    tree = make_tree(
        random_prompts(shape, max(P, 2)), shape.completion
    )  # one prompt alone would be all preamble
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    optimizer = make_optimizer(
        schedule=make_schedule("constant", 0.0, 0, 1),
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0,
        max_grad_norm=1,
    )
    state = [init_state(init_params(cfg), optimizer, Layout(mesh))]
    sampler = make_sampler(
        cfg,
        Layout(mesh, rollout=True),
        dtype=dtype,
        sampling=Sampling(),
        stop_ids=(),
        budget=shape.completion,
    )
    print(
        f"{args.shape}: {P} × {G} rows, preamble {shape.preamble}, prompt {shape.prompt + 1}, completion "
        f"{shape.completion} tokens, vocabulary {shape.vocabulary}; {jnp.dtype(dtype).name}, "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    rollout = rollout_function(shape, sampler, state, tree, prompts, G)
    first_rollout, rollout_s, turn = timed(rollout, args.repeats)

    runner, reward = reward_function(P * G)
    with runner:
        first_reward, reward_s, _ = timed(reward, args.repeats)

    tokens, logprobs = np.asarray(turn.tokens), np.asarray(turn.logprobs)
    trajectories = [
        Trajectory(
            prompts[i // G],
            tokens[i].tolist(),
            [True] * shape.completion,
            logprobs[i].tolist(),
            [],
            [],
            Status.ANSWERED,
        )
        for i in range(P * G)
    ]
    advantages = np.random.default_rng(1).normal(size=P * G)
    step = ModelStep(cfg, Layout(mesh), dtype, shape.remat)
    update = make_update(step, optimizer, GrpoObjective(), state[0])
    batch = place_batch(step.layout, step_batch(tree, trajectories, G, advantages))

    def run_update():
        state[0], metrics = update(state[0], batch)
        return metrics

    first_update, update_s, metrics = timed(run_update, args.repeats)
    sampled = P * G * shape.completion
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for name, first, seconds in (
        ("rollout", first_rollout, rollout_s),
        ("reward", first_reward, reward_s),
        ("update", first_update, update_s),
    ):
        print(
            f"{name:8s} {seconds:8.3f} s   {sampled / seconds:10.0f} sampled tokens/s   (first call {first:.1f} s)"
        )
    total = rollout_s + reward_s + update_s
    print(f"{'step':8s} {total:8.3f} s   {sampled / total:10.0f} sampled tokens/s")
    gflop = update_gflop(cfg, shape, P, G)
    print(
        f"update: {sum(gflop.values()):.0f} GFLOP ("
        + ", ".join(f"{name} {value:.0f}" for name, value in gflop.items())
        + f"), {sum(gflop.values()) / update_s:.0f} GFLOP/s"
    )
    gap = float(metrics["sampling/sampling_logp_difference/max"])
    print(
        f"largest |sampler - trainer| log-probability: {gap:.1e}; peak memory of the process {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
