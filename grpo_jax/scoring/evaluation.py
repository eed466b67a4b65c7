"""The figures of an evaluation over the whole tool loop, greedy and, with `--eval_samples`, sampled.

- response_validity: share of examples with at least one parsable call to a known tool whose result does
  not begin with `Error:`;
- exact_answer_match: share of examples whose last tool result equals the answer, whitespace and case
  ignored;
- tool_call_schema_match: mean over examples of 0.3 · right name + 0.7 · share of gold arguments reproduced;
- turn_closed: share of examples that the model ended itself;
- answer_grounded: share of examples whose final text states what the last tool result says
  (`scoring.grounding`).

Examples whose gold answer is itself an `Error:` are counted separately.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.scoring.grounding import trajectory_grounded
from grpo_jax.scoring.intervals import bootstrap_interval, wilson_interval
from grpo_jax.scoring.rewards import same_answer
from grpo_jax.types import Outcome, Status, ToolCall, Trajectory, tool_results

FIGURES = (
    "response_validity",
    "exact_answer_match",
    "tool_call_schema_match",
    "turn_closed",
    "answer_grounded",
)
NAME_WEIGHT = 0.3


def summarize(trajectories: Sequence[Trajectory], gold: Sequence[list[ToolCall]]) -> dict[str, Any]:
    """The figures of evaluated examples with their 95 % intervals, `n` and `error_answers`, as in summary.json.

    Args:
        trajectories: one per example.
        gold: the calls that answer each; empty where an example names none.
    """
    found = list(map(row_figures, trajectories, gold))
    wants_error = [t.prompt.example.wants_error for t in trajectories]
    rows = [row for row, error in zip(found, wants_error, strict=True) if not error]
    errors = [row["exact_answer_match"] for row, error in zip(found, wants_error, strict=True) if error]
    means, intervals = {}, {}
    for name in FIGURES:
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = float(np.mean(values)) if values else None
        if name != "tool_call_schema_match":  # a share of the rows
            intervals[name] = wilson_interval(sum(values), len(values))
        else:
            intervals[name] = bootstrap_interval(values, seed=0) if values else None
    return {
        **means,
        "n": len(rows),
        "intervals": intervals,
        "error_answers": {
            "n": len(errors),
            "exact_answer_match": sum(errors) / len(errors) if errors else None,
        },
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 − C(n − c, k) / C(n, k).

    Args:
        n: samples, >= k.
        c: right ones among them.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def summarize_samples(samples: Sequence[Trajectory], n: int) -> dict[str, Any]:
    """mean@n and pass@k of sampled completions with their 95 % intervals, as `summarize` has the greedy figures.

    mean@n is the mean exact_answer_match of all samples, pass@k the mean of `pass_at_k` for k = 2, 4, … below n
    and for n. Examples whose answer is an `Error:` are left out; None where no others are there.

    Args:
        samples: n of each example, next to each other.
        n: samples per example, >= 2.
    """
    exact = list(map(is_exact, samples))
    groups = range(0, len(samples), n)
    right = [sum(exact[i : i + n]) for i in groups if not samples[i].prompt.example.wants_error]
    sizes = [2**i for i in range(1, n.bit_length()) if 2**i < n] + [n]
    values = {f"mean@{n}": [c / n for c in right]}
    values |= {f"pass@{k}": [pass_at_k(n, c, k) for c in right] for k in sizes}
    found: dict[str, Any] = {name: float(np.mean(v)) if v else None for name, v in values.items()}
    found["intervals"] = {name: bootstrap_interval(v, seed=0) if v else None for name, v in values.items()}
    return found


def is_exact(trajectory: Trajectory) -> bool:
    """Whether the last tool result is the answer; see `exact_answer_match`."""
    results = tool_results(trajectory.messages)
    return bool(results) and same_answer(results[-1][1], trajectory.prompt.example.answer)


def row_figures(trajectory: Trajectory, gold: Sequence[ToolCall]) -> dict[str, Any]:
    """What one example adds to each figure; None where it has none."""
    calls = trajectory.calls
    asked = trajectory.status is not Status.TOOLS_DONE  # for a final text
    return {
        "response_validity": any(result.outcome is Outcome.OK for _, result in calls),
        "exact_answer_match": is_exact(trajectory),
        "tool_call_schema_match": schema_match([call for call, _ in calls], gold) if gold else None,
        "turn_closed": trajectory.status.closed if asked else None,
        "answer_grounded": trajectory_grounded(trajectory) if asked else None,
    }


def schema_match(calls: Sequence[ToolCall], gold: Sequence[ToolCall]) -> float:
    """How much of the gold calls was reproduced, in [0, 1]; each gold call takes its best unused call."""
    unused, total = list(calls), 0.0
    for want in gold:
        scores = [call_match(call, want) for call in unused]
        if scores:
            best = int(np.argmax(scores))
            total += scores[best]
            unused.pop(best)
    return total / len(gold)


def call_match(call: ToolCall, gold: ToolCall) -> float:
    """0.3 · right name + 0.7 · share of gold arguments reproduced; nothing for another tool's arguments."""
    if call.name != gold.name:
        return 0.0
    same = [equal_values(call.arguments.get(k), v) for k, v in gold.arguments.items()]
    return NAME_WEIGHT + (1 - NAME_WEIGHT) * (sum(same) / len(same) if same else 1.0)


def equal_values(a: Any, b: Any) -> bool:
    """Equality as the schema figure means it: numbers to 2 decimals, null equals absent inside objects."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return round(a, 2) == round(b, 2)
    if isinstance(a, dict) and isinstance(b, dict):
        return all(equal_values(a.get(k), b.get(k)) for k in a.keys() | b.keys())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal_values, a, b))
    return a == b
