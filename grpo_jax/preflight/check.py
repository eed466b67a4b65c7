"""What a job would learn from, before it costs anything: `python -m grpo_jax.train --check`.

Runs the gold calls, scores three hand-written conversations with the job's rewards, twice, calls each tool
twice, and gives hints where the data would earn no reward. No weights are read and
nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence

import numpy as np

from grpo_jax.data.batches import epoch_order
from grpo_jax.data.gold import gold_calls
from grpo_jax.preflight.diagnosis import (
    Gold,
    Hint,
    corrected,
    evaluation_hints,
    figure,
    form_hints,
    gold_hints,
    limit_hints,
    made_up_arguments,
    made_up_hints,
    normalised,
    preamble_hints,
    quoted,
    reward_hints,
    second_call_hints,
    second_score_hints,
)
from grpo_jax.run.cold_start import cold_start_rows, gold_trajectories, written_trajectory
from grpo_jax.run.console import Console
from grpo_jax.run.job import DataSet, Job
from grpo_jax.scoring.advantages import combine_rewards
from grpo_jax.scoring.rewards import TrainerState
from grpo_jax.types import Outcome, Prompt, ToolCall, ToolResult, Trajectory

SECONDS = 30.0  # spent on running gold calls; how many rows were left out is reported
ROWS_AT_ONCE = 16  # between looks at the clock: where tools hang, each call takes its whole time limit
SCORED_ROWS = 8
MADE_UP_CALLS = 2  # accepted ones of a tool, to see which words its results share
CORRECTIONS = 25  # of made-up arguments, each as the tool's last error asks


def check_job(job: Job, data: DataSet, evaluation: DataSet | None) -> int:
    """Print what a job would learn from, and hints where its data would earn nothing.

    Args:
        evaluation: the evaluation rows, which are only read; None without any.

    Returns:
        The exit status: 1 when no right answer would be rewarded, else 0.

    Raises:
        ValueError: a gold call is not {"name": text, "arguments": object}, or names an unknown tool; or the
            cold start would refuse the rows.
        RewardError: a reward function fails.
    """
    console, config = job.console, job.config
    examples = [p.example for p in data.prompts]
    hints: list[Hint] = []

    def found(new: Iterable[Hint]) -> None:
        for hint in new:
            console.line(f"{'Problem' if hint.fatal else 'Hint'}: {hint.text}")
            hints.append(hint)

    if config.cold_start:
        cold_start_rows(job, data)

    # What the model sees, and whether it fits.
    console.line("Tool schemas, as the model sees them:")
    for schema in job.toolbox.schemas:
        console.line(f"  {json.dumps(schema, ensure_ascii=False)}")
    gold = _run_gold_calls(job, data)
    _print_tokens(console, data, evaluation, gold)
    found(preamble_hints(examples, [len(p.ids) for p in data.prompts], len(data.tree.preamble)))
    found(limit_hints(gold, config.max_grpo_completion_length, config.max_tool_calling_iterations))

    # Whether the gold calls run and return the answers.
    if outcomes := [result.outcome for row in gold for _, result in row.trajectory.calls]:
        ran = outcomes.count(Outcome.OK)
        console.line(
            f"Gold calls of {len(gold)} rows: {ran} ran, {len(outcomes) - ran} returned an error; the last "
            f"result is the answer in {sum(row.answers for row in gold)} rows"
        )
    found(gold_hints(gold))
    if evaluation is not None:
        found(evaluation_hints([p.example for p in evaluation.prompts]))

    # Whether the tools return such answers at all, and the same again.
    calls = _calls_of_each_tool(job, gold)
    bare = [e for e in examples if not gold_calls(e, job.toolbox.functions)]
    found(form_hints(bare, {name: [r.text for _, r in made] for name, made in calls.items()}, none=not gold))

    def again(call: ToolCall) -> ToolResult:  # past the cache, in the worker that is free first
        return job.runner.submit([call], again=True)[0].result()

    firsts = {name: made[0] for name, made in calls.items() if made}
    found(second_call_hints({name: [r, again(call), again(call)] for name, (call, r) in firsts.items()}))

    # Whether right calls earn the most.
    if gold:
        rows, last, hints_of = _spread(gold), "gold calls", reward_hints
    else:
        rows = [_made_up(job, prompt) for prompt in _spread(data.prompts)]
        last, hints_of = "made-up call, answer as its result", made_up_hints
    first, second = _score_by_hand(job, rows, gold, last)
    found(hints_of(rows, first))
    found(second_score_hints(rows, first, second))
    problems = sum(hint.fatal for hint in hints)
    failed = f"failed: no right answer would be rewarded; problems: {problems}"
    console.line(f"Check {failed if problems else 'passed'}; hints: {len(hints) - problems}")
    return int(problems > 0)


# Gold calls


def _run_gold_calls(job: Job, data: DataSet) -> list[Gold]:
    """The rows that have gold calls, in file order; as many of them, at random, as run in `SECONDS`."""
    functions, examples = job.toolbox.functions, [p.example for p in data.prompts]
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


def _calls_of_each_tool(job: Job, gold: Sequence[Gold]) -> dict[str, list[tuple[ToolCall, ToolResult]]]:
    """Calls that ran, by tool: gold calls, else calls with made-up arguments; none where a tool refuses all."""
    calls: dict[str, list[tuple[ToolCall, ToolResult]]] = {name: [] for name in job.toolbox.functions}
    for row in gold:
        for call, result in row.trajectory.calls:
            if result.outcome is Outcome.OK:
                calls[call.name].append((call, result))
    for schema in job.toolbox.schemas:
        name = schema["function"]["name"]
        for arguments in made_up_arguments(schema["function"].get("parameters", {})):
            if len(calls[name]) >= MADE_UP_CALLS:
                break
            for _ in range(CORRECTIONS):
                call = ToolCall(name, arguments)
                (result,) = job.runner.run([call])
                if result.outcome is Outcome.OK:
                    calls[name].append((call, result))
                arguments = corrected(arguments, result.text) if result.outcome is Outcome.ERROR else None
                if arguments is None:
                    break
    return calls


def _print_tokens(console: Console, data: DataSet, evaluation: DataSet | None, gold: Sequence[Gold]) -> None:
    counts = {
        "preamble that prompts share": [len(data.tree.preamble)],
        "prompts": [len(p.ids) for p in data.prompts],
        "evaluation prompts": [len(p.ids) for p in evaluation.prompts] if evaluation else [],
        "completions of gold calls": [row.tokens for row in gold if not row.failed],
    }
    rows = [(of, len(n), min(n), f"{sum(n) / len(n):.1f}", max(n)) for of, n in counts.items() if n]
    title = f"Tokens (a completion may have max_grpo_completion_length = {data.tree.budget})"
    console.table(title, ("part", "count", "min", "mean", "max"), rows)


# Conversations written by hand


def _score_by_hand(
    job: Job, rows: Sequence[Gold], gold: Sequence[Gold], last: str
) -> tuple[np.ndarray, np.ndarray]:
    """Score three conversations of each row as two batches of a run, and print what they earn in the first.

    Args:
        gold: all rows, to take wrong calls from.
        last: title of the rows' own conversations.

    Returns:
        Twice [n, 3] weighted sums of the rewards: without a call, with a wrong call, of the rows' own
        conversations; before and after an update.
    """
    kinds = ("no call", "wrong call", last)
    conversations = [c for row in rows for c in _conversations(job, row, gold)]
    first, second = (
        job.score(conversations, TrainerState(step, 2, 0.0, job.config.num_train_epochs)).means
        for step in (0, 1)
    )
    shape = len(rows), len(kinds)
    combined, again = (combine_rewards(v, job.reward_weights).reshape(shape) for v in (first, second))

    def mean(values: np.ndarray) -> str:
        applying = values[~np.isnan(values)]
        return figure(applying.mean() if applying.size else np.nan)

    by_name = {name: v.reshape(shape) for name, v in zip(job.reward_names, first.T, strict=True)}
    if len(by_name) > 1:
        by_name["weighted sum"] = combined
    title = f"Mean rewards of conversations written by hand, for {len(rows)} rows"
    means = [(name, *map(mean, array.T)) for name, array in by_name.items()]
    job.console.table(title, ("reward", *kinds), means)
    example = rows[0].example
    job.console.line(f"{example.source} asks {quoted(example.messages[-1]['content'])}")
    shown = zip(conversations[: len(kinds)], first.tolist(), strict=False)  # those of the first row
    scored = [dataclasses.replace(c, rewards=tuple(values)) for c, values in shown]
    job.console.samples(scored, [example.answer] * len(scored))
    return combined, again


def _spread(rows: Sequence) -> list:
    """At most `SCORED_ROWS` rows, spread evenly."""
    n = min(SCORED_ROWS, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def _made_up(job: Job, prompt: Prompt) -> Gold:
    """A row without gold calls, as if the first tool had returned the answer."""
    call = ToolCall(next(iter(job.toolbox.functions)), {})
    answer = prompt.example.answer
    calls = [(call, ToolResult(answer, Outcome.OK, 0.0))]
    return Gold(prompt.example, written_trajectory(job.conversation, prompt, calls, job.last_turn(answer)))


def _conversations(job: Job, row: Gold, gold: Sequence[Gold]) -> list[Trajectory]:
    """The row's conversation without a call, with a wrong call, and its own."""
    prompt, name = row.trajectory.prompt, row.trajectory.calls[-1][0].name
    right = {normalised(row.result), normalised(row.example.answer)}
    # another row's call of the same tool, with another result; else one that the tool refuses
    for other in gold:
        call, result = other.trajectory.calls[-1]
        if not other.failed and call.name == name and normalised(result.text) not in right:
            break
    else:
        call = ToolCall(name, {"no_such_argument": 0})
        (result,) = job.runner.run([call])
    return [
        written_trajectory(job.conversation, prompt, [], "I do not know."),
        written_trajectory(
            job.conversation, prompt, [(call, result)], job.last_turn(result.text, refused=True)
        ),
        row.trajectory,
    ]
