"""Compiles a job's programs for TPUs that are not there, and compares them with the plan and with our formulas.

    python benchmarks/aot.py --target v5e-1      Qwen2.5-0.5B, configs/default.yaml
    python benchmarks/aot.py --target v5e-8      Qwen3-1.7B on fsdp 8, configs/qwen3_1.7b.yaml
    python benchmarks/aot.py --target v6e-8      Qwen3-4B on fsdp 8, configs/qwen3_4b.yaml
    python benchmarks/aot.py --target v5p-2 --config configs/qwen3_1.7b.yaml --programs update

Other options are those of training: `--mesh_fsdp 4`, `--max_grpo_completion_length 256`. Nothing runs, and no weights
are read; libtpu, which compiles, comes with `pip install ".[tpu]"`. A line a program, of one device:

- temporary memory in GB by XLA, and what `--plan` estimates where it has no libtpu (update and decode);
- FLOP of matrix products over those of models/cost.py, and for decode bytes of memory of one token over its formula;
- collectives: how many run (of decode and append in a turn of their loop) and the bytes of their results;
- problems: what XLA says it rematerializes since it cannot reshard it, and in the loop of decode loops over rows, and
  copies that are as large as a layer's cache or the head.

The update is compiled in full depth, its layers being a loop. The others' layers are unrolled: models of two and of four
layers are compiled, and all figures continued linearly. `--layers N` compiles all programs of a model of N layers instead.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

if "jax" not in sys.modules:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this program takes no accelerator
    os.environ |= {"TPU_STDERR_LOG_LEVEL": "1", "TPU_MIN_LOG_LEVEL": "1"}  # XLA's warnings are read below

import hlo
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.models import cost
from grpo_jax.models.level import Level
from grpo_jax.models.sharding import mesh_of
from grpo_jax.models.target import compiling_for, tpu_devices
from grpo_jax.preflight import memory
from grpo_jax.preflight.memory import Step, plan_step
from grpo_jax.preflight.plan_inputs import data_lengths, model_sizes, read_machine
from grpo_jax.rollout.sampler import cache_sizes
from grpo_jax.run.config import parse_config

JOBS = {"v5e-1": "configs/default.yaml", "v5e-8": "configs/qwen3_1.7b.yaml", "v6e-8": "configs/qwen3_4b.yaml"}
FEW = 2, 4  # layers of the models from which figures are continued
RESPONSE = 64  # tokens of a tool's response, of which append feeds one to an eighth of the rows
INVOLUNTARY = "Involuntary full rematerialization"  # XLA's words for what it cannot reshard


class Compiled(NamedTuple):
    """What XLA made of one program, on one device.

    Args:
        temporary: bytes in addition to arguments and results.
        moved: bytes of memory read and written; of decode and append by one turn of their loop.
        collectives: (how many run, bytes of their results) by kind.
        problems: what it should not do.
    """

    temporary: float
    flop: float
    moved: float
    collectives: dict[str, tuple[float, float]]
    problems: list[str]
    seconds: float


def step_for(target: str, options: list[str]) -> Step:
    """A step of the job of training's options on a machine that `--plan` knows."""
    machine = read_machine(target)
    spread = [] if "--mesh_fsdp" in options else ["--mesh_fsdp", str(machine.count)]
    config = parse_config([*options, *spread], prog="aot", default_config=JOBS.get(target)).config
    model, folder = model_sizes(config)
    return plan_step(config, model, data_lengths(config, folder), machine)


# ---- the programs, and what they must cost ---------------------------------------------------------------


