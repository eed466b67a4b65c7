"""Runs TRL's GRPOTrainer on a job's weights and prompts in a separate process, and prints how they compare.

TRL gets the same weights and token ids, samples exactly as many tokens a row (end-of-turn suppressed),
computes in fp32 on as many threads, and is run with gradient checkpointing on and off: the faster counts.
What it allocates once falls on its first step, which is not counted where there is a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from job import Shape, random_prompts, random_weights

from grpo_jax.models import hf
from grpo_jax.models.qwen import SUPPORTED, ModelConfig

CHILD = Path(__file__).with_name("trl_step.py")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class TrlOptions:
    """How TRL is run.

    Args:
        steps: its steps; the first is not counted unless it is alone.
        micro_batches: parts that its batch is split into; None for `micro_batches_that_fit`.
        checkpointing: gradient checkpointing on or off, one run each.
    """

    steps: int
    micro_batches: int | None
    checkpointing: tuple[bool, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `options_of` reads."""
    parser.add_argument("--trl-steps", type=int, help="TRL's steps; the first is not counted unless alone")
    parser.add_argument("--trl-micro-batches", type=int, help="parts of TRL's batch (default: what fits)")
    parser.add_argument(
        "--trl-checkpointing", choices=["both", "on", "off"], default="both", help="default both"
    )


def options_of(args: argparse.Namespace, shape: Shape) -> TrlOptions:
    """Four steps of a small job, one of a large one, unless an option says otherwise."""
    x = shape.lengths
    small = x.B * (x.T0 + x.T1 + x.T2) < 30_000  # tokens: TRL takes seconds
    return TrlOptions(
        args.trl_steps or (4 if small else 1),
        args.trl_micro_batches,
        {"both": (True, False), "on": (True,), "off": (False,)}[args.trl_checkpointing],
    )


def compare(shape: Shape, options: TrlOptions, seconds: float, peak: int, entropy: float) -> None:
    """Print TRL's times, both peaks, and `ratio to TRL` as the last line.

    Args:
        seconds: of our step.
        peak: of our process, in bytes.
        entropy: of our policy in nats; TRL's should be near it, since the weights are the same.

    Raises:
        RuntimeError: TRL ran neither with nor without gradient checkpointing.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), shape, options)
        runs = [
            run_trl(Path(folder), on, options.micro_batches or micro_batches_that_fit(shape, on))
            for on in options.checkpointing
        ]
    done = [run for run in runs if run is not None]
    if not done:
        raise RuntimeError("TRL did not finish; try more --trl-micro-batches")
    best = min(done, key=lambda run: run["seconds"]["step"])
    print(f"entropy of the policy: {entropy:.4f} nats here, {best['entropy']:.4f} in TRL")
    print(f"peak memory: {peak / GIB:.2f} GiB here, {best['peak'] / GIB:.2f} GiB TRL")
    print(f"ratio to TRL: {best['seconds']['step'] / seconds:.1f}x")


def write_job(folder: Path, shape: Shape, options: TrlOptions) -> None:
    """What `trl_step.py` reads: the weights as an HF folder, the prompts and the settings."""
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(hf_config(shape.cfg)))
    hf.save_model(folder / "model", random_weights(shape.cfg), shape.cfg, source)
    job = {
        "prompts": random_prompts(shape.lengths),
        "generations": shape.lengths.G,
        "completion": shape.lengths.T2,
        "vocabulary": shape.cfg.V,
        "steps": options.steps,
        "threads": len(os.sched_getaffinity(0)),
    }
    (folder / "job.json").write_text(json.dumps(job))


def run_trl(folder: Path, checkpointing: bool, micro_batches: int) -> dict[str, Any] | None:
    """One run of `trl_step.py`, printed; None where it failed, for example out of memory."""
    job = json.loads((folder / "job.json").read_text())
    job |= {"checkpointing": checkpointing, "micro_batches": micro_batches}
    (folder / "job.json").write_text(json.dumps(job))
    threads = {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, CHILD, folder],
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    name = f"TRL, gradient checkpointing {'on' if checkpointing else 'off'}, micro-batches: {micro_batches}"
    if child.returncode:
        print(f"{name}: failed with status {child.returncode}\n{child.stdout[-2000:]}")
        return None
    result = json.loads((folder / "result.json").read_text())
    counted = result["steps"][1:] or result["steps"]
    result["seconds"] = {part: statistics.median(s[part] for s in counted) for part in counted[0]}
    parts = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in result["seconds"].items())
    first = (
        "" if len(result["steps"]) == 1 else f", first step {result['steps'][0]['step']:.1f} s not counted"
    )
    print(
        f"{name}: {parts} ({len(counted)} timed{first}); peak {result['peak'] / GIB:.2f} GiB; "
        f"{result['versions']}, {job['threads']} threads"
    )
    return result


def micro_batches_that_fit(shape: Shape, checkpointing: bool) -> int:
    """The fewest parts of whole prompts whose estimated peak stays under three quarters of the memory.

    The estimate follows what TRL 1.16 was measured to take at 8 × 617 and 8 × 2,117 tokens, 4 layers of
    width 128 and 151,936 vocabulary rows: 4.90 and 5.17 GiB with checkpointing, 5.10 and 5.65 without.
    """
    cfg, x = shape.cfg, shape.lengths
    layer = 4 * (4 * cfg.D + 4 * cfg.N * cfg.H + 3 * cfg.F)  # bytes of a token's values in one layer
    per_token = 2 * layer + 4 * cfg.L * cfg.D + (0 if checkpointing else cfg.L * layer)
    tokens, memory = x.B * (x.T0 + x.T1 + x.T2 + 1), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for parts in range(1, x.P + 1):
        if x.P % parts == 0 and 34_000 * cfg.V + tokens * per_token / parts < 0.75 * memory:
            return parts
    return x.P


def hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model's sizes, as `ModelConfig.from_hf` reads it."""
    return {
        "architectures": [SUPPORTED[cfg.model_type]],
        "model_type": cfg.model_type,
        "vocab_size": cfg.V,
        "hidden_size": cfg.D,
        "intermediate_size": cfg.F,
        "num_hidden_layers": cfg.L,
        "num_attention_heads": cfg.N,
        "num_key_value_heads": cfg.K,
        "head_dim": cfg.H,
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "max_position_embeddings": 32_768,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
