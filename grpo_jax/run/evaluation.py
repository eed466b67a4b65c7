"""Evaluation: every prompt of a data set greedily, over the same tool loop as in training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax import hosts
from grpo_jax.data.gold import gold_calls
from grpo_jax.files import plain, write_text_atomic
from grpo_jax.models.qwen import Params
from grpo_jax.rollout.loop import Policy, ToolLoop, make_policy, roll_out
from grpo_jax.run.console import Console
from grpo_jax.run.job import DataSet, Job
from grpo_jax.run.log import interval_text, last_user_message
from grpo_jax.run.stopping import Stopped
from grpo_jax.scoring.evaluation import row_figures, summarize, summarize_samples
from grpo_jax.types import Trajectory


class Evaluation(NamedTuple):
    """The figures of an evaluation, see `scoring.evaluation.summarize`, and a trajectory per example."""

    summary: dict[str, Any]
    trajectories: list[Trajectory]


def evaluate(
    job: Job,
    params: Params,
    data: DataSet,
    title: str,
    limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    name: str | None = None,
) -> Evaluation:
    """Run every prompt greedily and score the calls; with eval_samples, sample each so often too.

    Args:
        params: rollout weights, from `sampler.export`.
        limit: tokens that a completion may have, where that is less than the budget.
        name: name of the file in `evaluation/` that gets a line for each row; None for none. Samples have their own,
            NAME_samples.jsonl, a row's next to each other.

    Raises:
        Stopped: some host was asked to stop.
    """
    gold = [gold_calls(p.example, job.toolbox.functions) for p in data.prompts]
    loop = dataclasses.replace(job.tool_loop(job.greedy, data.tree), limit=limit)
    policy = make_policy(loop, params)
    trajectories = completions(job, loop, policy, data, title, 1, stop)
    summary, n = summarize(trajectories, gold), job.config.eval_samples
    written = {"": (trajectories, gold)}
    if n:
        loop = dataclasses.replace(loop, sampler=job.sampled)
        sampled = completions(job, loop, policy, data, f"{title}, {n} samples a row", n, stop)
        found = summarize_samples(sampled, n)
        summary["intervals"] |= found.pop("intervals")
        summary |= found
        written["_samples"] = sampled, [calls for calls in gold for _ in range(n)]
    for suffix, rows in written.items() if name is not None else ():
        path = Path(job.config.output_dir) / "evaluation" / f"{name}{suffix}.jsonl"
        made = [
            {
                "prompt": last_user_message(one.prompt.example.messages),
                "messages": one.messages,
                "answer": one.prompt.example.answer,
                "status": one.status.value,
                **row_figures(one, calls),
            }
            for one, calls in zip(*rows, strict=True)
        ]
        lines = [json.dumps(plain(row), ensure_ascii=False) + "\n" for row in made]
        hosts.of_first(lambda path=path, lines=lines: write_text_atomic(path, "".join(lines)))
    return Evaluation(summary, trajectories)


def completions(
    job: Job,
    loop: ToolLoop,
    policy: Policy,
    data: DataSet,
    title: str,
    generations: int,
    stop: Callable[[], bool],
) -> list[Trajectory]:
    """Complete every prompt so often, in batches of one shape; without rewards.

    Results of slow tools are waited for like all others (`loop.delays` is empty): a delay is a measured time, and
    the seed fixes an evaluation to the last bit.

    Raises:
        Stopped: some host was asked to stop.
    """
    prompts = [dataclasses.replace(prompt, draw=i) for i, prompt in enumerate(data.prompts)]
    trajectories = list[Trajectory]()
    size = max(job.config.eval_batch_size // generations, 1)
    if not hosts.alone():  # every host has rows, some of which may be padding
        size = -(-size // job.row_devices) * job.row_devices
    with job.console.progress(title, len(prompts) * generations) as bar:
        for start in range(0, len(prompts), size):
            chosen = prompts[start : start + size]
            rollout = roll_out(
                loop,
                policy,
                chosen + [None] * (size - len(chosen)),  # always the same shape: one compile
                generations=generations,
                seed=job.config.seed,
                on_progress=bar.advance,
                stop=stop,
            )
            if rollout.interrupted:
                raise Stopped(f"in {title}")
            trajectories += rollout.trajectories
    return trajectories


def compare(console: Console, summaries: dict[str, dict[str, Any]]) -> None:
    """A table of several evaluations, each figure with its 95 % interval."""
    first = next(iter(summaries.values()))
    rows: Sequence = [
        (metric, *(interval_text(summary, metric) for summary in summaries.values()))
        for metric in first["intervals"]
    ]
    errors = first["error_answers"]["n"]
    left_out = f" ({errors} rows whose answer is an error are not in the figures)" if errors else ""
    console.table(f"Evaluation on {first['n']} rows{left_out}", ("metric", *summaries), rows)
