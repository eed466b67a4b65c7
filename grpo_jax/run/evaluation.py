"""Evaluation: every prompt of a data set greedily, over the same tool loop as in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from grpo_jax import hosts
from grpo_jax.data.gold import gold_calls
from grpo_jax.models.qwen import Params
from grpo_jax.rollout.loop import make_policy, roll_out
from grpo_jax.run.console import Console
from grpo_jax.run.job import DataSet, Job
from grpo_jax.run.log import EVALUATED, interval_text
from grpo_jax.scoring.evaluation import summarize
from grpo_jax.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Args:
        summary: its figures, see `scoring.evaluation.summarize`.
        trajectories: one per example.
    """

    summary: dict[str, Any]
    trajectories: list[Trajectory]


def evaluate(job: Job, params: Params, data: DataSet, title: str) -> Evaluation:
    """Run every prompt greedily and score the calls.

    Args:
        params: rollout weights, from `sampler.export`.
    """
    gold = [gold_calls(p.example, job.toolbox.functions) for p in data.prompts]
    size = job.config.eval_batch_size
    if not hosts.alone():  # every host has rows, some of which may be padding
        size = -(-size // job.row_devices) * job.row_devices
    loop = job.tool_loop(job.greedy, data.tree)
    policy = make_policy(loop, params)
    prompts = [dataclasses.replace(prompt, draw=i) for i, prompt in enumerate(data.prompts)]
    trajectories: list[Trajectory] = []
    with job.console.progress(title, len(prompts)) as bar:
        for start in range(0, len(prompts), size):
            chosen = prompts[start : start + size]
            filled = chosen + [None] * (size - len(chosen))  # always the same shape: one compile
            trajectories += roll_out(loop, policy, filled).trajectories
            bar.advance(len(chosen))
    return Evaluation(summarize(trajectories, gold), trajectories)


def compare(console: Console, summaries: dict[str, dict[str, Any]]) -> None:
    """A table of several evaluations, each figure with its 95 % interval."""
    rows: Sequence = [
        (metric, *(interval_text(summary, metric) for summary in summaries.values())) for metric in EVALUATED
    ]
    first = next(iter(summaries.values()))
    errors = first["error_answers"]["n"]
    left_out = f" ({errors} rows whose answer is an error are not in the figures)" if errors else ""
    console.table(f"Evaluation on {first['n']} rows{left_out}", ("metric", *summaries), rows)
