"""Prints what XLA says a compiled update and decode need on a device; `test_plan.py` runs it in a process of its own.

    python tests/xla_memory.py '[[1, 1, 1], "qwen3 V D F L N K H", [P, G, T0, T1, T2], remat, micro_batches]' …

One line of JSON per case: bytes of the update, bytes of decode, each with arguments and temporaries.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import job

from grpo_jax.models.cost import Lengths
from grpo_jax.models.qwen import ModelConfig
from grpo_jax.models.sharding import ACTIVATIONS, make_mesh
from grpo_jax.update.optimizer import make_optimizer, make_schedule
from grpo_jax.update.update import GrpoObjective, make_update


def main(cases: list[str]) -> None:
    """Compile each case's two programs; nothing runs."""
    for case in cases:
        sizes, model, lengths, remat, parts = json.loads(case)
        kind, *numbers = model.split()
        cfg = ModelConfig(kind, *map(int, numbers), rope_theta=1e4, norm_eps=1e-6, tied=True)
        job.make_mesh = functools.partial(make_mesh, *sizes)
        of = job.make_job(job.Shape(cfg, Lengths(*lengths), remat))
        print(json.dumps([_bytes(compile_update(of, parts)), _bytes(compile_decode(of))]), flush=True)


def compile_update(of: job.Job, parts: int):
    step = dataclasses.replace(of.step, micro_batches=parts)
    schedule = make_schedule("constant", 0.0, 0, 1)
    adamw = make_optimizer(schedule=schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0, max_grad_norm=1)
    state = jax.eval_shape(of.new_state)
    return make_update(step, adamw, GrpoObjective(), state).lower(state, job.abstract_batch(of)).compile()


def compile_decode(of: job.Job):
    sampler, B = of.sampler, of.shape.lengths.B

    def placed(x, kind):
        if x.ndim < 4:
            return x
        sharding = sampler.layout._named(ACTIVATIONS[kind][1], x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.eval_shape(lambda: sampler.export(job.random_weights(of.shape.cfg)))
    shardings = sampler.layout.params(params)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    # without the sampler's jit, which names compiler options and may not stand within another
    bare = dataclasses.replace(sampler, prefill=sampler.prefill.__wrapped__)
    trunk = jax.eval_shape(functools.partial(job.prefill, dataclasses.replace(of, sampler=bare)), params)
    rows = jax.ShapeDtypeStruct((B,), jnp.int32)
    cache = jax.eval_shape(sampler.begin, rows, rows)
    trunk, cache = (
        jax.tree.map(functools.partial(placed, kind=kind), tree)
        for tree, kind in ((trunk, "shared_kv"), (cache, "rows_kv"))
    )
    keys, live = jax.ShapeDtypeStruct((B, 2), jnp.uint32), jax.ShapeDtypeStruct((B,), bool)
    return sampler.decode.lower(params, trunk, cache, keys, live, rows).compile()


def _bytes(compiled) -> int:
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


if __name__ == "__main__":
    main(sys.argv[1:])
