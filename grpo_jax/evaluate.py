"""Greedy evaluation over the whole tool loop: `python -m grpo_jax.evaluate`.

The same schemas, template and tool loop as in training. The three figures:
- response_validity: share of rows with at least one parsable call to a known tool whose
  result does not begin with `Error:`;
- exact_answer_match: share of rows whose last tool result equals the answer, blanks and
  case ignored;
- tool_call_schema_match: mean over rows of 0.3 · right name + 0.7 · share of gold arguments
  reproduced.
Rows whose gold answer is itself an `Error:` are counted apart.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax import hosts
from grpo_jax.data.gold import gold_calls
from grpo_jax.models.qwen import Params
from grpo_jax.rollout.loop import prefill_preamble, run_rollout
from grpo_jax.rollout.sampler import Sampler, Sampling
from grpo_jax.run.command import run_command
from grpo_jax.run.compiling import watch_compiles
from grpo_jax.run.config import ResolvedConfig
from grpo_jax.run.console import Console
from grpo_jax.run.job import Prompts, Session, load_prompts, open_session
from grpo_jax.run.log import (
    EVALUATED,
    PhaseTimer,
    bootstrap_interval,
    interval_text,
    wilson_interval,
    write_json_atomic,
)
from grpo_jax.scoring.rewards import same_answer
from grpo_jax.types import Example, Outcome, ToolCall, Trajectory

NAME_WEIGHT = 0.3


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation.

    Args:
        summary: the three metrics, `n`, `intervals` (95 %) and `error_answers`, as in summary.json.
        trajectories: one per row, for samples.
    """

    summary: dict[str, Any]
    trajectories: list[Trajectory]


def greedy_sampler(session: Session) -> Sampler:
    """The sampler that evaluation uses; make it once, it holds the compiled functions."""
    return session.sampler(Sampling(temperature=0))


def evaluate(session: Session, sampler: Sampler, params: Params, prompts: Prompts, title: str) -> Evaluation:
    """Run every prompt greedily and score the calls.

    Args:
        session: the job's parts.
        sampler: from `greedy_sampler`.
        params: rollout weights, from `sampler.export`.
        prompts: the rows.
        title: of the progress bar.
    """
    gold = [gold_calls(e, session.toolbox.functions) for e in prompts.examples]
    size = session.config.eval_batch_size
    if not hosts.alone():  # every host has rows, if only such as fill up
        size = -(-size // session.row_devices) * session.row_devices
    loop = session.tool_loop(sampler, prompts.tree)
    preamble = prefill_preamble(loop, params)
    schemas = [session.schemas_of(e) for e in prompts.examples]
    trajectories: list[Trajectory] = []
    with session.console.progress(title, len(prompts.ids)) as bar:
        for start in range(0, len(prompts.ids), size):
            rows = list(range(start, min(start + size, len(prompts.ids))))
            filled = rows + [start] * (size - len(rows))  # always the same shape: one compile
            live = [i < len(rows) for i in range(size)]
            done = run_rollout(
                loop,
                params,
                preamble,
                [prompts.ids[i] for i in filled],
                filled,
                schemas=[schemas[i] for i in filled],
                live=live,
            )
            trajectories += done.trajectories[: len(rows)]
            bar.advance(len(rows))
    return Evaluation(summarize(prompts.examples, trajectories, gold), trajectories)


def summarize(
    examples: Sequence[Example], trajectories: Sequence[Trajectory], gold: Sequence[list[ToolCall]]
) -> dict[str, Any]:
    """The metrics of evaluated rows, with their intervals."""
    apart = [e.answer.startswith("Error:") for e in examples]
    rows = [i for i, is_error in enumerate(apart) if not is_error]
    valid = [_is_valid(trajectories[i]) for i in rows]
    exact = [_is_exact(trajectories[i], examples[i].answer) for i in rows]
    match = [schema_match([c for c, _ in trajectories[i].calls], gold[i]) for i in rows if gold[i]]
    n = len(rows)
    errors = [_is_exact(trajectories[i], examples[i].answer) for i, is_error in enumerate(apart) if is_error]
    return {
        "response_validity": sum(valid) / n if n else None,
        "exact_answer_match": sum(exact) / n if n else None,
        "tool_call_schema_match": float(np.mean(match)) if match else None,
        "n": n,
        "intervals": {
            "response_validity": wilson_interval(sum(valid), n),
            "exact_answer_match": wilson_interval(sum(exact), n),
            "tool_call_schema_match": bootstrap_interval(match, seed=0) if match else None,
        },
        "error_answers": {
            "n": len(errors),
            "exact_answer_match": sum(errors) / len(errors) if errors else None,
        },
    }


def _is_valid(trajectory: Trajectory) -> bool:
    return any(result.outcome is Outcome.OK for _, result in trajectory.calls)


def _is_exact(trajectory: Trajectory, answer: str) -> bool:
    return bool(trajectory.calls) and same_answer(trajectory.calls[-1][1].text, answer)


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


def compare(console: Console, summaries: dict[str, dict[str, Any]]) -> None:
    """A table of several evaluations, each figure with its 95 % interval."""
    rows = []
    for metric in EVALUATED:
        cells = [interval_text(summary, metric) for summary in summaries.values()]
        rows.append((metric, *cells))
    n = next(iter(summaries.values()))["n"]
    console.table(f"Evaluation on {n} rows", ("metric", *summaries), rows)


def run(resolved: ResolvedConfig, console: Console) -> None:
    """Evaluate one model folder or checkpoint and write `evaluation.json` to output_dir."""
    config = resolved.config
    timer = PhaseTimer()
    with watch_compiles(console, timer):
        session = open_session(config, console, timer)
        with session.runner:
            source = config.eval_dataset_id_or_path or config.required("dataset_id_or_path")
            prompts = load_prompts(session, source)
            sampler = greedy_sampler(session)
            with timer("evaluate"):
                params = sampler.export(session.load_params())
                result = evaluate(session, sampler, params, prompts, "Evaluation")
    console.samples(result.trajectories, [e.answer for e in prompts.examples])
    model = str(session.checkpoint or session.folder)
    compare(console, {model: result.summary})
    path = Path(config.output_dir) / "evaluation.json"
    found = result.summary | {"model": model, "timings": timer.seconds}
    hosts.of_first(lambda: write_json_atomic(path, found))
    console.line(f"Written: {path}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command("evaluate", "Evaluate a model folder or checkpoint.", run, argv)


if __name__ == "__main__":
    sys.exit(main())
