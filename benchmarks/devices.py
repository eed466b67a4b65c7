"""How a step divides over the devices of a mesh, as XLA counts it in the compiled programs; nothing runs.

    python benchmarks/devices.py [--kind qwen2] [--layers 2 4] [MESH …]        a mesh as 1x4x2: data, fsdp, tensor

Of eight virtual CPU devices. A line a mesh: FLOP of a device times the devices, over those of one device alone, for loss
and gradient of a batch, the prefill of preamble and prompts, and one token of decode (1 is an even division); then the
largest result of an all-gather in update and decode. A loop's body counts once, so layers are unrolled and attention
scores are not cut into blocks; with two numbers of layers the second ratio is that of the layers between them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import sys
from typing import Any
from unittest import mock

if "jax" not in sys.modules:
    fast = (
        "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"  # to compile; the same FLOP
    )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', fast)} --xla_force_host_platform_device_count=8"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import job
from jax.sharding import Mesh

from grpo_jax.models import attention
from grpo_jax.models.cost import Lengths
from grpo_jax.models.level import Level
from grpo_jax.models.qwen import ModelConfig
from grpo_jax.models.sharding import mesh_of, placed
from grpo_jax.models.target import compiling_for
from grpo_jax.preflight import memory
from grpo_jax.update.update import GrpoObjective, batch_loss

X = Lengths(P=8, G=4, T0=512, T1=64, T2=64)
V = 4112  # no other dimension; more rows than the batch has tokens, as in a real table
MESHES = ("2x1x1", "4x1x1", "8x1x1", "1x2x1", "1x4x1", "1x8x1", "1x1x8", "2x2x2", "1x4x2")


def model(kind: str, L: int) -> ModelConfig:
    """Eight devices divide its heads and widths."""
    return ModelConfig(kind, V, 128, 384, L, 16, 8, 16, 1e4, 1e-6, kind == "qwen3")


def compile_gradient(cfg: ModelConfig, mesh: Mesh) -> Any:
    """Loss and gradient of a batch, layers unrolled."""
    of = job.make_job(job.Shape(cfg, X, remat=True), mesh=mesh)
    params = jax.eval_shape(lambda: job.random_weights(cfg))
    layer = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), params["layers"])
    params = dict(params, layers=[layer] * cfg.L)
    shardings = of.step.layout.params(params)

    def loss(params, batch):
        return batch_loss(of.step, GrpoObjective(), params, batch)[0]

    gradient = jax.jit(jax.grad(loss), out_shardings=shardings)
    return gradient.lower(placed(params, shardings), job.abstract_batch(of)).compile()


def compile_rollout(cfg: ModelConfig, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Prefill of the preamble, of the prompts, and decode."""
    sampler, params, levels, cache = memory.rollout_shapes(cfg, jnp.dtype("float32"), X.T2, X, mesh)
    trunk = tuple(levels)

    def prefill(params, trunk, shape):
        ids = jnp.zeros(shape, jnp.int32)
        return sampler.prefill.__wrapped__(params, trunk, Level(ids, ids, ids == 0, shared=True))

    jitted = jax.jit(prefill, static_argnums=2)
    rows = jax.ShapeDtypeStruct((X.B,), jnp.int32)
    keys = jax.ShapeDtypeStruct((X.B, 2), jnp.uint32)
    return (
        jitted.lower(params, (), (1, X.T0)).compile(),
        jitted.lower(params, trunk[:1], (X.P, X.T1)).compile(),
        sampler.decode.lower(params, trunk, cache, keys, rows).compile(),
    )


def gathered(compiled: Any) -> list[tuple[int, ...]]:
    """Shapes of the results of all all-gathers, the largest last."""
    results = re.findall(r"= (\S+|\(.*?\)) all-gather(?:-start)?\(", compiled.as_text())
    shapes = [dims for result in results for dims in re.findall(r"\w\[([\d,]+)\]", result)]
    return sorted((tuple(map(int, dims.split(","))) for dims in shapes), key=math.prod)


def measure(kind: str, layers: list[int], mesh: str) -> tuple[list[float], list, list]:
    """FLOP of a device: gradient by number of layers, prefill, decode; what is gathered in gradient and decode."""
    sizes = tuple(map(int, mesh.split("x")))
    devices = jax.devices()[: math.prod(sizes)]
    placed_on = mesh_of(devices, sizes)
    with compiling_for(devices), mock.patch.object(attention, "score_block_bytes", lambda on_cpu: 1 << 40):
        gradients = [compile_gradient(model(kind, L), placed_on) for L in layers]
        *prefills, decode = compile_rollout(model(kind, layers[0]), placed_on)
    flop = [c.cost_analysis()["flops"] for c in (*gradients, *prefills, decode)]
    flop[1 : len(layers)] = [b - a for a, b in itertools.pairwise(flop[: len(layers)])]
    return flop, gathered(gradients[0]), gathered(decode)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("qwen2", "qwen3"), default="qwen3")
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("meshes", nargs="*", default=MESHES)
    args = parser.parse_args()
    alone, *_ = measure(args.kind, args.layers, "1x1x1")
    names = [f"update{L}" for L in args.layers]
    print("mesh  ", *names, "preamble prompts decode  gathered in update, in decode")
    for mesh in args.meshes:
        flop, *shapes = measure(args.kind, args.layers, mesh)
        n = math.prod(map(int, mesh.split("x")))
        ratios = (f"{n * mine / one:7.3f}" for mine, one in zip(flop, alone, strict=True))
        largest = ("x".join(map(str, of[-1])) if of else "-" for of in shapes)
        has_v = any(V in shape for of in shapes for shape in of)
        print(f"{mesh} ", *ratios, " ", *largest, "  with the whole vocabulary!" if has_v else "", flush=True)


if __name__ == "__main__":
    main()
