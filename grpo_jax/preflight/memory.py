"""What a step of a job needs on a device, by item.

What lies there is counted from the shapes and shardings of the real functions; what the update and decode need
while they run is read off these programs, compiled for the machine. For a machine that cannot be compiled
for here it is an estimate. No weights are loaded and nothing runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from grpo_jax.models import cost
from grpo_jax.models.attention import score_block_bytes
from grpo_jax.models.level import Level
from grpo_jax.models.logprobs import logits_block_bytes
from grpo_jax.models.lora import Frozen, init_adapters
from grpo_jax.models.qwen import MLP_TOKENS, ModelConfig, abstract_params
from grpo_jax.models.sharding import AXES, Layout, mesh_of, mesh_sizes, placed
from grpo_jax.models.target import SLICES, Devices, compiling_for, tpu_devices
from grpo_jax.preflight.plan_inputs import (
    DataLengths,
    Machine,
)
from grpo_jax.rollout.sampler import Cache, Sampler, cache_sizes, make_sampler
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.run.job import grpo_objective, lora_config, optimizer_of
from grpo_jax.run.options import GRPOConfig, compute_dtype
from grpo_jax.types import Example, Prompt, Status, Trajectory
from grpo_jax.update.batch import Tree, bucket, completion_bucket, make_batch
from grpo_jax.update.update import (
    ModelStep,
    Split,
    TrainState,
    batch_shardings,
    make_update,
    state_shardings,
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a job, of the sizes that a run on the machine would choose; from `plan_step`.

    Args:
        lengths: padded.
        sizes: devices along data, fsdp and tensor.
    """

    config: GRPOConfig
    model: ModelConfig
    data: DataLengths
    machine: Machine
    lengths: cost.Lengths
    sizes: tuple[int, int, int]
    micro_batches: int

    @property
    def dtype(self) -> jnp.dtype:
        """Of the computation."""
        return jnp.dtype(compute_dtype(self.config.dtype, self.machine.kind == "cpu"))

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """The mesh without its devices."""
        return AbstractMesh(self.sizes, AXES)


def plan_step(config: GRPOConfig, model: ModelConfig, data: DataLengths, machine: Machine) -> Step:
    """Lengths, mesh and micro-batches as a run would choose them.

    Raises:
        ValueError: the mesh does not have the machine's devices, or the batch does not split into groups or
            micro-batches.
    """
    axes = config.mesh_data, config.mesh_fsdp, config.mesh_tensor
    sizes = mesh_sizes(*axes, machine.count, f"the number of the plan's devices, {machine.count}")
    row_devices = sizes[0] * sizes[1]
    P, G = config.batch_size(row_devices) // config.num_generations, config.num_generations
    T0, T1 = bucket(data.preamble, row_devices), bucket(data.rest, row_devices)
    T2 = completion_bucket(config.max_grpo_completion_length, config.max_grpo_completion_length)
    step = Step(config, model, data, machine, cost.Lengths(P, G, T0, T1, T2), sizes, config.micro_batches)
    if not config.micro_batches:
        settings = (T2 / row_devices, step.dtype.itemsize, config.gradient_checkpointing, machine.taken)
        step = dataclasses.replace(step, micro_batches=cost.micro_batches(model, P, G, *settings))
    Split.of(P, G, step.micro_batches)  # raises where they do not split
    return step


