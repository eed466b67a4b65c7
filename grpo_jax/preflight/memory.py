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
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from grpo_jax.models import cost
from grpo_jax.models.attention import score_block_bytes
from grpo_jax.models.logprobs import head_blocks
from grpo_jax.models.lora import Frozen, init_adapters
from grpo_jax.models.qwen import MLP_TOKENS, Level, ModelConfig, abstract_params
from grpo_jax.models.sharding import AXES, Layout, mesh_of, mesh_sizes, placed
from grpo_jax.models.target import SLICES, compiling_for, tpu_devices
from grpo_jax.preflight.plan_inputs import (
    DataLengths,
    Machine,
)
from grpo_jax.rollout.sampler import Cache, Sampler, make_sampler
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
class Job:
    """What is planned: the options, the model's sizes, the data's lengths and the machine."""

    config: GRPOConfig
    model: ModelConfig
    data: DataLengths
    machine: Machine

    @property
    def dtype(self) -> jnp.dtype:
        """Of the computation."""
        return jnp.dtype(compute_dtype(self.config.dtype, self.machine.is_cpu))


class Temporary(NamedTuple):
    """Bytes on one device that the update and decode need while they run, next to their arguments."""

    update: float
    decode: float


AS_ESTIMATED = Temporary(1.0, 1.0)


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


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a job: padded lengths, devices along data, fsdp and tensor, and micro-batches."""

    lengths: cost.Lengths
    sizes: tuple[int, int, int]
    micro_batches: int


def plan_step(job: Job) -> Step:
    """Lengths, mesh and micro-batches as a run would choose them.

    Raises:
        ValueError: the mesh does not have the machine's devices, or the batch does not split into groups or
            micro-batches.
    """
    config, data, machine = job.config, job.data, job.machine
    axes = config.mesh_data, config.mesh_fsdp, config.mesh_tensor
    sizes = mesh_sizes(*axes, machine.count, f"the number of the plan's devices, {machine.count}")
    row_devices = sizes[0] * sizes[1]
    P, G = config.batch_size(row_devices) // config.num_generations, config.num_generations
    T0, T1 = bucket(data.preamble, row_devices), bucket(data.rest, row_devices)
    T2 = completion_bucket(config.max_grpo_completion_length, config.max_grpo_completion_length)
    remat, item = config.gradient_checkpointing, job.dtype.itemsize
    parts = config.micro_batches or cost.micro_batches(
        job.model, P, G, T2 / row_devices, item, remat, machine.memory
    )
    Split.of(P, G, parts)  # raises where they do not split
    return Step(cost.Lengths(P, G, T0, T1, T2), sizes, parts)


# ---- what lies on a device: the shapes and shardings of the real functions -----------------------------


def _held(tree: Any) -> int:
    """Bytes on one device of placed shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _state(job: Job, layout: Layout) -> tuple[TrainState, Frozen | None]:
    """What updates change, and what they only read."""

    def cast(dtype):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params)

    config, params = job.config, abstract_params(job.model)
    trained, frozen = cast(config.param_dtype), None
    if config.use_peft:
        lora = lora_config(config)
        trained = jax.eval_shape(lambda: init_adapters(params["layers"], lora, 0))
        frozen = Frozen(cast(job.dtype), jax.ShapeDtypeStruct((), jnp.uint32), lora)
    moments = jax.eval_shape(optimizer_of(config, optax.constant_schedule(0.0)).init, trained)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, moments)
    return placed(state, state_shardings(layout, state)), placed(frozen, layout.params(frozen))


def _sampler(model: ModelConfig, dtype: jnp.dtype, budget: int, mesh: Mesh | AbstractMesh) -> Sampler:
    layout = Layout(mesh, rollout=True)
    return make_sampler(model, layout, dtype=dtype, sampling=Sampling(), stop_ids=(0,), budget=budget)


def _rollout(sampler: Sampler, model: ModelConfig, x: cost.Lengths) -> tuple[Any, tuple, Cache]:
    """What decode is given: weights, the trunk's (keys and values, valid) of levels with tokens, the rows' own cache.

    The functions are traced without their jits, which name compiler options and may not stand within another.
    """

    def kv(tree, kind):
        return placed(tree, jax.tree.map(lambda a: sampler.layout.activation(a.shape, kind), tree))

    def prefill(params, trunk, ids, valid):
        return sampler.prefill.__wrapped__(params, trunk, Level(ids, ids, valid, shared=True))

    params = jax.eval_shape(sampler.export.__wrapped__, abstract_params(model))
    params, trunk = placed(params, sampler.layout.params(params)), ()
    for n, T in ((n, T) for n, T in ((1, x.T0), (x.P, x.T1)) if T):
        ids, valid = (jax.ShapeDtypeStruct((n, T), kind) for kind in (jnp.int32, bool))
        trunk = (*trunk, (kv(jax.eval_shape(prefill, params, trunk, ids, valid), "shared_kv"), valid))
    rows = jax.ShapeDtypeStruct((x.B,), jnp.int32)
    full = functools.partial(sampler.begin.__wrapped__, slots=sampler.budget + 1)
    cache = jax.eval_shape(full, rows, rows)
    return params, trunk, cache._replace(kv=kv(cache.kv, "rows_kv"))


