"""What a job would need, before it costs anything: `python -m grpo_jax.train --plan v5e-8`.

Memory by item, what would make it fit, and hours. No weights are loaded and nothing runs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from grpo_jax.models import cost
from grpo_jax.preflight.memory import (
    Step,
    StepBytes,
    Temporary,
    compile_step,
    devices_of,
    estimate,
    plan_step,
    step_bytes,
)
from grpo_jax.preflight.plan_inputs import (
    GPU_SHARE,
    GPUS,
    Machine,
    data_lengths,
    gpu_share,
    model_sizes,
    read_machine,
)
from grpo_jax.run.console import Console
from grpo_jax.run.job import steps_of
from grpo_jax.run.options import GRPOConfig
from grpo_jax.text import first_line

USABLE = 0.9  # of what jax takes of a device's memory: the rest is the programs' own, and holes
LARGEST_SHARE = 0.95  # of a GPU's memory that jax may be asked to take; the driver and kernels need the rest
FLOP_SHARE, BYTES_SHARE = 0.4, 0.5  # of the peak rates, assumed
GB = 1e9


def show_plan(config: GRPOConfig, console: Console) -> int:
    """Print what the job's steps need on the machine of the option `plan`.

    Returns:
        0 where it fits, else 1.

    Raises:
        ValueError, FileNotFoundError: bad input; says what and the fix.
    """
    machine = read_machine(config.required("plan"))
    model, folder = model_sizes(config)
    step = plan_step(config, model, data_lengths(config, folder), machine)
    x, (data, fsdp, tensor) = step.lengths, step.sizes
    console.line(
        f"{config.model_name_or_path} ({model.L} layers, width {model.D}, {cost.weights(model):,} weights) "
        f"on {machine.name}: {machine.count} device{'s' * (machine.count > 1)} of "
        f"{machine.memory / GB:.4g} GB, mesh data {data} · fsdp {fsdp} · tensor {tensor}"
    )
    how = "estimated from characters / 3.5: no tokenizer here"
    console.line(
        f"{x.P} × {x.G} completions, preamble {x.T0}, prompts {x.T1}, completions {x.T2} tokens, padded "
        f"({'counted by the tokenizer' if step.data.exact else how}); micro_batches {step.micro_batches}"
    )
    temporary = about = estimate(step)
    word, devices = "Estimate: ", devices_of(machine)
    if devices:
        console.line(f"Compiling the update and decode for {machine.count} × {devices[0].device_kind} …")
        try:
            temporary, word = compile_step(step, devices), ""
        except jax.errors.JaxRuntimeError as error:
            console.line(f"XLA does not compile it, what follows is an estimate: {first_line(error)}")
    size = step_bytes(step, temporary)
    items = dataclasses.asdict(size) | {"rollout in all": size.rollout, "update in all": size.update}
    rows = [(name.replace("_", " "), f"{value / GB:.3f}") for name, value in items.items()]
    console.table(f"{word}GB per device", ("item", "GB"), rows)
    part = "a device's memory"
    if machine.kind in GPUS:
        part = f"the {gpu_share():.0%} of a GPU's memory that jax takes"
    console.line(
        f"{word}it {'fits' if fits(size, machine) else 'does not fit'}: {size.peak / GB:.2f} GB of "
        f"{USABLE * machine.taken / GB:.2f} GB ({USABLE:.0%} of {part})"
    )
    if not fits(size, machine):
        scale = temporary.update / about.update, temporary.decode / about.decode
        _print_remedies(step, size, scale, console)
    _print_time(step, console)
    return 0 if fits(size, machine) else 1


def fits(size: StepBytes, machine: Machine) -> bool:
    """Whether a step stays under the usable memory of a device."""
    return size.peak <= USABLE * machine.taken


# What would make it fit


def find_remedies(step: Step, scale: tuple[float, float] = (1, 1)) -> list[tuple[dict[str, Any], float]]:
    """Options that make it fit, each alone; if none does, the first ones together that do.

    Args:
        scale: compiled bytes over estimated bytes, of update and decode; the remedies are estimated.

    Returns:
        (changed options, peak bytes) each; empty when nothing helps.
    """

    def peak(changes):
        config = dataclasses.replace(step.config, **changes)
        try:
            changed = plan_step(config, step.model, step.data, step.machine)
        except ValueError:  # a mesh or batch that other options do not allow
            return math.inf
        scaled = (n * factor for n, factor in zip(estimate(changed), scale, strict=True))
        return step_bytes(changed, Temporary(*scaled)).peak

    limit, alone, together = USABLE * step.machine.taken, [], {}
    options = [changes for changes in _changes(step.config, step.machine.count) if changes]
    for changes_of_one in options:
        sizes = ((changes, peak(changes)) for changes in changes_of_one)
        alone += [next((found for found in sizes if found[1] <= limit), None)]
    if any(alone):
        return [found for found in alone if found]
    least = peak(together)
    for changes_of_one in options:
        sizes = ((together | changes, peak(together | changes)) for changes in changes_of_one)
        changes, size = min(sizes, key=lambda found: found[1])
        if size < least:  # an option that lowers nothing is not asked for
            together, least = changes, size
        if least <= limit:
            return [(together, least)]
    return []


def _changes(config: GRPOConfig, devices: int) -> list[list[dict[str, Any]]]:
    """What may be changed, by option, the mildest first; ahead what changes no result."""

    def halves(name: str, least: int) -> list[dict[str, Any]]:
        n = getattr(config, name)
        return [{name: n >> i} for i in range(1, n.bit_length()) if n >> i >= least]

    first = max(config.micro_batches, 1)
    meshes = [n for n in range(config.mesh_fsdp + 1, devices + 1) if devices % n == 0]
    return [
        [] if config.gradient_checkpointing else [{"gradient_checkpointing": True}],
        [] if config.eval_dataset_id_or_path is None else halves("eval_batch_size", 1),
        [{"micro_batches": first * 2**i} for i in range(1, 9)],
        [{"mesh_fsdp": n} | ({} if config.mesh_data == -1 else {"mesh_data": -1}) for n in meshes],
        [{"optim_dtype": "bfloat16"}] if config.optim_dtype == "float32" else [],
        [{"param_dtype": "bfloat16"}] if config.param_dtype == "float32" else [],
        [] if config.use_peft else [{"use_peft": True}],
        halves("per_device_train_batch_size", 1),
        halves("max_grpo_completion_length", 128),
    ]


def _print_remedies(step: Step, size: StepBytes, scale: tuple[float, float], console: Console) -> None:
    remedies, machine = find_remedies(step, scale), step.machine
    raised = machine.kind in GPUS and size.peak <= USABLE * LARGEST_SHARE * machine.memory
    if raised:
        console.line(f"Estimate: with {GPU_SHARE}={LARGEST_SHARE} in the environment it would fit")
    for changes, peak in remedies:
        options = " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())
        console.line(f"Estimate: with {options} it would fit: {peak / GB:.2f} GB")
    if not (remedies or raised):
        console.line("Estimate: no option makes it fit: take more devices, or a smaller model")


# How long it would take


def step_hours(step: Step, peak: cost.Rates) -> float:
    """Hours of one batch at the assumed shares of a device's peak rates; every completion uses its whole budget.

    Tool calls, rewards and the network between devices take no time here.
    """
    config, x, (data, fsdp, tensor) = step.config, step.lengths, step.sizes
    flops, moved = FLOP_SHARE * peak.flops, BYTES_SHARE * peak.bytes
    whole, replica = (cost.Rates(n * flops, n * moved) for n in (data * fsdp * tensor, fsdp * tensor))
    rows = dataclasses.replace(x, P=x.P / data)  # each replica reads all weights
    scores = (config.beta > 0) + (config.num_iterations > 1)  # a forward pass each, a third of an update
    update = cost.least_update(step.model, x, config.gradient_checkpointing, whole)
    prefill = cost.least_prefill(step.model, x, whole)
    decode = cost.least_decode(step.model, rows, replica, step.dtype.itemsize)[0]
    return (prefill + decode + update * (config.num_iterations + scores / 3)) / 3600


def _print_time(step: Step, console: Console) -> None:
    peak = step.machine.rates
    if peak is None:
        console.line("Hours: not estimated, the rates of such devices are not known; name a machine")
        return
    run = steps_of(step.config, step.data.rows, step.sizes[0] * step.sizes[1])
    hours = step_hours(step, peak) * run.batches
    units = ((hours, "hours"), (60 * hours, "minutes"), (3600 * hours, "seconds"))
    amount, unit = next((one for one in units if one[0] >= 1), units[-1])
    console.line(
        f"Estimate: {amount:.3g} {unit} for {run.updates} updates, every completion as long as "
        f"allowed, without tool calls, at an assumed {FLOP_SHARE:.0%} of {peak.flops / 1e12:.4g} TFLOP/s and "
        f"{BYTES_SHARE:.0%} of {peak.bytes / 1e9:.4g} GB/s a device"
    )