class Temporary(NamedTuple):
    """Bytes on one device that the update and decode need while they run, next to their arguments."""

    update: float
    decode: float


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes of a step on one device, by item.

    Gradients and activations are there in an update only, what follows them in a rollout only. `reference` is 0
    where its weights are the model's own; `evaluation` is the caches of its rows and prompts and an estimate of
    its decode, 0 without a test file.
    """

    weights: float
    reference: float
    moments: float
    gradients: float
    activations: float
    rollout_copy: float
    preamble_cache: float
    prompts_cache: float
    own_cache: float
    decode: float
    evaluation: float

    @property
    def update(self) -> float:
        """Bytes while an update runs; what the rollout read is gone by then."""
        return self.weights + self.reference + self.moments + self.gradients + self.activations

    @property
    def rollout(self) -> float:
        """Bytes while a rollout runs, of training or of an evaluation."""
        held = self.weights + self.reference + self.moments + self.rollout_copy + self.preamble_cache
        return held + max(self.prompts_cache + self.own_cache + self.decode, self.evaluation)

    @property
    def peak(self) -> float:
        """The larger of both."""
        return max(self.update, self.rollout)


def step_bytes(step: Step, temporary: Temporary) -> StepBytes:
    """Bytes of one step on one device, given what its two programs need while they run."""
    config, reference, evaluation = step.config, 0, 0.0
    state, frozen = _state(step, Layout(step.abstract_mesh))
    if config.beta and frozen is None:
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, step.dtype), state.params)
        reference = _held(placed(shapes, Layout(step.abstract_mesh).params(shapes)))
    if config.eval_dataset_id_or_path is not None:  # a prompt a row, taken to be as long as training's
        rows = dataclasses.replace(step.lengths, P=config.eval_batch_size, G=1)
        evaluated = dataclasses.replace(step, lengths=rows)
        evaluation = sum(_rollout_bytes(evaluated)[2:]) + estimate(evaluated).decode
    rollout_copy, preamble, prompts, own = _rollout_bytes(step)
    gradients = _held(state.params)
    return StepBytes(
        weights=_held(state.params) + _held(frozen),
        reference=reference,
        moments=_held(state.opt_state),
        gradients=gradients,
        activations=max(temporary.update - gradients, 0),
        rollout_copy=rollout_copy,
        preamble_cache=preamble,
        prompts_cache=prompts,
        own_cache=own,
        decode=temporary.decode,
        evaluation=evaluation,
    )


# ---- what lies on a device: the shapes and shardings of the real functions -----------------------------


def _held(tree: Any) -> int:
    """Bytes on one device of placed shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _state(step: Step, layout: Layout) -> tuple[TrainState, Frozen | None]:
    """What updates change, and what they only read."""

    def cast(dtype):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params)

    config, params = step.config, abstract_params(step.model)
    seed: Any = jax.ShapeDtypeStruct((), jnp.uint32)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    trained, frozen = cast(config.param_dtype), None
    if config.use_peft:
        lora = lora_config(config)
        trained = jax.eval_shape(lambda: init_adapters(params["layers"], lora, 0))
        frozen = Frozen(cast(step.dtype), seed, lora)
    moments = jax.eval_shape(optimizer_of(config, optax.constant_schedule(0.0)).init, trained)
    state = TrainState(count, trained, moments)
    return placed(state, state_shardings(layout, state)), placed(frozen, layout.params(frozen))


@functools.cache
def rollout_shapes(
    model: ModelConfig, dtype: jnp.dtype, budget: int, x: cost.Lengths, mesh: Mesh | AbstractMesh
) -> tuple[Sampler, Any, list[tuple], Cache]:
    """The sampler and what its decode is given: weights, (keys and values, valid) of preamble and prompts, the cache.

    A level without tokens is (). The functions are traced without their jits, which name compiler options and may
    not stand within another.
    """

    def kv(tree, kind):
        return placed(tree, jax.tree.map(lambda a: layout.activation(a.shape, kind), tree))

    def prefill(params, trunk, ids, valid):
        return sampler.prefill.__wrapped__(params, trunk, Level(ids, ids, valid, shared=True))

    layout, levels = Layout(mesh, rollout=True), []
    sampler = make_sampler(model, layout, dtype=dtype, sampling=Sampling(), stop_ids=(0,), budget=budget)
    params = jax.eval_shape(sampler.export, abstract_params(model))
    params = placed(params, layout.params(params))
    for n, T in ((1, x.T0), (x.P, x.T1)):
        ids, valid = (jax.ShapeDtypeStruct((n, T), kind) for kind in (jnp.int32, bool))
        made = jax.eval_shape(prefill, params, tuple(filter(None, levels)), ids, valid) if T else ()
        levels.append((kv(made, "shared_kv"), valid) if T else ())
    rows = jax.ShapeDtypeStruct((x.B,), jnp.int32)
    full = functools.partial(sampler.begin.__wrapped__, slots=cache_sizes(sampler.budget)[-1])
    cache = jax.eval_shape(full, rows, rows)
    return sampler, params, levels, cache._replace(kv=kv(cache.kv, "rows_kv"))