@functools.cache
def _rollout_bytes(
    model: ModelConfig, dtype: jnp.dtype, budget: int, x: cost.Lengths, sizes: tuple[int, int, int]
) -> tuple[int, ...]:
    """Weights, then keys and values of the preamble, the prompts and the rows: one layer's, times the layers."""
    one = dataclasses.replace(model, L=1)
    sampler = _sampler(one, dtype, budget, AbstractMesh(sizes, AXES))
    params, trunk, cache = _rollout(sampler, one, x)
    weights, levels = _held(params) + (model.L - 1) * _held(params["layers"]), iter(trunk)
    preamble, prompts = (next(levels)[0] if T else () for T in (x.T0, x.T1))
    return weights, *(model.L * _held(kv) for kv in (preamble, prompts, cache.kv))


def step_bytes(job: Job, step: Step, temporary: Temporary) -> StepBytes:
    """Bytes of one step on one device, given what its two programs need while they run."""
    mesh, config, reference, evaluation = AbstractMesh(step.sizes, AXES), job.config, 0, 0
    rollout = job.model, job.dtype, config.max_grpo_completion_length
    state, frozen = _state(job, Layout(mesh))
    if config.beta and frozen is None:
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, job.dtype), state.params)
        reference = _held(placed(shapes, Layout(mesh).params(shapes)))
    if config.eval_dataset_id_or_path is not None:  # a prompt a row, taken to be as long as training's
        rows = dataclasses.replace(step.lengths, P=config.eval_batch_size, G=1)
        evaluation = sum(_rollout_bytes(*rollout, rows, step.sizes)[2:])
        evaluation += estimate(job, dataclasses.replace(step, lengths=rows)).decode
    copy, preamble, prompts, own = _rollout_bytes(*rollout, step.lengths, step.sizes)
    gradients = _held(state.params)
    return StepBytes(
        weights=_held(state.params) + _held(frozen),
        reference=reference,
        moments=_held(state.opt_state),
        gradients=gradients,
        activations=max(temporary.update - gradients, 0),
        rollout_copy=copy,
        preamble_cache=preamble,
        prompts_cache=prompts,
        own_cache=own,
        decode=temporary.decode,
        evaluation=evaluation,
    )


# ---- what the programs need while they run: compiled, or estimated -------------------------------------


def devices_of(machine: Machine) -> Sequence[jax.Device]:
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


def compile_step(job: Job, step: Step, devices: Sequence[jax.Device]) -> Temporary:
    """What the update and decode need according to XLA, compiled for the devices; nothing runs.

    Decode's layers are unrolled: of a deep model those of two and four layers are compiled, the rest is linear.
    """
    mesh = mesh_of(devices, step.sizes)

    def decode(L: int) -> float:
        few = dataclasses.replace(job, model=dataclasses.replace(job.model, L=L))
        return temporary_bytes(lower_decode(few, step, mesh))

    with compiling_for(devices):
        update, L = temporary_bytes(lower_update(job, step, mesh)), job.model.L
        if L <= 4:
            return Temporary(update, decode(L))
        two, four = decode(2), decode(4)
        return Temporary(update, four + (four - two) / 2 * (L - 4))


