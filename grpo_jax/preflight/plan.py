"""What a job would need, before it costs anything: `python -m grpo_jax.train --plan v5e-8`.

Pure arithmetic on the model's sizes, the lengths of a step, the mesh and the options; shardings are those of
`sharding`. No weights are loaded and no jax backend is started.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from grpo_jax.models import cost
from grpo_jax.models.attention import score_block_bytes
from grpo_jax.models.logprobs import head_blocks
from grpo_jax.models.lora import LoraConfig, init_adapters
from grpo_jax.models.qwen import MLP_TOKENS, ModelConfig, abstract_params
from grpo_jax.models.sharding import AXES, Layout, mesh_sizes
from grpo_jax.preflight.plan_inputs import (
    GPU_SHARE,
    DataLengths,
    Machine,
    data_lengths,
    gpu_share,
    model_sizes,
    read_machine,
)
from grpo_jax.rollout.sampler import compaction_pays, part_sizes
from grpo_jax.run.console import Console
from grpo_jax.run.options import GRPOConfig, compute_dtype
from grpo_jax.update.batch import bucket, completion_bucket

USABLE = 0.9  # of what jax takes of a device's memory: the rest is the programs' own, and holes
LARGEST_SHARE = 0.95  # of a GPU's memory that jax may be told to take; the driver and kernels need the rest
FLOP_SHARE, BYTES_SHARE = 0.4, 0.5  # of the peak rates, assumed
GB = 1e9


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes of a step on one device, by item.

    Args:
        weights: the model, adapters and a reference (beta > 0) included.
        moments: AdamW's two.
        gradients: of what is trained; a micro-batch's beside the sum.
        kept_activations: of the update: layer inputs and what attention returned; without remat all that
            layers make.
        working_set: of one layer, attention's blocks of scores included.
        head: blocks of logits and copies of the head, when no layer runs.
        rollout_copy: the weights that the rollout reads.
        preamble_cache, prompts_cache, own_cache: keys and values.
        decode: of one decode step.
        evaluation: caches of its rows and prompts, and its decode step; 0 without a test file.
    """

    weights: float
    moments: float
    gradients: float
    kept_activations: float
    working_set: float
    head: float
    rollout_copy: float
    preamble_cache: float
    prompts_cache: float
    own_cache: float
    decode: float
    evaluation: float

    @property
    def update(self) -> float:
        """Bytes while an update runs; what the rollout read is gone by then."""
        held = self.weights + self.moments + self.gradients + self.kept_activations
        return held + max(self.working_set, self.head)

    @property
    def rollout(self) -> float:
        """Bytes while a rollout runs, of training or of an evaluation."""
        held = self.weights + self.moments + self.rollout_copy + self.preamble_cache
        return held + max(self.prompts_cache + self.own_cache + self.decode, self.evaluation)

    @property
    def peak(self) -> float:
        """The larger of both."""
        return max(self.update, self.rollout)


class Step(NamedTuple):
    """One step of a configuration on a mesh.

    Args:
        lengths: of the padded batch; T1 without, T2 with the prompt's last token.
        sizes: devices along data, fsdp and tensor.
        micro_batches: parts of the update.
        bytes: on one device.
    """

    lengths: cost.Lengths
    sizes: tuple[int, int, int]
    micro_batches: int
    bytes: StepBytes


@dataclasses.dataclass(frozen=True)
class JobPlan:
    """A job on a machine.

    Args:
        machine: the devices.
        model: its sizes.
        data: lengths of the data's prompts.
        step: what a step needs.
        remedies: options that make it fit, with the peak bytes they lead to; empty where it fits.
        updates: of the whole run.
        hours: for these; None where the machine's rates are not known.
    """

    machine: Machine
    model: ModelConfig
    data: DataLengths
    step: Step
    remedies: list[tuple[dict[str, Any], float]]
    updates: int
    hours: float | None

    @property
    def fits(self) -> bool:
        """Whether the peak stays under the usable memory."""
        return fits(self.step, self.machine)


