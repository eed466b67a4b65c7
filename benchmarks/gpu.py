"""One measurement of `benchmarks/gpu.sh`, appended to a file as one JSON line.

    python benchmarks/gpu.py parity bfloat16                          # sampler against trainer
    python benchmarks/gpu.py step qwen3-1.7b --rows 256 --preamble 5800    # tokens/s, shares of the machine's limits
    python benchmarks/gpu.py profile qwen3-0.6b --rows 64 --preamble 5800  # the five longest kernels of decode and update
    python benchmarks/gpu.py drafts qwen3-1.7b --rows 64   # decode with drafts and without, the default job's prompts

Shares are of what this device reaches in a matrix product and in a copy. On a CPU the sizes are tiny.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import drafts
import jax
import jax.numpy as jnp
from job import MODELS, Shape, compute_dtype, make_job, narrow
from step import RunningStep, probes, timed

from grpo_jax.models.cost import Lengths, Rates, decode_step, least_decode, update_flop

REPEATS = 3  # timed runs after the first
KERNELS = 5  # that a profile names
GROUP = 8  # completions of a prompt


def on_cpu() -> bool:
    """Whether this is a dry run."""
    return jax.default_backend() == "cpu"


def shape_of(model: str, rows: int, preamble: int, tokens: int = 160) -> Shape:
    """A published model and the lengths of a step; tiny ones on a CPU."""
    lengths = Lengths(P=rows // GROUP, G=GROUP, T0=preamble, T1=100, T2=tokens)
    if on_cpu():
        return Shape(narrow(700, L=1), Lengths(P=1, G=GROUP, T0=min(preamble, 100), T1=20, T2=16), remat=True)
    return Shape(MODELS[model], lengths, remat=True)


def parity(dtype: str) -> dict[str, Any]:
    """The largest and the mean difference of the sampler's and the trainer's log-probabilities, in nats.

    The bounds are those of tests/test_loop.py: 1e-4 in float32; in bfloat16 0.4, on average 0.06.
    """
    shape = dataclasses.replace(shape_of("qwen3-0.6b", rows=32, preamble=1500, tokens=64))
    running = RunningStep(make_job(shape, dtype=jnp.dtype(dtype)))
    for part in (running.export, running.prefill, running.decode):
        part()
    metrics = running.update()
    found = {of: float(metrics[f"sampling/sampling_logp_difference/{of}"]) for of in ("mean", "max")}
    bound = {"mean": 1e-4, "max": 1e-4} if dtype == "float32" else {"mean": 0.06, "max": 0.4}
    return {"difference": found, "passed": all(found[of] <= bound[of] for of in bound)}


def step(shape: Shape) -> dict[str, Any]:
    """Median seconds of decode and update, and the shares of the machine's limits that they reach."""
    running, seconds = RunningStep(make_job(shape)), dict[str, list[float]]()
    parts = ("export", "prefill", "decode", "update")
    first = {name: timed(getattr(running, name))[0] for name in parts}
    for _ in range(REPEATS):
        for name in parts:
            seconds.setdefault(name, []).append(timed(getattr(running, name))[0])
    median = {name: statistics.median(times) for name, times in seconds.items()}
    product, copy = probes()
    machine = Rates(max(product() for _ in range(REPEATS)), max(copy() for _ in range(REPEATS)))
    cfg, x = shape.cfg, shape.lengths
    itemsize = compute_dtype().itemsize
    read = sum(decode_step(cfg, x, t, itemsize)[1] for t in range(x.T2))
    flop = sum(update_flop(cfg, x, shape.remat).values())
    least, binds = least_decode(cfg, x, machine, itemsize)
    return {
        "first_call_s": first,
        "seconds": median,
        "decode_tokens_per_s": x.B * x.T2 / median["decode"],
        "decode_share_of_bandwidth": read / median["decode"] / machine.bytes,
        "decode_share_of_limit": least / median["decode"],
        "decode_bound_by": binds,
        "update_tokens_per_s": x.B * x.T2 / median["update"],
        "update_share_of_product": flop / median["update"] / machine.flops,
        "update_tflops": flop / median["update"] / 1e12,
        "machine_tflops": machine.flops / 1e12,
        "machine_gb_per_s": machine.bytes / 1e9,
        "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def profile(shape: Shape) -> dict[str, Any]:
    """The longest kernels of one decode and one update, [name, share of the device's busy time]."""
    running, found = RunningStep(make_job(shape)), {}
    for name in ("export", "prefill", "decode", "update"):
        timed(getattr(running, name))  # compiles
    for name in ("decode", "update"):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                timed(getattr(running, name))
            (path,) = Path(folder).rglob("*.xplane.pb")
            found[name] = longest(jax.profiler.ProfileData.from_file(str(path)))
    return found


def with_drafts(shape: Shape) -> dict[str, Any]:
    """Passes and seconds of the default job's gold conversations, with drafts and without."""
    conversation, x = drafts.tokenizer_of(None, "financial"), shape.lengths
    job = drafts.gold(conversation, "financial", x.P, x.G)
    cfg = dataclasses.replace(shape.cfg, V=max(shape.cfg.V, conversation.vocab_size))
    return drafts.measure(cfg, conversation, job, REPEATS)


def longest(data: Any) -> list[tuple[str, float]]:
    """The kernels with the most time on the device; on a CPU the operations of XLA's threads."""
    busy: Counter = Counter()
    for plane in data.planes:
        for line in plane.lines:
            kernels = plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
            if kernels or (on_cpu() and line.name.startswith("tf_XLA")):
                for event in line.events:
                    busy[event.name] += event.duration_ns
    return [(name, time / busy.total()) for name, time in busy.most_common(KERNELS)]


def main(argv: list[str] | None = None) -> None:
    """Measure, and append what was found with the machine it was found on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["parity", "step", "profile", "drafts"])
    parser.add_argument(
        "of", choices=["float32", "bfloat16", *MODELS], help="dtype of parity, else the model"
    )
    parser.add_argument("--rows", type=int, default=64, help="completions, in groups of 8 (default 64)")
    parser.add_argument("--preamble", type=int, default=300, help="tokens (default 300)")
    parser.add_argument("--out", type=Path, required=True, help="file to append to")
    args = parser.parse_args(argv)
    if (args.part == "parity") != (args.of not in MODELS):
        parser.error(f"parity takes float32 or bfloat16, the others a model, got {args.part} {args.of}")
    if args.part == "parity":
        found = parity(args.of)
    else:
        part = {"step": step, "profile": profile, "drafts": with_drafts}[args.part]
        found = part(shape_of(args.of, args.rows, args.preamble))
    asked = {"part": args.part, "of": args.of, "attention": "xla", "dtype": compute_dtype().name}
    if args.part == "parity":
        asked["dtype"] = args.of
    else:
        asked |= {"rows": args.rows, "preamble": args.preamble}
    asked |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "tiny": on_cpu()}
    with args.out.open("a") as file:
        file.write(json.dumps(asked | found) + "\n")


if __name__ == "__main__":
    main()