def _rollout_bytes(step: Step) -> tuple[int, ...]:
    """Weights, then keys and values of the preamble, the prompts and the rows: one layer's, times the layers."""
    L, budget = step.model.L, step.config.max_grpo_completion_length
    one = dataclasses.replace(step.model, L=1)
    _, params, levels, cache = rollout_shapes(one, step.dtype, budget, step.lengths, step.abstract_mesh)
    weights = _held(params) + (L - 1) * _held(params["layers"])
    return weights, *(L * _held(kv) for kv in (*(level[:1] for level in levels), cache.kv))


# ---- what the programs need while they run: compiled, or estimated -------------------------------------


def devices_of(machine: Machine) -> Devices:
    """The machine's devices to compile for; empty where they cannot be compiled for here."""
    if machine.kind == "cpu":
        with contextlib.suppress(RuntimeError):  # a backend has started, and its devices are fixed
            jax.config.update("jax_num_cpu_devices", machine.count)
            jax.config.update("jax_platforms", "cpu")  # a plan takes no accelerator
        return jax.devices("cpu")[: machine.count] if len(jax.devices("cpu")) >= machine.count else ()
    if machine.kind in SLICES:
        with contextlib.suppress(RuntimeError):  # libtpu is not installed
            return tpu_devices(machine.kind, machine.count)
    return ()


def compile_step(step: Step, devices: Devices) -> Temporary:
    """What the update and decode need according to XLA, compiled for the devices; nothing runs.

    Decode's layers are unrolled: of a deep model those of two and four layers are compiled, the rest is linear.
    """
    mesh, L = mesh_of(devices, step.sizes), step.model.L
    with compiling_for(devices):
        update = temporary_bytes(lower_update(step, mesh))
        if L <= 4:
            return Temporary(update, temporary_bytes(lower_decode(step, mesh, L)))
        two, four = (temporary_bytes(lower_decode(step, mesh, few)) for few in (2, 4))
        return Temporary(update, four + (four - two) / 2 * (L - 4))


def temporary_bytes(lowered: jax.stages.Lowered) -> float:
    """What a program needs in addition to its arguments on one device, according to XLA."""
    try:
        analysis: Any = lowered.compile().memory_analysis()
        return analysis.temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        needed = refused_bytes(error)
        if needed is None:
            raise
        return needed