def plan_job(config: GRPOConfig, make_plan: Callable[[GRPOConfig, int, int], Any]) -> JobPlan:
    """Reckon what a configuration's steps need on the machine of its option `plan`.

    Args:
        config: the options.
        make_plan: (options, rows, devices that rows are spread over) -> batches and updates.

    Raises:
        ValueError, FileNotFoundError: bad input; says what and the mend.
    """
    machine = read_machine(config.required("plan"))
    model, folder = model_sizes(config)
    data = data_lengths(config, folder)
    step = plan_step(config, model, data, machine)
    run = make_plan(config, data.rows, step.sizes[0] * step.sizes[1])
    remedies = [] if fits(step, machine) else find_remedies(config, model, data, machine)
    hours = step_hours(config, model, step, machine)
    return JobPlan(
        machine, model, data, step, remedies, run.updates, None if hours is None else hours * run.batches
    )


def fits(step: Step, machine: Machine) -> bool:
    """Whether a step stays under the usable memory of a device."""
    return step.bytes.peak <= USABLE * machine.memory


def _dtype(config: GRPOConfig, machine: Machine) -> jnp.dtype:
    return jnp.dtype(compute_dtype(config.dtype, machine.is_cpu))


def plan_step(config: GRPOConfig, model: ModelConfig, data: DataLengths, machine: Machine) -> Step:
    """Lengths, mesh, micro-batches and bytes of one step.

    Raises:
        ValueError: the mesh does not have the machine's devices, or the batch does not split into groups or
            micro-batches.
    """
    devices = f"the plan's {machine.count} devices"
    sizes = mesh_sizes(config.mesh_data, config.mesh_fsdp, config.mesh_tensor, machine.count, devices)
    row_devices = sizes[0] * sizes[1]
    B, G = config.batch_size(row_devices), config.num_generations
    budget = config.max_grpo_completion_length
    lengths = cost.Lengths(
        B // G,
        G,
        bucket(data.preamble, row_devices),
        bucket(data.rest, row_devices),
        completion_bucket(budget, budget),
    )
    item = _dtype(config, machine).itemsize
    remat = config.gradient_checkpointing
    parts = config.micro_batches or cost.micro_batches(
        model, lengths.P, G, lengths.T2 / row_devices, item, remat, machine.memory
    )
    if lengths.P % (parts // math.gcd(parts, G)):
        raise ValueError(f"micro_batches {parts} cannot split {lengths.P} prompts × {G} generations evenly")
    return Step(lengths, sizes, parts, step_bytes(config, model, lengths, sizes, parts, machine))


def step_bytes(
    config: GRPOConfig,
    model: ModelConfig,
    x: cost.Lengths,
    sizes: tuple[int, int, int],
    parts: int,
    machine: Machine,
) -> StepBytes:
    """Bytes of one step on one device.

    Args:
        config: the options.
        model: its sizes.
        x: lengths of the padded batch.
        sizes: devices along data, fsdp and tensor.
        parts: micro-batches.
        machine: the devices.
    """
    mesh = AbstractMesh(sizes, AXES)
    training, rollout = Layout(mesh), Layout(mesh, rollout=True)
    dtype = _dtype(config, machine)
    item = dtype.itemsize
    params = abstract_params(model)
    whole = _elements(training, params)
    trained, trained_item = whole, jnp.dtype(config.param_dtype).itemsize
    weights = trained * trained_item + (whole * item if config.beta else 0)
    if config.use_peft:
        targets = config.lora_target_modules
        lora = LoraConfig.of(config.lora_r, config.lora_alpha, config.lora_dropout, targets)
        trained = _elements(training, jax.eval_shape(lambda: init_adapters(params["layers"], lora, 0)))
        weights = whole * item + trained * trained_item
    cast = not config.use_peft and dtype != jnp.dtype(config.param_dtype)  # a frozen head is kept in it
    budget = config.max_grpo_completion_length
    served = _rollout_bytes(rollout, model, x, budget, item, machine.is_cpu)
    n, evaluation = config.eval_batch_size, {}
    if config.eval_dataset_id_or_path is not None:  # a prompt a row, taken to be as long as training's
        evaluated = dataclasses.replace(x, P=n, G=1)
        evaluation = _rollout_bytes(rollout, model, evaluated, budget, item, machine.is_cpu)
        del evaluation["preamble_cache"]
    return StepBytes(
        weights=weights,
        gradients=trained * trained_item * (1 if parts == 1 else 2),
        moments=2 * trained * jnp.dtype(config.optim_dtype).itemsize,
        rollout_copy=_elements(rollout, params) * item,
        **served,
        evaluation=sum(evaluation.values()),
        **_activation_bytes(model, x, sizes, parts, item, config.gradient_checkpointing, machine.is_cpu),
        head=_head_bytes(training, model, x, parts, item, cast, machine.is_cpu),
    )


def _elements(layout: Layout, tree: Any) -> int:
    """Elements of a tree of weights that one device holds."""
    shards = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), tree, layout.params(tree))
    return sum(jax.tree.leaves(shards))


