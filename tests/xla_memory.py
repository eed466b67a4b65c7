"""Prints the plan's estimate and what XLA says of the compiled programs; `test_plan.py` runs it in its own process.

    python tests/xla_memory.py '[[1, 1, 1], "qwen3 V D F L N K H", [P, G, T0, T1, T2], remat, micro_batches]' …

One line of JSON per case: estimated and compiled bytes of the update, then of decode. Traced as for an accelerator,
whose blocks the estimate has, and compiled for this CPU, in fp32. All cases have meshes of the same size.
"""

import json
import math
import sys
import types
from unittest import mock

import jax

from grpo_jax.models.qwen import ModelConfig
from grpo_jax.models.target import compiling_for
from grpo_jax.preflight import memory
from grpo_jax.preflight.plan_inputs import DataLengths, read_machine
from grpo_jax.rollout import sampler
from grpo_jax.run.options import GRPOConfig


def step_of(mesh, model, lengths, remat, parts) -> memory.Step:
    (data, fsdp, tensor), (P, G, T0, T1, budget) = mesh, lengths
    kind, *numbers = model.split()
    config = GRPOConfig(
        per_device_train_batch_size=P * G // (data * fsdp),
        num_generations=G,
        max_grpo_completion_length=budget,
        gradient_checkpointing=remat,
        micro_batches=parts,
        mesh_data=data,
        mesh_fsdp=fsdp,
        mesh_tensor=tensor,
    )
    sizes = ModelConfig(kind, *map(int, numbers), rope_theta=1e4, norm_eps=1e-6, tied=True)
    machine = read_machine(f"cpu-{math.prod(mesh)}")
    return memory.plan_step(config, sizes, DataLengths(100, T0, T1, True), machine)


def _scattered(old, x, slots, layout):
    """As a CPU writes: XLA for a CPU copies the caches of an accelerator's way, which XLA for a TPU does not."""
    return jax.vmap(lambda old, x, at: jax.lax.dynamic_update_slice(old, x, (0, at, 0)))(old, x, slots[:, 0])


def main(cases: list[str]) -> None:
    """Compile each case's two programs; nothing runs."""
    for case in cases:
        step = step_of(*json.loads(case))
        devices = memory.devices_of(step.machine)
        accelerators = [types.SimpleNamespace(platform="gpu")] * len(devices)
        named = mock.patch.object(memory, "compiling_for", lambda _, named=accelerators: compiling_for(named))
        with named, mock.patch.object(sampler, "_scattered", _scattered):
            compiled = memory.compile_step(step, devices)
        estimate = memory.estimate(step)
        held = memory.step_bytes(step, memory.Temporary(0, 0))
        before = held.weights + held.moments, held.rollout - held.weights - held.moments
        print(
            json.dumps([[b + x for b, x in zip(before, y, strict=True)] for y in (estimate, compiled)]),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
