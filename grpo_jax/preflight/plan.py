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
    AS_ESTIMATED,
    Job,
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
    Machine,
    data_lengths,
    gpu_share,
    model_sizes,
    read_machine,
)
from grpo_jax.run.console import Console
from grpo_jax.run.job import steps_of
from grpo_jax.run.options import GRPOConfig

USABLE = 0.9  # of what jax takes of a device's memory: the rest is the programs' own, and holes
LARGEST_SHARE = 0.95  # of a GPU's memory that jax may be asked to take; the driver and kernels need the rest
FLOP_SHARE, BYTES_SHARE = 0.4, 0.5  # of the peak rates, assumed
GB = 1e9


def fits(size: StepBytes, machine: Machine) -> bool:
    """Whether a step stays under the usable memory of a device."""
    return size.peak <= USABLE * machine.memory


def find_remedies(job: Job, scale: Temporary = AS_ESTIMATED) -> list[tuple[dict[str, Any], float]]:
    """Options that make it fit, each alone; if none does, the first ones together that do.

    Args:
        job: what does not fit.
        scale: of what was compiled over its estimate; the remedies are estimated.

    Returns:
        (changed options, peak bytes) each; empty when nothing helps.
    """

    def peak(changes):
        changed = dataclasses.replace(job, config=dataclasses.replace(job.config, **changes))
        try:
            step = plan_step(changed)
        except ValueError:  # a mesh or batch that other options do not allow
            return math.inf
        about = estimate(changed, step)
        about = Temporary(about.update * scale.update, about.decode * scale.decode)
        return step_bytes(changed, step, about).peak

    limit, found, together = USABLE * job.machine.memory, [], {}
    families = _changes(job.config, job.machine.count)
    for family in families:
        best = next(((changes, size) for changes in family if (size := peak(changes)) <= limit), None)
        found += [best] if best else []
    if found:
        return found
    least = peak(together)
    for family in families:
        best, size = min(
            ((c, peak(together | c)) for c in family), key=lambda x: x[1], default=({}, math.inf)
        )
        if size < least:  # an option that lowers nothing is not asked for
            together, least = together | best, size
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


def step_hours(job: Job, step: Step) -> float | None:
    """Hours of one batch at the assumed shares of the peak rates; every completion uses its whole budget.

    Tool calls, rewards and the network between devices take no time here.

    Returns:
        None where the machine's rates are not known.
    """
    device, config, (data, fsdp, tensor) = job.machine.device, job.config, step.sizes
    if device.flops is None:
        return None
    rates = FLOP_SHARE * device.flops, BYTES_SHARE * device.bytes
    whole, replica = (cost.Machine(*(n * r for r in rates)) for n in (data * fsdp * tensor, fsdp * tensor))
    rows = dataclasses.replace(step.lengths, P=step.lengths.P / data)  # each replica reads all weights
    scores = (config.beta > 0) + (config.num_iterations > 1)  # a forward pass each, a third of an update
    update = cost.least_update(job.model, step.lengths, config.gradient_checkpointing, whole)
    prefill = cost.least_prefill(job.model, step.lengths, whole)
    decode = cost.least_decode(job.model, rows, replica, job.dtype.itemsize)[0]
    return (prefill + decode + update * (config.num_iterations + scores / 3)) / 3600


def show_plan(config: GRPOConfig, console: Console) -> int:
    """Print what the job's steps need on the machine of the option `plan`.

    Returns:
        0 where it fits, else 1.

    Raises:
        ValueError, FileNotFoundError: bad input; says what and the fix.
    """
    machine = read_machine(config.required("plan"))
    model, folder = model_sizes(config)
    job = Job(config, model, data_lengths(config, folder), machine)
    step = plan_step(job)
    x, sizes = step.lengths, step.sizes
    run = steps_of(config, job.data.rows, sizes[0] * sizes[1])
    console.line(
        f"{config.model_name_or_path} ({model.L} layers, width {model.D}, {cost.weights(model):,} weights) "
        f"on {machine.name}: {machine.count} device{'s' * (machine.count > 1)} of "
        f"{machine.device.memory / GB:.4g} GB, mesh data {sizes[0]} · fsdp {sizes[1]} · tensor {sizes[2]}"
    )
    how = (
        "counted by the tokenizer" if job.data.exact else "estimated from characters / 3.5: no tokenizer here"
    )
    console.line(
        f"{x.P} × {x.G} completions, preamble {x.T0}, prompts {x.T1}, completions {x.T2} tokens, padded ({how}); "
        f"micro_batches {step.micro_batches}"
    )
    temporary = about = estimate(job, step)
    devices, word = devices_of(machine), "Estimate: "
    if devices:
        console.line(f"Compiling the update and decode for {machine.count} × {devices[0].device_kind} …")
        try:
            temporary, word = compile_step(job, step, devices), ""
        except jax.errors.JaxRuntimeError as error:
            console.line(
                f"XLA does not compile it, what follows is an estimate: {str(error).splitlines()[0]}"
            )
    size = step_bytes(job, step, temporary)
    items = dataclasses.asdict(size) | {"rollout in all": size.rollout, "update in all": size.update}
    rows = [(name.replace("_", " "), f"{value / GB:.3f}") for name, value in items.items()]
    console.table(f"{word}GB per device", ("item", "GB"), rows)

    part = (
        f"the {gpu_share():.0%} of a GPU's memory that jax takes" if machine.is_gpu else "a device's memory"
    )
    console.line(
        f"{word}it {'fits' if fits(size, machine) else 'does not fit'}: {size.peak / GB:.2f} GB of "
        f"{USABLE * machine.memory / GB:.2f} GB ({USABLE:.0%} of {part})"
    )
    if not fits(size, machine):
        _print_remedies(
            job, console, size, Temporary(*(t / a for t, a in zip(temporary, about, strict=True)))
        )
    hours, device = step_hours(job, step), machine.device
    if hours is None:
        console.line("Hours: not estimated, the rates of such devices are not known; name a machine")
    else:
        console.line(
            f"Estimate: {_duration(hours * run.batches)} for {run.updates} updates, every completion as long as "
            f"allowed, without tool calls, at an assumed {FLOP_SHARE:.0%} of {device.flops / 1e12:.4g} TFLOP/s and "
            f"{BYTES_SHARE:.0%} of {device.bytes / 1e9:.4g} GB/s a device"
        )
    return 0 if fits(size, machine) else 1


def _duration(hours: float) -> str:
    for amount, unit in ((hours, "hours"), (60 * hours, "minutes")):
        if amount >= 1:
            return f"{amount:.3g} {unit}"
    return f"{3600 * hours:.3g} seconds"


def _print_remedies(job: Job, console: Console, size: StepBytes, scale: Temporary) -> None:
    remedies = find_remedies(job, scale)
    raised = job.machine.is_gpu and size.peak <= USABLE * LARGEST_SHARE * job.machine.device.memory
    if raised:
        console.line(f"Estimate: with {GPU_SHARE}={LARGEST_SHARE} in the environment it would fit")
    for changes, peak in remedies:
        options = " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())
        console.line(f"Estimate: with {options} it would fit: {peak / GB:.2f} GB")
    if not (remedies or raised):
        console.line("Estimate: no option makes it fit: take more devices, or a smaller model")