def _rollout_bytes(
    layout: Layout, model: ModelConfig, x: cost.Lengths, budget: int, item: int, on_cpu: bool
) -> dict[str, float]:
    """Caches of a rollout on one device, and what a decode step makes."""

    def cache(kind, n, slots):
        return 2 * model.L * item * math.prod(layout.shard_shape((n, model.K, slots, model.H), kind))

    logits = 4 * math.prod(layout.shard_shape((x.B, model.V), "decode_logits"))
    few = 0  # the rows that go on have their prompt's keys and values copied beside their own
    if compaction_pays(budget, on_cpu):
        trunk = tuple((None, jax.ShapeDtypeStruct(shape, bool)) for shape in ((1, x.T0), (x.P, x.T1)))
        few = max(part_sizes(x.B, budget + 1, trunk, layout)[1:], default=0)
    caches = {
        "preamble_cache": cache("shared_kv", 1, x.T0),
        "prompts_cache": cache("shared_kv", x.P, x.T1),
        "own_cache": cache("rows_kv", x.B, budget + 1),
    }
    decode = 3 * logits + cache("rows_kv", few, x.T1 + budget + 1)
    if layout.mesh.size > 1:  # rows stay a dimension there, for which one layer's are laid out anew
        decode += sum(caches.values()) / model.L
    elif on_cpu:  # the trunk's keys are turned
        decode += (caches["preamble_cache"] + caches["prompts_cache"]) / 2
    return caches | {"decode": decode}


def _activation_bytes(model, x, sizes, parts, item, remat, on_cpu):
    """What layers keep, and one layer's working set.

    With micro-batches also the trunk's fp32 keys and values with their cotangents; on several devices what
    every one of them needs whole.
    """
    data, fsdp, tensor = sizes
    shared = (x.T0 + x.P * x.T1) / (data * fsdp)
    rows = x.B * x.T2 / (data * fsdp) / parts
    scores = 4 * model.N / tensor * max(shared, rows) * max(x.T0, x.T1, x.T2)
    # the scores, their exponentials, and a cotangent of each; of blocks about two remain at a time
    scores = min(4 * scores, 2 * score_block_bytes(on_cpu))
    at_a_time = MLP_TOKENS if data * fsdp * tensor == 1 else math.inf
    kept, working = cost.activation_bytes(model, shared, rows, item, remat, tensor, scores, at_a_time)
    keys = 4 * model.K * model.H * (x.T0 + x.P * x.T1)
    if parts > 1:
        kept += 2 * 2 * model.L * keys
    if data * fsdp > 1:  # every device's rows see all shared keys and values: two copies, with cotangents
        working += 2 * 2 * 2 * keys / tensor
    if fsdp > 1:  # gathered, and their gradient before it is scattered
        working += (item + 4) * cost.layer_weights(model) / tensor
    return {"kept_activations": kept, "working_set": working}


