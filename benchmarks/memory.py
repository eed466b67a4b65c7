"""Compiles the update of a model (it is not run, nothing is allocated) and prints what memory it would need.

    python benchmarks/memory.py --model qwen3-1.7b --rows 32 --preamble 5800 --completion 320
    python benchmarks/memory.py --model qwen3-1.7b --rows 32 --preamble 5800 --completion 320 --target v5p
    python benchmarks/memory.py --model qwen3-0.6b --rows 64 --target v5e --mesh 2 2 2

Then the same with the vocabulary, and with the preamble, twice as large. Temporary memory is XLA's
memory_analysis of the compiled program: everything but its arguments and results, gradients included; on one
device of several. Compiled for the present backend, where a CPU takes smaller attention blocks and computes bf16
products in fp32, or with --target for a TPU, which need not be here: `pip install ".[tpu]"` compiles for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time

import jax
from jax.sharding import Mesh
from job import Shape, abstract_batch, add_shape_options, make_job, shape_of

from grpo_jax.models.cost import weights
from grpo_jax.models.sharding import AXES, mesh_of
from grpo_jax.models.target import SLICES, compiling_for, tpu_devices

GB = 1e9
SLICE = 8  # devices of a TPU that is compiled for


def update_memory(shape: Shape, dtype: str, mesh: Mesh):
    """XLA's memory analysis of the compiled update, on one device."""
    with compiling_for(mesh.devices.reshape(-1)):
        job = make_job(shape, dtype=dtype, mesh=mesh)
        state = jax.eval_shape(job.new_state)
        return job.update.lower(state, abstract_batch(job)).compile().memory_analysis()


def variants(shape: Shape) -> dict[str, Shape]:
    """The shape, and with V and with T0 doubled."""
    wide = dataclasses.replace(shape.cfg, V=2 * shape.cfg.V)
    long = dataclasses.replace(shape.lengths, T0=2 * shape.lengths.T0)
    return {
        "as given": shape,
        f"V = {wide.V}": dataclasses.replace(shape, cfg=wide),
        f"T0 = {long.T0}": dataclasses.replace(shape, lengths=long),
    }


def main() -> None:
    """Print a line per variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_options(parser)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of activations")
    parser.add_argument("--target", choices=SLICES, help="compile for such a TPU instead of what is present")
    parser.add_argument("--mesh", type=int, nargs=3, default=(1, 1, 1), metavar=AXES, help="default 1 1 1")
    args = parser.parse_args()
    shape, wanted = shape_of(parser, args), math.prod(args.mesh)
    present = tpu_devices(args.target, SLICE) if args.target else jax.devices()
    if wanted > len(present):
        parser.error(
            f"--mesh {args.mesh[0]} {args.mesh[1]} {args.mesh[2]} must multiply to at most the {len(present)} "
            f"{args.target or 'present'} devices, got {wanted}; lower it, or name a --target"
        )
    devices = present[:wanted]
    mesh = mesh_of(devices, args.mesh)
    x, first = shape.lengths, None
    print(
        f"{args.model or args.shape}: {x.P} × {x.G} rows, preamble {x.T0}, prompt {x.T1 + 1}, completion {x.T2} "
        f"tokens; {args.dtype}, remat {'on' if shape.remat else 'off'}, compiled for {len(devices)} × "
        f"{devices[0].device_kind}"
    )
    for name, variant in variants(shape).items():
        began = time.perf_counter()
        try:
            analysis = update_memory(variant, args.dtype, mesh)
        except jax.errors.JaxRuntimeError as error:  # XLA refuses what a TPU cannot hold
            print(f"{name:12s} does not fit: {str(error).splitlines()[0]}", flush=True)
            continue
        temporary = analysis.temp_size_in_bytes
        first = first or temporary
        print(
            f"{name:12s} temporary {temporary / GB:6.2f} GB ({temporary / first:.2f} times; fp32 gradients are "
            f"{4 * weights(variant.cfg) / mesh.size / GB:.2f} GB of it), arguments "
            f"{analysis.argument_size_in_bytes / GB:.2f} GB; compiled in {time.perf_counter() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
