"""The synthetic job that the benchmarks time: sizes, random prompts and the jitted parts of one step.

Weights and tokens are random (the work does not depend on them); every row samples the same number of
tokens, end-of-turn suppressed.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.models.cost import Lengths
from grpo_jax.models.qwen import ModelConfig, Params, init_params
from grpo_jax.models.sharding import Layout, make_mesh
from grpo_jax.preflight.plan_inputs import PUBLISHED
from grpo_jax.rollout.sampler import Sampler, make_sampler
from grpo_jax.rollout.sampling import Sampling, row_keys
from grpo_jax.run import options
from grpo_jax.types import Example, Prompt, Status, Trajectory
from grpo_jax.update import batch as update_batch
from grpo_jax.update.batch import Batch, Tree, make_tree, preamble_level, prompts_level, response_bucket
from grpo_jax.update.optimizer import make_optimizer, scale_by_adam
from grpo_jax.update.update import (
    GrpoObjective,
    ModelStep,
    TrainState,
    batch_shardings,
    init_state,
    make_update,
    place_batch,
)

VOCABULARY = 151_936  # rows of the published embedding tables


def narrow(V: int, L: int = 4) -> ModelConfig:
    """The quickstart's model: L layers of width 128."""
    return ModelConfig("qwen3", V, 128, 384, L, 4, 2, 32, 1e4, 1e-6, True)


MODELS = {name.lower(): PUBLISHED[name] for name in ("Qwen2.5-0.5B", "Qwen3-0.6B", "Qwen3-1.7B")}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, the lengths of a step, and whether its layers are recomputed in the backward pass.

    Args:
        budget: tokens that a completion might have; None means the T2 that it has.
    """

    cfg: ModelConfig
    lengths: Lengths
    remat: bool
    budget: int | None = None


SHAPES = {
    "tiny": Shape(narrow(700), Lengths(P=8, G=8, T0=291, T1=20, T2=44), remat=True),
    "recipe": Shape(narrow(VOCABULARY), Lengths(P=1, G=8, T0=5800, T1=100, T2=160), remat=True),
}


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """The options that `shape_of` reads."""
    parser.add_argument(
        "--shape", choices=SHAPES, default="recipe", help="lengths and model (default recipe)"
    )
    parser.add_argument("--model", choices=MODELS, help="a model of this published size instead")
    parser.add_argument("--prompts", type=int, help="P")
    parser.add_argument("--generations", type=int, help="G")
    parser.add_argument("--rows", type=int, help="P·G, instead of --prompts")
    for name, what in (("preamble", "T0"), ("prompt", "T1"), ("completion", "T2")):
        parser.add_argument(f"--{name}", type=int, help=f"{what} in tokens, instead of the shape's")
    parser.add_argument("--budget", type=int, help="tokens that a completion might have, T2 by default")
    parser.add_argument("--layers", type=int, help="L, instead of the model's")


def shape_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Shape:
    """The named shape with what the options change."""
    shape = SHAPES[args.shape]
    cfg = MODELS[args.model] if args.model else shape.cfg
    changes = {"G": args.generations, "T0": args.preamble, "T1": args.prompt, "T2": args.completion}
    given = {name: value for name, value in changes.items() if value is not None}
    lengths = dataclasses.replace(shape.lengths, **given)
    prompts = args.prompts or lengths.P
    if args.rows:
        if args.rows % lengths.G:
            parser.error(f"--rows must divide by the {lengths.G} generations of a prompt, got {args.rows}")
        prompts = args.rows // lengths.G
    return Shape(
        dataclasses.replace(cfg, L=args.layers or cfg.L),
        dataclasses.replace(lengths, P=prompts),
        shape.remat or args.model is not None,
        args.budget,
    )


@dataclasses.dataclass(frozen=True)
class ToolTurns:
    """Scripted tool turns: `count` of them, each answered with `response` tokens."""

    count: int = 0
    response: int = 0


NO_TURNS = ToolTurns()


@dataclasses.dataclass(frozen=True)
class Job:
    """The parts of a step and what they run on.

    Args:
        turns: scripted tool turns within the T2 tokens of a completion.
        prompts: P lists of token ids.
        tree: of the prompts.
        sampler: the jitted functions of the rollout.
        update: the jitted update.
        new_state: makes the state before the first update.
    """

    shape: Shape
    turns: ToolTurns
    prompts: list[list[int]]
    tree: Tree
    sampler: Sampler
    update: Callable
    new_state: Callable[[], TrainState]
    step: ModelStep

    @property
    def sampled_per_turn(self) -> int:
        """Tokens sampled between two tool responses."""
        T2, count, response = self.shape.lengths.T2, self.turns.count, self.turns.response
        return (T2 - count * response) // (count + 1)


def compute_dtype() -> jnp.dtype:
    """What `dtype: auto` means on this machine."""
    return jnp.dtype(options.compute_dtype("auto", jax.default_backend() == "cpu"))


def random_prompts(lengths: Lengths) -> list[list[int]]:
    """Prompts that share a preamble and differ from their first own token on."""
    rng = np.random.default_rng(0)
    preamble = rng.integers(0, 600, lengths.T0).tolist()
    return [[*preamble, 600 + i % 100, *rng.integers(0, 600, lengths.T1).tolist()] for i in range(lengths.P)]


def random_weights(cfg: ModelConfig) -> Params:
    """The weights that every benchmark starts from."""
    return init_params(cfg)


def make_job(
    shape: Shape, turns: ToolTurns = NO_TURNS, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
) -> Job:
    """Build the jitted functions for a shape; nothing is compiled yet.

    Args:
        turns: scripted tool turns.
        dtype: of activations and rollout weights; None means `compute_dtype`.
        mesh: of the devices; None means all that are present, along data.

    Raises:
        ValueError: the completions do not split into the turns evenly.
    """
    x = shape.lengths
    if (x.T2 - turns.count * turns.response) % (turns.count + 1):
        raise ValueError(
            f"T2 - {turns.count} responses of {turns.response} tokens must divide by {turns.count + 1} model "
            f"turns, got T2 = {x.T2}"
        )
    # one prompt alone would be all preamble
    tree = make_tree(random_prompts(dataclasses.replace(x, P=max(x.P, 2))), x.T2)
    mesh, dtype = mesh or make_mesh(), jnp.dtype(dtype or compute_dtype())
    optimizer = make_optimizer(
        scale_by_adam(0.9, 0.999, 1e-8),
        schedule=lambda count: 0.0,
        weight_decay=0,
        max_grad_norm=1,
    )
    sampler = make_sampler(
        shape.cfg,
        Layout(mesh, rollout=True),
        dtype=dtype,
        sampling=Sampling(),
        stop_ids=(),
        budget=shape.budget or x.T2,
    )
    step = ModelStep(shape.cfg, Layout(mesh), dtype, shape.remat)

    def new_state() -> TrainState:
        return init_state(random_weights(shape.cfg), optimizer, step.layout)

    update = make_update(step, optimizer, GrpoObjective(), jax.eval_shape(new_state))
    return Job(shape, turns, random_prompts(x), tree, sampler, update, new_state, step)


def prefill(job: Job, params: Params) -> Any:
    """The trunk: keys and values of the preamble, then of the prompts."""
    levels = preamble_level(job.tree), prompts_level(job.tree, job.prompts)
    preamble, own = jax.tree.map(jnp.asarray, levels)
    trunk = ((job.sampler.prefill(params, (), preamble), preamble.valid),)
    return (*trunk, (job.sampler.prefill(params, trunk, own), own.valid))


class Sampled(NamedTuple):
    """A model turn of all rows: token ids and log-probabilities, [B, n] each."""

    tokens: np.ndarray
    logprobs: np.ndarray


def decode(job: Job, params: Params, trunk: Any) -> list[Sampled]:
    """All model turns of all rows, a scripted response fed after each but the last."""
    B, sampler = job.shape.lengths.B, job.sampler
    rows = [p for p in job.prompts for _ in range(job.shape.lengths.G)]
    cache = sampler.begin(
        jnp.array([p[-1] for p in rows], jnp.int32), jnp.array([len(p) - 1 for p in rows], jnp.int32)
    )
    keys = row_keys(0, jnp.arange(B), jnp.arange(B))
    turns, held = [], 0
    for i in range(job.turns.count + 1):
        parts, left = [], job.sampled_per_turn
        while left:
            cache = sampler.fit(cache, held + 1)
            cache, turn = sampler.decode(params, trunk, cache, keys, jnp.full(B, left, jnp.int32))
            n = int(turn.count[0])
            parts.append(Sampled(np.asarray(turn.tokens[:, :n]), np.asarray(turn.logprobs[:, :n])))
            left, held = left - n, held + n
        turns.append(Sampled(*map(np.hstack, zip(*parts, strict=True))))
        if i < job.turns.count:
            held += job.turns.response
            cache = sampler.fit(cache, held + 1)
            cache = sampler.append(params, trunk, cache, *_response(job, cache.pending))
    return turns


def _response(job: Job, pending: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens, count, new pending token) of a response whose tokens are all 1."""
    n, B = job.turns.response, job.shape.lengths.B
    tokens = jnp.ones((B, response_bucket(n)), jnp.int32).at[:, 0].set(pending)
    return tokens, jnp.full(B, n, jnp.int32), jnp.ones(B, jnp.int32)