def _head_bytes(layout, model, x, parts, item, cast, on_cpu):
    """Three arrays of the size of a block of logits, and copies of the head.

    One place holds the gradient of the embedding's lookups and then AdamW's step. A cast adds the head in the
    run's dtype, blocks that do not divide the vocabulary a padded one.
    """
    shards, positions = layout.head_shards(model.V), x.B * x.T2 // parts
    width, padded = head_blocks(model.V, shards, positions, on_cpu)
    logits = 4 * math.prod(layout.shard_shape((shards, width, positions), "logits_block"))
    copies = 1 + cast + padded
    return 3 * logits + copies * item * model.V * model.D / shards


def find_remedies(
    config: GRPOConfig, model: ModelConfig, data: DataLengths, machine: Machine
) -> list[tuple[dict[str, Any], float]]:
    """Options that make it fit, each alone; if none does, the first ones together that do.

    Returns:
        (changed options, peak bytes) each; empty when nothing helps.
    """

    def peak(changes):
        try:
            return plan_step(dataclasses.replace(config, **changes), model, data, machine).bytes.peak
        except ValueError:  # a mesh or a batch that the other options do not allow
            return math.inf

    limit, found, together = USABLE * machine.memory, [], {}
    for family in _changes(config, machine.count):
        for changes in family:
            if peak(changes) <= limit:
                found.append((changes, peak(changes)))
                break
    if found:
        return found
    for family in _changes(config, machine.count):
        best = together | min(family, key=lambda changes: peak(together | changes), default={})
        if peak(best) < peak(together):  # what lowers nothing is not asked for
            together = best
        if peak(together) <= limit:
            return [(together, peak(together))]
    return []


def _changes(config: GRPOConfig, devices: int) -> Iterator[list[dict[str, Any]]]:
    """What may be changed, by option, the mildest first; ahead what changes no result."""
    if not config.gradient_checkpointing:
        yield [{"gradient_checkpointing": True}]
    if config.eval_dataset_id_or_path is not None:
        yield [{"eval_batch_size": n} for n in _halves(config.eval_batch_size, 1)]
    first = max(config.micro_batches, 1)
    yield [{"micro_batches": first * 2**i} for i in range(1, 9)]
    meshes = [n for n in range(config.mesh_fsdp + 1, devices + 1) if devices % n == 0]
    yield [{"mesh_fsdp": n} | ({} if config.mesh_data == -1 else {"mesh_data": -1}) for n in meshes]
    if config.optim_dtype == "float32":
        yield [{"optim_dtype": "bfloat16"}]
    if config.param_dtype == "float32":
        yield [{"param_dtype": "bfloat16"}]
    if not config.use_peft:
        yield [{"use_peft": True}]
    yield [{"per_device_train_batch_size": n} for n in _halves(config.per_device_train_batch_size, 1)]
    yield [{"max_grpo_completion_length": n} for n in _halves(config.max_grpo_completion_length, 128)]


def _halves(n: int, least: int) -> list[int]:
    return [n >> i for i in range(1, n.bit_length()) if n >> i >= least]