def lower(name: str, step: Step, mesh: Mesh) -> jax.stages.Lowered:
    """A program of a step by name, for shapes."""
    if name == "update":
        return memory.lower_update(step, mesh)
    if name == "decode":
        return memory.lower_decode(step, mesh, step.model.L)
    x, budget = step.lengths, step.config.max_grpo_completion_length
    sampler, params, levels, cache = memory.rollout_shapes(step.model, step.dtype, budget, x, mesh)
    trunk = tuple(filter(None, levels))

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    if name == "append":
        rows, fed = x.B, max(x.B // 8, 1)
        return sampler.append.lower(params, trunk, cache, ids(rows, RESPONSE), ids(rows), ids(rows), rows=fed)
    above, shape = ((), (1, x.T0)) if name == "preamble" else (trunk[:1], (x.P, x.T1))
    level = Level(ids(*shape), ids(*shape), jax.ShapeDtypeStruct(shape, jnp.bool_), shared=True)
    return sampler.prefill.lower(params, above, level)


def formulas(name: str, step: Step) -> tuple[float, float | None]:
    """(FLOP, bytes of memory, if we have a formula) of a program on one device."""
    model, x, n = step.model, step.lengths, math.prod(step.sizes)
    if name == "update":
        return sum(cost.update_flop(model, x, step.config.gradient_checkpointing).values()) / n, None
    if name == "decode":
        flop, moved = cost.decode_step(model, x, x.T2, step.dtype.itemsize)
        return flop / n, moved / n
    if name == "append":  # as prefill, of an eighth of the rows, with their prompt and all slots above them
        fed = dataclasses.replace(x, P=max(x.B // 8, 1), T0=x.T0 + x.T1 + x.T2, T1=RESPONSE)
        return cost.prefill_flop(model, fed)["prompts"] / n, None
    return cost.prefill_flop(model, x)["preamble" if name == "preamble" else "prompts"] / n, None


# ---- compiling and reading -------------------------------------------------------------------------------


@contextlib.contextmanager
def logged() -> Iterator[Callable[[], str]]:
    """A block in which the given function returns what was written to standard error so far, that of C++ included."""
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: (file.seek(0), file.read())[1]
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def rematerialized(log: str) -> list[str]:
    """What XLA's log says it had to make whole on every device."""
    return sorted({f"rematerialized: {what}" for what in re.findall(rf"{INVOLUNTARY}.*?(%\S+ = \S+)", log)})


def compile_program(name: str, step: Step, mesh: Mesh) -> Compiled:
    """Compile it for the mesh's devices and read the result."""
    began = time.perf_counter()
    with logged() as log, compiling_for(list(mesh.devices.flat)):
        lowered = lower(name, step, mesh)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:  # XLA refuses what a TPU cannot hold
            temporary, problem = memory.refused_bytes(error) or math.nan, str(error).splitlines()[0]
            return Compiled(temporary, math.nan, math.nan, {}, [problem], time.perf_counter() - began)
        problems = rematerialized(log())
    program, in_loop = hlo.Program(compiled.as_text()), name in ("decode", "append")
    if name == "decode":
        problems += program.inner_loops()
        n, model, x = math.prod(step.sizes), step.model, step.lengths
        cache = x.B * model.K * cache_sizes(step.config.max_grpo_completion_length)[-1] * model.H // n
        problems += program.copies(min(cache, model.V * model.D // n))
    return Compiled(
        compiled.memory_analysis().temp_size_in_bytes,
        program.flop(),
        program.traffic(in_loop),
        program.collectives(in_loop),
        problems,
        time.perf_counter() - began,
    )


def continued(few: Compiled, more: Compiled, layers: tuple[int, int], L: int) -> Compiled:
    """What a model of L layers would need, from two with fewer."""

    def at(a, b):
        return a + (b - a) / (layers[1] - layers[0]) * (L - layers[0])

    none = (0, 0)
    collectives = {
        kind: tuple(map(at, few.collectives.get(kind, none), more.collectives.get(kind, none)))
        for kind in few.collectives | more.collectives
    }
    numbers = [at(a, b) for a, b in zip(few[:3], more[:3], strict=True)]
    return Compiled(*numbers, collectives, more.problems, few.seconds + more.seconds)


def measure(name: str, step: Step, mesh: Mesh, whole: bool) -> Compiled:
    """A program of the model: compiled, or continued from models with fewer layers."""
    if whole or name == "update":
        return compile_program(name, step, mesh)
    few, more = (compile_program(name, of_layers(step, L), mesh) for L in FEW)
    return continued(few, more, FEW, step.model.L)


def of_layers(step: Step, L: int | None) -> Step:
    """The step with a model of so many layers, or its own."""
    return dataclasses.replace(step, model=dataclasses.replace(step.model, L=L or step.model.L))


def main() -> None:
    """Print the table; exits with 1 where there is a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    programs = ("preamble", "prompts", "decode", "append", "update")
    parser.add_argument("--target", default="v5e-1", help="a machine that --plan knows (default v5e-1)")
    parser.add_argument("--programs", nargs="+", choices=programs, default=programs)
    parser.add_argument("--layers", type=int, help="compile all programs of a model of so many layers")
    args, options = parser.parse_known_args()
    step = of_layers(step_for(args.target, options), args.layers)
    devices = tpu_devices(step.machine.kind, step.machine.count)
    x, sizes = step.lengths, " · ".join(map(str, step.sizes))
    print(
        f"{step.config.model_name_or_path} on {step.machine.name}, mesh {sizes}: {x.P} × {x.G} completions, preamble {x.T0}, "
        f"prompts {x.T1}, completions {x.T2} tokens, micro_batches {step.micro_batches}"
    )
    print(
        "| program | temporary GB | plan GB | FLOP | bytes | collectives | problems | compiled in |\n|"
        + "---|" * 8
    )
    estimated, results = memory.estimate(step), {}
    for name in args.programs:
        made = results[name] = measure(name, step, mesh_of(devices, step.sizes), bool(args.layers))
        flop, moved = formulas(name, step)
        of_kinds = [f"{n:.0f} {kind} {size / 1e6:.1f} MB" for kind, (n, size) in made.collectives.items()]
        cells = (
            name,
            f"{made.temporary / 1e9:.2f}",
            f"{getattr(estimated, name) / 1e9:.2f}" if hasattr(estimated, name) else "",
            f"{made.flop / 1e9:.4g} G, {made.flop / flop:.3f}",
            f"{made.moved / 1e9:.3f} G" + (f", {made.moved / moved:.3f}" if moved else ""),
            ", ".join(of_kinds) or "none",
            "; ".join(made.problems) or "none",
            f"{made.seconds:.0f} s",
        )
        print("| " + " | ".join(cells) + " |", flush=True)
    temporary = estimated._replace(
        **{k: made.temporary for k, made in results.items() if hasattr(estimated, k)}
    )
    plan, size = (memory.step_bytes(step, of) for of in (estimated, temporary))
    print(
        f"In all, with weights, moments and caches: rollout {size.rollout / 1e9:.2f} GB, update {size.update / 1e9:.2f} GB; "
        f"the plan estimates {plan.rollout / 1e9:.2f} and {plan.update / 1e9:.2f}"
    )
    sys.exit(any(made.problems for made in results.values()))


if __name__ == "__main__":
    main()