def temporary_bytes(lowered: jax.stages.Lowered) -> float:
    """What a program needs in addition to its arguments on one device, according to XLA."""
    try:
        return lowered.compile().memory_analysis().temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:  # XLA refuses what a TPU cannot hold, and says what it takes
        needed = re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", str(error))
        if needed is None:
            raise
        return float(needed[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30}[needed[2]]


def lower_decode(job: Job, step: Step, mesh: Mesh) -> jax.stages.Lowered:
    """A decode to the end of a turn, for shapes."""
    sampler = _sampler(job.model, job.dtype, job.config.max_grpo_completion_length, mesh)
    params, trunk, cache = _rollout(sampler, job.model, step.lengths)
    rows = jax.ShapeDtypeStruct((step.lengths.B,), jnp.int32)
    keys = jax.ShapeDtypeStruct((*rows.shape, 2), jnp.uint32)
    return sampler.decode.lower(params, trunk, cache, keys, rows)


def lower_update(job: Job, step: Step, mesh: Mesh) -> jax.stages.Lowered:
    """An update of rows that use their whole budget, for shapes."""
    config, x, layout = job.config, step.lengths, Layout(mesh)
    tree = Tree((0,) * x.T0, x.T0, x.T1, config.max_grpo_completion_length)
    n, prompt = tree.budget, Prompt(Example([], ""), [0] * (x.T0 + x.T1 + 1), [])
    row = Trajectory(prompt, [0] * n, [True] * n, [0.0] * n, status=Status.ANSWERED, advantage=1.0)
    batch = make_batch(tree, [row] * x.B, x.G)
    more = {"ref_logprobs": config.beta > 0, "old_logprobs": config.num_iterations > 1}
    logprobs = batch.completions.sampler_logprobs
    batch = batch.with_logprobs(**{name: logprobs for name, has in more.items() if has})
    objective = grpo_objective(config)
    state, frozen = _state(job, layout)
    run = ModelStep(
        job.model, layout, job.dtype, config.gradient_checkpointing, config.temperature, step.micro_batches
    )
    update = make_update(run, optimizer_of(config, optax.constant_schedule(0.0)), objective, state, frozen)
    return update.lower(state, placed(batch, batch_shardings(layout, batch)))


def estimate(job: Job, step: Step) -> Temporary:
    """About what XLA takes on an accelerator: tests/test_plan.py compares with its buffers, within 15 %.

    Update: gradients, of micro-batches also their sum; activations as `cost` has them, with three arrays of scores
    (four on several devices, two of a block once they are cut); or where it is more, three arrays of a block of logits (two where there is
    one block) and copies of the head. With micro-batches also the trunk's fp32 keys and values and their
    cotangents, on several devices what each needs whole. Decode: three arrays of logits; on several devices the
    caches of a layer are laid out anew.
    """
    model, x, parts, item = job.model, step.lengths, step.micro_batches, job.dtype.itemsize
    (data, fsdp, tensor), remat = step.sizes, job.config.gradient_checkpointing
    row_devices, training = data * fsdp, Layout(AbstractMesh(step.sizes, AXES))
    alone = row_devices * tensor == 1
    shared, rows = (x.T0 + x.P * x.T1) / row_devices, x.B * x.T2 / row_devices / parts

    scores = 4 * model.N / tensor * max(shared, rows) * max(x.T0, x.T1, x.T2)
    scores = min((3 if alone else 4) * scores, 2 * score_block_bytes(on_cpu=False))
    blocks = MLP_TOKENS if alone and remat else math.inf
    waiting = min(shared, rows) if remat else 0
    layer = cost.layer_bytes(model, max(shared, rows), waiting, tensor, scores, blocks)
    keys = 4 * model.K * model.H * (x.T0 + x.P * x.T1)
    if row_devices > 1:  # every device's rows see all shared keys and values: two copies, with cotangents
        layer += 2 * 2 * 2 * keys / tensor
    if fsdp > 1:  # a layer gathered, and its gradient before it is scattered
        layer += (item + 4) * cost.layer_weights(model) / tensor

    shards, positions = training.head_shards(model.V), x.B * x.T2 // parts
    width, padded = head_blocks(model.V, shards, positions, on_cpu=False)
    logits = 4 * math.prod(
        training.activation((shards, width, positions), "logits_block").shard_shape(
            (shards, width, positions)
        )
    )
    cast = not job.config.use_peft and job.dtype != jnp.dtype(job.config.param_dtype)
    head = (2 if shards * width == model.V else 3) * logits + (
        1 + cast + padded
    ) * item * model.V * model.D / shards

    gradients = _held(_state(job, training)[0].params) * (1 if parts == 1 else 2)
    kept = cost.kept_bytes(model, item, remat, tensor) * (shared + rows)
    kept += 2 * 2 * model.L * keys if parts > 1 else 0
    decode = 3 * 4 * x.B * model.V / data / (fsdp * tensor if model.V % (fsdp * tensor) == 0 else 1)
    if not alone:
        slots = x.T0 + x.P * x.T1 + x.B * (x.T2 + 1) / data
        decode += (
            2 * item * model.K * model.H * slots / (fsdp * tensor if model.K % (fsdp * tensor) == 0 else 1)
        )
    return Temporary(gradients + kept + max(layer, head), decode)