def refused_bytes(error: Exception) -> float | None:
    """The temporary bytes of a program that XLA refuses since a TPU cannot hold them; None for other errors."""
    needed = re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", str(error))
    return needed and float(needed[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30}[needed[2]]


def lower_decode(step: Step, mesh: Mesh, L: int) -> jax.stages.Lowered:
    """A decode to the end of a turn with so many layers, for shapes."""
    model, budget = dataclasses.replace(step.model, L=L), step.config.max_grpo_completion_length
    sampler, params, levels, cache = rollout_shapes(model, step.dtype, budget, step.lengths, mesh)
    rows = jax.ShapeDtypeStruct((step.lengths.B,), jnp.int32)
    keys = jax.ShapeDtypeStruct((*rows.shape, 2), jnp.uint32)
    return sampler.decode.lower(params, tuple(filter(None, levels)), cache, keys, rows)


def lower_update(step: Step, mesh: Mesh) -> jax.stages.Lowered:
    """An update of rows that use their whole budget, for shapes."""
    config, x, layout = step.config, step.lengths, Layout(mesh)
    tree = Tree((0,) * x.T0, x.T0, x.T1, config.max_grpo_completion_length)
    n, prompt = tree.budget, Prompt(Example([], ""), [0] * (x.T0 + x.T1 + 1), [])
    row = Trajectory(prompt, [0] * n, [True] * n, [0.0] * n, status=Status.ANSWERED, advantage=1.0)
    batch = make_batch(tree, [row] * x.B, x.G)
    more = {"ref_logprobs": config.beta > 0, "old_logprobs": config.num_iterations > 1}
    logprobs = batch.completions.sampler_logprobs
    batch = batch.with_logprobs(**{name: logprobs for name, has in more.items() if has})
    state, frozen = _state(step, layout)
    run = ModelStep(
        step.model, layout, step.dtype, config.gradient_checkpointing, config.temperature, step.micro_batches
    )
    optimizer = optimizer_of(config, optax.constant_schedule(0.0))
    update = make_update(run, optimizer, grpo_objective(config), state, frozen)
    return update.lower(state, placed(batch, batch_shardings(layout, batch)))


def estimate(step: Step) -> Temporary:
    """About what XLA takes on an accelerator: tests/test_plan.py compares with its buffers, within 15 %.

    Update: gradients, of micro-batches also their sum; what all layers keep of every token; and the larger of one
    layer's working set, with blocks of attention scores, and two blocks of logits with two copies of the head. Decode:
    three arrays of logits, and on several devices the caches of a layer in another layout.
    """
    config, model, x, item = step.config, step.model, step.lengths, step.dtype.itemsize
    (data, fsdp, tensor), remat, parts = step.sizes, config.gradient_checkpointing, step.micro_batches
    layout, row_devices, alone = Layout(step.abstract_mesh), data * fsdp, step.machine.count == 1
    gradients = _held(_state(step, layout)[0].params) * (1 if parts == 1 else 2)

    shared, rows = (x.T0 + x.P * x.T1) / row_devices, x.B * x.T2 / row_devices / parts
    # the trunk's keys in one layer, in fp32; there are as many values
    keys = 4 * model.K * model.H * (x.T0 + x.P * x.T1)
    kept = cost.kept_bytes(model, item, remat, tensor) * (shared + rows)
    kept += 2 * 2 * model.L * keys if parts > 1 else 0  # micro-batches add to the trunk's cotangents

    # shared levels and completions take turns
    turn = max(shared, rows)
    scores = 3 * 4 * model.N / tensor * turn * max(x.T0, x.T1, x.T2)
    scores = min(scores, 2 * score_block_bytes(on_cpu=False))
    whole_mlp = not (alone and remat and turn > MLP_TOKENS)
    layer = cost.layer_bytes(model, turn, tensor, scores, whole_mlp)
    if remat:  # what was recomputed of the other waits
        width = 2 * model.D + (2 * (model.N + 2 * model.K) * model.H + 2 * model.F * whole_mlp) / tensor
        layer += 4 * width * min(shared, rows)
    if not alone:  # every device needs shared keys and values whole, with their cotangents
        layer += 2 * 2 * 2 * keys / tensor
    if fsdp > 1:  # a layer gathered, and its gradient before it is scattered
        layer += (item + 4) * cost.layer_weights(model) / tensor

    shards = layout.head_shards(model.V)
    logits = min(4 * x.B * x.T2 / parts / data * model.V / shards, logits_block_bytes(on_cpu=False))
    head = 2 * logits + 2 * item * model.V * model.D / shards

    decode = 3 * 4 * x.B * model.V / data / shards
    if not alone:
        cache = 2 * item * model.K * model.H * (x.T0 + x.P * x.T1 + x.B * (x.T2 + 1) / data)
        decode += cache / (fsdp * tensor if model.K % (fsdp * tensor) == 0 else 1)
    return Temporary(gradients + kept + max(layer, head), decode)
