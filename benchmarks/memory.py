"""Compiles the update of a model (it is not run, nothing is allocated) and prints what memory it would need.

    python benchmarks/memory.py --model qwen3-1.7b --rows 32 --preamble 5800 --completion 320

Then the same with the vocabulary, and with the preamble, twice as large. Temporary memory is XLA's
memory_analysis of the compiled program: everything but its arguments and results, gradients included. Compiled for one
device that is present; a CPU takes smaller attention blocks and computes bf16 products in fp32. benchmarks/aot.py
compiles for TPUs that are not present.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import jax
from job import Shape, abstract_batch, add_shape_options, make_job, shape_of

from grpo_jax.models.cost import weights
from grpo_jax.models.sharding import mesh_of
from grpo_jax.models.target import compiling_for

GB = 1e9


def update_memory(shape: Shape, dtype: str):
    """XLA's memory analysis of the update, compiled for one device."""
    one = jax.devices()[:1]
    with compiling_for(one):
        job = make_job(shape, dtype=dtype, mesh=mesh_of(one, (1, 1, 1)))
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
    args = parser.parse_args()
    shape = shape_of(parser, args)
    x, first = shape.lengths, None
    print(
        f"{args.model or args.shape}: {x.P} × {x.G} rows, preamble {x.T0}, prompt {x.T1 + 1}, completion {x.T2} "
        f"tokens; {args.dtype}, remat {'on' if shape.remat else 'off'}, compiled for {jax.devices()[0].device_kind}"
    )
    for name, variant in variants(shape).items():
        began = time.perf_counter()
        analysis = update_memory(variant, args.dtype)
        temporary = analysis.temp_size_in_bytes
        first = first or temporary
        print(
            f"{name:12s} temporary {temporary / GB:6.2f} GB ({temporary / first:.2f} times; fp32 gradients are "
            f"{4 * weights(variant.cfg) / GB:.2f} GB of it), arguments "
            f"{analysis.argument_size_in_bytes / GB:.2f} GB; compiled in {time.perf_counter() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