def step_hours(config: GRPOConfig, model: ModelConfig, step: Step, machine: Machine) -> float | None:
    """Hours of one batch at the assumed shares of the peak rates; every completion uses its whole budget.

    Tool calls, rewards and the network between devices take no time here.

    Returns:
        None where the machine's rates are not known.
    """
    device, (data, fsdp, tensor) = machine.device, step.sizes
    if device.flops is None:
        return None
    replica = cost.Machine(FLOP_SHARE * device.flops, BYTES_SHARE * device.bytes)
    whole = cost.Machine(replica.flops * machine.count, replica.bytes * machine.count)
    replica = cost.Machine(replica.flops * fsdp * tensor, replica.bytes * fsdp * tensor)
    item = _dtype(config, machine).itemsize
    rows = dataclasses.replace(step.lengths, P=step.lengths.P / data)  # each replica reads all weights
    update = cost.least_update(model, step.lengths, config.gradient_checkpointing, whole)
    scores = (config.beta > 0) + (config.num_iterations > 1)  # a forward pass each, a third of an update
    seconds = (
        cost.least_prefill(model, step.lengths, whole)
        + cost.least_decode(model, rows, replica, item)[0]
        + update * (config.num_iterations + scores / 3)
    )
    return seconds / 3600


def show_plan(config: GRPOConfig, console: Console, make_plan: Callable[[GRPOConfig, int, int], Any]) -> int:
    """Print the plan of `plan_job`; returns 0 where it fits, else 1."""
    plan = plan_job(config, make_plan)
    machine, step, x = plan.machine, plan.step, plan.step.lengths
    word = "" if machine.is_cpu else "Estimate: "
    console.line(
        f"{word}{config.model_name_or_path} ({plan.model.L} layers, width {plan.model.D}, "
        f"{cost.weights(plan.model) / GB:.3g} B weights) on {machine.name}: {machine.count} "
        f"device{'s' * (machine.count > 1)} of {machine.device.memory / GB:.4g} GB, mesh data {step.sizes[0]} · "
        f"fsdp {step.sizes[1]} · tensor {step.sizes[2]}"
    )
    how = (
        "counted by the tokenizer"
        if plan.data.exact
        else "estimated from characters / 3.5: no tokenizer here"
    )
    console.line(
        f"{x.P} × {x.G} completions, preamble {x.T0}, prompts {x.T1}, completions {x.T2} tokens, padded ({how}); "
        f"micro_batches {step.micro_batches}"
    )
    items = dataclasses.asdict(step.bytes) | {
        "rollout in all": step.bytes.rollout,
        "update in all": step.bytes.update,
    }
    rows = [(name.replace("_", " "), f"{size / GB:.3f}") for name, size in items.items()]
    console.table(f"{word}GB per device", ("item", "GB"), rows)
    _print_verdict(plan, console, word)
    return 0 if plan.fits else 1


def _print_verdict(plan: JobPlan, console: Console, word: str) -> None:
    machine, peak = plan.machine, plan.step.bytes.peak
    verdict = "fits" if plan.fits else "does not fit"
    part = (
        f"the {gpu_share():.0%} of a GPU's memory that jax takes" if machine.is_gpu else "a device's memory"
    )
    limit = f"{USABLE * machine.memory / GB:.2f} GB ({USABLE:.0%} of {part})"
    console.line(f"{word}it {verdict}: {peak / GB:.2f} GB of {limit}")
    raised = not plan.fits and machine.is_gpu and peak <= USABLE * LARGEST_SHARE * machine.device.memory
    if raised:
        console.line(f"{word}with {GPU_SHARE}={LARGEST_SHARE} in the environment it would fit")
    for changes, size in plan.remedies:
        options = " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())
        console.line(f"{word}with {options} it would fit: {size / GB:.2f} GB")
    if not (plan.fits or plan.remedies or raised):
        console.line(f"{word}no option makes it fit: take more devices, or a smaller model")
    if plan.hours is None:
        console.line("Hours: not estimated, the rates of such devices are not known; name a machine")
        return
    device = plan.machine.device
    console.line(
        f"Estimate: {plan.hours:.3g} hours for {plan.updates} updates, every completion as long as allowed, "
        f"without tool calls, at an assumed {FLOP_SHARE:.0%} of {device.flops / 1e12:.4g} TFLOP/s and "
        f"{BYTES_SHARE:.0%} of {device.bytes / 1e9:.4g} GB/s a device"
    )