def make_batch(job: Job, turns: list[Sampled]) -> Batch:
    """The update's batch of what was decoded, with random advantages, on the devices."""
    response = job.turns.response
    ids: list[list[int]] = [[] for _ in range(job.shape.lengths.B)]
    logprobs: list[list[float]] = [[] for _ in ids]
    for i, turn in enumerate(turns):
        given = response if i < job.turns.count else 0
        for row in range(len(ids)):
            ids[row] += turn.tokens[row].tolist() + [1] * given
            logprobs[row] += turn.logprobs[row].tolist() + [0.0] * given
    return place_batch(job.step.layout, _step_batch(job, ids, logprobs))


def abstract_batch(job: Job) -> Batch:
    """Shapes, dtypes and shardings of the update's batch."""
    x = job.shape.lengths
    batch = _step_batch(job, [[1] * x.T2] * x.B, [[0.0] * x.T2] * x.B)

    def abstract(a, sharding):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    return jax.tree.map(abstract, batch, batch_shardings(job.step.layout, batch))


def _step_batch(job: Job, ids: list[list[int]], logprobs: list[list[float]]) -> Batch:
    G, turns = job.shape.lengths.G, job.turns.count
    given = [True] * job.sampled_per_turn + [False] * job.turns.response
    mask = given * turns + [True] * job.sampled_per_turn
    advantages = np.random.default_rng(1).normal(size=len(ids)).tolist()
    prompts = [Prompt(Example([], ""), prompt, []) for prompt in job.prompts]
    trajectories = [
        Trajectory(
            prompts[row // G],
            ids[row],
            mask,
            logprobs[row],
            status=Status.ANSWERED,
            advantage=advantages[row],
        )
        for row in range(len(ids))
    ]
    return update_batch.make_batch(job.tree, trajectories, G)
