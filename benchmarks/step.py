"""Times the parts of one GRPO step, and says how close they come to the machine's limit and to TRL.

    python benchmarks/step.py --shape tiny
    python benchmarks/step.py --shape recipe --prompts 1 --generations 8 --compare trl
    python benchmarks/step.py --model qwen3-1.7b --rows 64

`tiny` is the quickstart's model and prompts; `recipe` is the original TRL recipe's job: about 5,800 shared
preamble tokens (8 financial tools), 160 completion tokens, a 4-layer model of width 128 with the published
vocabulary of 151,936 rows. `--model` puts a model of a published size into its place. Weights and tokens
are random; every row samples the same number of tokens, end-of-turn suppressed. The reward is one real tool
call per row and the built-in `accuracy`. Computes in fp32 on a CPU and in bf16 (fp32 master weights) on an
accelerator.

The machine's limit is a matrix product and a memory copy, measured between the timed parts;
docs/performance.md has the formulas.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import compare_trl
import jax
import jax.numpy as jnp
from job import Job, Shape, add_shape_options, compute_dtype, decode, make_batch, make_job, prefill, shape_of

from grpo_jax.models.cost import Rates, least_decode, least_prefill, least_update, prefill_flop, update_flop
from grpo_jax.scoring.rewards import call_rewards, load_rewards
from grpo_jax.tools import ToolRunner, load_tools
from grpo_jax.types import ToolCall

PROBE_RUNS = 3  # of each probe after every timed round


@dataclasses.dataclass(frozen=True)
class Timings:
    """What was measured.

    Args:
        first: seconds of each part's first call, compilation included.
        seconds: median seconds of each part's other calls.
        machine: the best that the probes reached.
        peak: bytes in use at most, before the probes.
        temporary: bytes of the update in addition to its arguments and results, by XLA's memory_analysis.
        metrics: of the last update.
    """

    first: dict[str, float]
    seconds: dict[str, float]
    machine: Rates
    peak: int
    temporary: int
    metrics: dict[str, float]

    @property
    def step(self) -> float:
        """Seconds of all parts together."""
        return sum(self.seconds.values())


class RunningStep:
    """The parts of a job's step as functions without arguments, to be called in their order again and again."""

    def __init__(self, job: Job):
        self.job, self.state = job, job.new_state()
        self.compiled = self.batch = None

    def export(self):
        """Rollout weights of the current state."""
        self.params = self.job.sampler.export(self.state.params)
        return self.params

    def prefill(self):
        """Keys and values of preamble and prompts."""
        self.trunk = prefill(self.job, self.params)
        return self.trunk

    def decode(self):
        """Every row's completion."""
        self.turns = decode(self.job, self.params, self.trunk)
        return self.turns

    def update(self):
        """One update on the first completions."""
        if self.compiled is None:
            self.batch = make_batch(self.job, self.turns)
            self.compiled = self.job.update.lower(self.state, self.batch).compile()
        rest = None, jnp.float32(0.0)  # no frozen weights, and the learning rate
        self.state, metrics = self.compiled(self.state, self.batch, *rest)
        return metrics


@contextlib.contextmanager
def reward_function(rows: int) -> Iterator[Callable[[], Any]]:
    """One distinct tool call per row in worker processes, and the built-in reward."""
    rewards = load_rewards(None, None)
    with ToolRunner(load_tools(module="tools_funcs.math_tools"), cache=False) as runner:

        def reward():
            calls = [ToolCall("add", {"a": i, "b": 27}) for i in range(rows)]
            results = runner.run(calls, range(rows))
            return call_rewards(
                rewards,
                completions=[[{"role": "tool", "name": "add", "content": r.text}] for r in results],
                answer=["Sum: 42"] * rows,
                prompts=[[]] * rows,
                completion_ids=[[]] * rows,
                trainer_state={},
                columns={},
            ).values

        yield reward


