"""What a job would learn from, before it costs anything: `python -m grpo_jax.train --check`.

Runs the gold calls, scores three conversations written by hand with the job's rewards,
and gives hints where the data would earn nothing. No weights are read and nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence

import numpy as np

from grpo_jax.data.rows import epoch_order, gold_calls
from grpo_jax.preflight.diagnosis import (
    Gold,
    Hint,
    figure,
    gold_hints,
    limit_hints,
    made_up_hints,
    normalised,
    preamble_hints,
    quoted,
    reward_hints,
)
from grpo_jax.run.cold_start import gold_trajectories, written_trajectory
from grpo_jax.run.console import Console
from grpo_jax.run.job import DataSet, Job
from grpo_jax.scoring.advantages import combine_rewards
from grpo_jax.types import Example, Outcome, Prompt, ToolCall, ToolResult, Trajectory

SECONDS = 30.0  # of running gold calls; what a large file or slow tools leave over is said
ROWS_AT_ONCE = 16  # between looks at the clock: where tools hang, each call takes its whole time limit
SCORED_ROWS = 8


def check_job(job: Job, data: DataSet, evaluation: DataSet | None) -> int:
    """Print what a job would learn from, and hints where its data would earn nothing.

    Args:
        job: the parts.
        data: the training rows.
        evaluation: the evaluation rows, if there are any; they are only read.

    Returns:
        The exit status: 1 when no right answer would be rewarded, else 0.

    Raises:
        ValueError: a gold call is not {"name": text, "arguments": object}, or names an unknown tool.
        RewardError: a reward function fails.
    """
    console, config = job.console, job.config
    examples = [p.example for p in data.prompts]
    hints: list[Hint] = []

    def found(new: Iterable[Hint]) -> None:
        for hint in new:
            console.line(f"{'Problem' if hint.fatal else 'Hint'}: {hint.text}")
            hints.append(hint)

    console.line("Tool schemas, as the model sees them:")
    for schema in job.toolbox.schemas:
        console.line(f"  {json.dumps(schema, ensure_ascii=False)}")
    gold = _run_gold_calls(job, data, evaluation)
    _print_tokens(console, data, evaluation, gold)
    found(preamble_hints(examples, [len(p.ids) for p in data.prompts], len(data.tree.preamble)))
    found(limit_hints(gold, config.max_grpo_completion_length, config.max_tool_calling_iterations))
    _print_gold_calls(console, gold)
    found(gold_hints(gold))
    if gold:
        rows, last, hints_of = _spread(gold), "gold calls", reward_hints
    else:
        rows = [_made_up(job, prompt) for prompt in _spread(data.prompts)]
        last, hints_of = "made-up call, answer as its result", made_up_hints
    found(hints_of(rows, _score_by_hand(job, rows, gold, last)))
    return _verdict(console, hints)


def _verdict(console: Console, hints: Sequence[Hint]) -> int:
    problems = sum(hint.fatal for hint in hints)
    failed = f"failed: no right answer would be rewarded; problems: {problems}"
    console.line(f"Check {failed if problems else 'passed'}; hints: {len(hints) - problems}")
    return int(problems > 0)


# Gold calls


def _run_gold_calls(job: Job, data: DataSet, evaluation: DataSet | None) -> list[Gold]:
    """The rows that have gold calls, in file order; as many of them, at random, as run in `SECONDS`."""
    functions, examples = job.toolbox.functions, [p.example for p in data.prompts]
    if evaluation is not None:
        for prompt in evaluation.prompts:
            gold_calls(prompt.example, functions)  # raises where the evaluation would
    rows = [i for i, example in enumerate(examples) if gold_calls(example, functions)]
    if missing := sorted(set(range(len(examples))) - set(rows)):
        job.console.line(
            f"{len(missing)} of {len(examples)} rows have no gold call in column tool_call or ground_truth, first "
            f"{examples[missing[0]].source}; for them it cannot be checked whether a call returns the answer, "
            "how many tokens that takes, and what it earns"
        )
    order = [rows[place] for place in epoch_order(0, 0, len(rows))]
    done: dict[int, Gold] = {}
    end = time.monotonic() + SECONDS
    with job.console.progress("Gold calls", len(rows)) as bar:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chosen = order[start : start + ROWS_AT_ONCE]
            ran = gold_trajectories(job, [data.prompts[i] for i in chosen])
            done |= {i: Gold(examples[i], trajectory) for i, trajectory in zip(chosen, ran, strict=True)}
            bar.advance(len(chosen))
            if time.monotonic() >= end:
                break
    if len(done) < len(rows):
        job.console.line(f"Checked is a random sample of {len(done)} of {len(rows)} rows with gold calls")
    return [done[i] for i in sorted(done)]


def _print_gold_calls(console: Console, gold: Sequence[Gold]) -> None:
    outcomes = [result.outcome for row in gold for _, result in row.trajectory.calls]
    if outcomes:
        ran = outcomes.count(Outcome.OK)
        console.line(
            f"Gold calls of {len(gold)} rows: {ran} ran, {len(outcomes) - ran} returned an error; the last "
            f"result is the answer in {sum(row.answers for row in gold)} rows"
        )


def _print_tokens(console: Console, data: DataSet, evaluation: DataSet | None, gold: Sequence[Gold]) -> None:
    counts = {
        "preamble that prompts share": [len(data.tree.preamble)],
        "prompts": [len(p.ids) for p in data.prompts],
        "evaluation prompts": [len(p.ids) for p in evaluation.prompts] if evaluation else [],
        "completions of gold calls": [row.tokens for row in gold if not row.failed],
    }
    rows = [(of, len(n), min(n), f"{sum(n) / len(n):.1f}", max(n)) for of, n in counts.items() if n]
    title = f"Tokens (a completion may have max_grpo_completion_length = {data.tree.budget})"
    console.table(title, ("of", "number", "min", "mean", "max"), rows)


# Conversations written by hand


def _score_by_hand(job: Job, rows: Sequence[Gold], gold: Sequence[Gold], last: str) -> np.ndarray:
    """Score three conversations of each row and print what they earn.

    Args:
        job: the parts.
        rows: n rows to score.
        gold: all rows, to take wrong calls from.
        last: what the rows' own conversations are.

    Returns:
        [n, 3] weighted sums of the rewards: without a call, with a wrong call, of the rows' own
        conversations.
    """
    kinds = ("no call", "wrong call", last)
    conversations = [c for row in rows for c in _conversations(job, row, gold)]
    values = job.score(conversations, 0, 1).values
    weights = job.config.reward_weights or [1.0] * len(job.rewards)
    combined = combine_rewards(values, weights).reshape(len(rows), len(kinds))
    by_name = {r.name: v.reshape(combined.shape) for r, v in zip(job.rewards, values.T, strict=True)}
    if len(by_name) > 1:
        by_name["weighted sum"] = combined
    title = f"Mean rewards of conversations written by hand, for {len(rows)} rows"
    means = [(name, *map(_mean, array.T)) for name, array in by_name.items()]
    job.console.table(title, ("reward", *kinds), means)
    _print_samples(job.console, rows[0].example, conversations[: len(kinds)], values[: len(kinds)])
    return combined


def _print_samples(
    console: Console, example: Example, conversations: Sequence[Trajectory], values: np.ndarray
) -> None:
    scored = [
        dataclasses.replace(c, rewards=tuple(value.tolist()))
        for c, value in zip(conversations, values, strict=True)
    ]
    console.line(f"{example.source} asks {quoted(example.messages[-1]['content'])}")
    console.samples(scored, [example.answer] * len(scored))


def _mean(values: np.ndarray) -> str:
    applying = values[~np.isnan(values)]
    return figure(applying.mean() if applying.size else np.nan)


def _spread(rows: Sequence) -> list:
    """At most `SCORED_ROWS` rows, spread evenly."""
    n = min(SCORED_ROWS, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def _made_up(job: Job, prompt: Prompt) -> Gold:
    """A row without gold calls, as if the first tool had returned the answer."""
    call = ToolCall(next(iter(job.toolbox.functions)), {})
    answer = prompt.example.answer
    calls = [(call, ToolResult(answer, Outcome.OK, 0.0))]
    return Gold(prompt.example, written_trajectory(job.conversation, prompt, calls, answer))


def _conversations(job: Job, row: Gold, gold: Sequence[Gold]) -> list[Trajectory]:
    """The row's conversation without a call, with a wrong call, and its own."""
    prompt = row.trajectory.prompt
    call, result = _wrong_call(job, row, gold)
    return [
        written_trajectory(job.conversation, prompt, [], "I do not know."),
        written_trajectory(job.conversation, prompt, [(call, result)], result.text),
        row.trajectory,
    ]


def _wrong_call(job: Job, row: Gold, gold: Sequence[Gold]) -> tuple[ToolCall, ToolResult]:
    """Another row's call of the same tool, with another result; else one that the tool refuses."""
    name = row.trajectory.calls[-1][0].name
    right = {normalised(row.result), normalised(row.example.answer)}
    for other in gold:
        call, result = other.trajectory.calls[-1]
        if not other.failed and call.name == name and normalised(result.text) not in right:
            return call, result
    call = ToolCall(name, {"no_such_argument": 0})
    return call, job.runner.run([call])[0]