def measure(job: Job, repeats: int) -> Timings:
    """Run the step 1 + `repeats` times, the probes after each but the first."""
    running = RunningStep(job)
    with reward_function(job.shape.lengths.B) as reward:
        parts = {
            "export": running.export,
            "prefill": running.prefill,
            "decode": running.decode,
            "reward": reward,
            "update": running.update,
        }
        first = {name: timed(part)[0] for name, part in parts.items()}
        peak = peak_memory()
        product, copy = probes()
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        reached: list[Rates] = []
        for _ in range(repeats):
            for name, part in parts.items():
                seconds[name].append(timed(part)[0])
            reached += [Rates(product(), copy()) for _ in range(PROBE_RUNS)]
    return Timings(
        first,
        {name: statistics.median(times) for name, times in seconds.items()},
        Rates(*map(max, zip(*reached, strict=True))),
        peak,
        running.compiled.memory_analysis().temp_size_in_bytes,
        {name: float(value) for name, value in running.update().items()},
    )


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of one call, waited for."""
    began = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - began, result


def peak_memory() -> int:
    """Bytes of the device where it counts them, else of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def probes() -> tuple[Callable[[], float], Callable[[], float]]:
    """Two functions, compiled: FLOP/s of a matrix product, and bytes/s, read and written, of a copy.

    fp32 2048³ and 256 MB on a CPU, bf16 8192³ and 2 GB on an accelerator. The copy is written onto what was
    read: a CPU would spend most of its time on fresh pages otherwise.
    """
    n, size = (2048, 256 << 20) if jax.default_backend() == "cpu" else (8192, 2 << 30)
    matrix = jnp.ones((n, n), compute_dtype())
    multiply = jax.jit(jnp.matmul)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [jnp.zeros(size // 4, jnp.float32)]

    def product() -> float:
        return 2 * n**3 / timed(lambda: multiply(matrix, matrix))[0]

    def copy() -> float:
        seconds, result = timed(lambda: add(held.pop()))
        held.append(result)
        return 2 * size / seconds

    product(), copy()
    return product, copy


def print_times(timings: Timings, sampled: int) -> None:
    """Seconds and sampled tokens per second, by part."""
    for name, seconds in timings.seconds.items():
        rate = f"{sampled / seconds:10.0f} sampled tokens/s" if name in ("decode", "update") else ""
        print(f"{name:8s} {seconds:9.4f} s  (first call {timings.first[name]:6.1f} s) {rate}")
    print(f"{'step':8s} {timings.step:9.4f} s  {'':24s} {sampled / timings.step:10.0f} sampled tokens/s")


def print_limits(timings: Timings, shape: Shape) -> None:
    """The least time that prefill, decode and update could take on this machine, and the share reached."""
    cfg, x, machine = shape.cfg, shape.lengths, timings.machine
    decode_s, binds = least_decode(cfg, x, machine, compute_dtype().itemsize)
    print(
        f"machine: {machine.flops / 1e9:.0f} GFLOP/s in a {compute_dtype().name} matrix product, "
        f"{machine.bytes / 1e9:.1f} GB/s in a copy"
    )
    levels = prefill_flop(cfg, x), update_flop(cfg, x, shape.remat)
    prefill_work, update_work = (_gflop(level) for level in levels)
    for name, least, work in (
        ("prefill", least_prefill(cfg, x, machine), prefill_work),
        ("decode", decode_s, f"bound by {binds}"),
        ("update", least_update(cfg, x, shape.remat, machine), update_work),
    ):
        seconds = timings.seconds[name]
        print(f"{name:8s} at least {least:.4f} s: {100 * least / seconds:5.1f} % reached; {work}")


def _gflop(levels: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in levels.items())
    return f"{sum(levels.values()) / 1e9:.4g} GFLOP ({parts})"


def print_memory(timings: Timings) -> None:
    """Peak and temporary memory, and the largest difference of sampler and trainer."""
    gap = timings.metrics["sampling/sampling_logp_difference/max"]
    where = "process" if jax.default_backend() == "cpu" else "device"
    print(
        f"memory: peak of the {where} {timings.peak / 2**30:.2f} GiB; "
        f"temporary of the update {timings.temporary / 2**30:.2f} GiB (XLA's memory_analysis)"
    )
    print(f"largest |sampler - trainer| log-probability: {gap:.1e}")


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Shape]:
    """The options, and the shape that they make."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_options(parser)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs after the first (default 3)")
    parser.add_argument(
        "--compare",
        choices=["trl"],
        help='time TRL on the same weights and prompts too; needs pip install -e ".[bench]"',
    )
    compare_trl.add_options(parser)
    args = parser.parse_args(argv)
    if args.compare and jax.default_backend() != "cpu":
        parser.error("--compare trl compares on the CPU: set JAX_PLATFORMS=cpu")
    return args, shape_of(parser, args)


def main(argv: list[str] | None = None) -> None:
    """Print times, limits and memory, and the ratio to TRL when asked."""
    args, shape = parse(argv)
    sys.stdout.reconfigure(line_buffering=True)  # TRL takes minutes; a log should show what is there
    x = shape.lengths
    print(
        f"{args.model or args.shape}: {x.P} × {x.G} rows, preamble {x.T0}, prompt {x.T1 + 1}, completion {x.T2} "
        f"tokens, {shape.cfg.L} layers of width {shape.cfg.D}, vocabulary {shape.cfg.V}; "
        f"{compute_dtype().name}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    timings = measure(make_job(shape), args.repeats)
    print_times(timings, x.B * x.T2)
    print_limits(timings, shape)
    print_memory(timings)
    if args.compare:
        options = compare_trl.options_of(args, shape)
        compare_trl.compare(shape, options, timings.step, timings.peak, timings.metrics["entropy"])


if __name__ == "__main__":
    sys.exit(main())
