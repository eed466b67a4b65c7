"""What a run records: metrics by step, rollouts, seconds by phase, intervals. No jax here.

Metric names are TRL's where TRL has the metric.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax import hosts
from grpo_jax.files import whole_lines, write_text_atomic
from grpo_jax.run.trackers import open_tracker

if TYPE_CHECKING:  # types imports jax
    from grpo_jax.types import Example, Trajectory

EVALUATED = ("response_validity", "exact_answer_match", "tool_call_schema_match")  # see `evaluate`
PHASES = ("compile", "cold_start", "rollout", "reward", "update", "evaluate", "save")


# --- files ---


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """Write an object as indented JSON, whole or not at all; see `plain`."""
    write_text_atomic(path, json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n")


def read_summary(output_dir: str | os.PathLike) -> dict[str, Any]:
    """summary.json of a run; empty before its first evaluation."""
    path = Path(output_dir) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def plain(value: Any) -> Any:
    """The same value in JSON's types: numbers out of arrays, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # numpy and jax scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class MetricsWriter:
    """metrics.jsonl, one object a step, and a tracker when asked.

    Args:
        output_dir: folder of the run.
        report_to: the tracker's name, or "none"; see `trackers`.
        resume_step: updates done at the checkpoint that the run continues from; later
            lines are dropped, since those steps come again. None for a new run.
        config: options by name, for the tracker.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        report_to: str = "none",
        resume_step: int | None = None,
        config: dict[str, Any] | None = None,
    ):
        self.path = Path(output_dir) / "metrics.jsonl"
        kept = [] if resume_step is None else _lines_up_to(self.path, resume_step)
        write_text_atomic(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._tracker = open_tracker(report_to, output_dir, resume_step, config or {})

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append a step's metrics and flush, so that a kill loses no finished step.

        Args:
            step: updates done.
            metrics: name -> number (or anything of JSON's types).
        """
        values = plain(metrics)
        self._file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(step, {k: float(v) for k, v in values.items() if isinstance(v, int | float)})

    def close(self) -> None:
        """Close the files; nothing is lost without it."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of steps up to `step`; a last line torn by a kill counts as later."""
    lines = whole_lines(path) if path.exists() else []
    return [line for line in lines if json.loads(line)["step"] <= step]


class RolloutLog:
    """rollouts/step_000012.jsonl: every completion of a step, one object a row.

    Args:
        output_dir: folder of the run.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.folder = Path(output_dir) / "rollouts"

    def write(
        self,
        step: int,
        examples: Sequence[Example],
        trajectories: Sequence[Trajectory],
        advantages: Sequence[float],
        reward_names: Sequence[str],
        extras: dict[str, Sequence[Any]] | None = None,
    ) -> Path:
        """Write a step's rows.

        Args:
            step: the update that these rows are for.
            examples: [B] the row's example (a group repeats it).
            trajectories: [B].
            advantages: [B].
            reward_names: one per value of a trajectory's rewards.
            extras: more columns, [B] values each (what rewards gave to `log_extra`).

        Returns:
            The file.
        """
        extras = extras or {}
        rows = [
            {
                "prompt": last_user_message(example.messages),
                "messages": one.messages,
                "answer": example.answer,
                "rewards": dict(zip(reward_names, one.rewards, strict=True)),
                "status": one.status.value,
                "advantage": advantage,
                **{name: values[i] for name, values in extras.items()},
            }
            for i, (example, one, advantage) in enumerate(
                zip(examples, trajectories, advantages, strict=True)
            )
        ]
        path = self.folder / f"step_{step:06d}.jsonl"
        write_text_atomic(path, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows))
        return path


def last_user_message(messages: Sequence[dict[str, Any]]) -> str:
    """Text of the last user message; empty when there is none."""
    return next((m.get("content") or "" for m in reversed(messages) if m.get("role") == "user"), "")


# --- metrics of a batch ---


def trajectory_metrics(
    trajectories: Sequence[Trajectory],
    rewards: Sequence[float],
    group_std: Sequence[float],
    reward_names: Sequence[str],
) -> dict[str, float]:
    """The metrics of a batch of completions, under TRL's names.

    `completions/*_length` count sampled tokens, without tool responses.
    `tools/call_frequency` is calls per completion, `tools/failure_frequency` failures
    per call. Deviations have Bessel's correction. `status/NAME` are shares of the rows.

    Args:
        trajectories: [B].
        rewards: [B] what all reward functions gave together; NaN where none applies.
        group_std: [P] deviation of each group's rewards.
        reward_names: one per value of a trajectory's rewards.

    Raises:
        ValueError: when there are no trajectories.
    """
    if not trajectories:
        raise ValueError("metrics need at least one trajectory, got none")
    return (
        _reward_metrics(trajectories, rewards, group_std, reward_names)
        | _length_metrics(trajectories)
        | _tool_metrics(trajectories)
        | _status_metrics(trajectories)
    )


def _reward_metrics(trajectories, rewards, group_std, reward_names) -> dict[str, float]:
    mean, std = _mean_and_std(rewards)
    metrics = {"reward": mean, "reward_std": std}
    for k, name in enumerate(reward_names):
        mean, std = _mean_and_std([one.rewards[k] for one in trajectories])
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
    # 1e-8 is torch.isclose's tolerance around zero, which TRL uses.
    metrics["frac_reward_zero_std"] = float(np.mean(np.asarray(group_std) <= 1e-8))
    return metrics


def _mean_and_std(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and deviation of the values that are there; NaN and 0 when none is."""
    there = np.asarray(values, np.float64)
    there = there[~np.isnan(there)]
    if there.size == 0:
        return math.nan, 0.0
    return float(there.mean()), float(there.std(ddof=1)) if there.size > 1 else 0.0


def _length_metrics(trajectories) -> dict[str, float]:
    lengths = [one.sampled_tokens for one in trajectories]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(one.status.truncated for one in trajectories) / len(trajectories),
    }


def _tool_metrics(trajectories) -> dict[str, float]:
    outcomes = [result.outcome.value for one in trajectories for _, result in one.calls]
    failures = sum(outcome != "ok" for outcome in outcomes)
    return {
        "tools/call_frequency": len(outcomes) / len(trajectories),
        "tools/failure_frequency": failures / len(outcomes) if outcomes else 0.0,
    }


def _status_metrics(trajectories) -> dict[str, float]:
    counts = Counter(one.status for one in trajectories)
    return {f"status/{s.value}": counts[s] / len(trajectories) for s in type(trajectories[0].status)}


# --- time ---


class PhaseTimer:
    """Seconds by phase: `with timer("rollout"): …`; a phase inside another is charged only to itself.

    Args:
        clock: seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._clock = clock
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge the block to a phase.

        Raises:
            ValueError: for a name that is not in PHASES.
        """
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
        self._charge()
        self._running.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def move(self, phase: str, seconds: float) -> None:
        """Charge seconds that have just passed to another phase than the one that is running."""
        if self._running:
            self.seconds[self._running[-1]] -= seconds
            self.seconds[phase] += seconds

    def restore(self, seconds: dict[str, float]) -> None:
        """Start from the seconds of an interrupted run."""
        self.seconds |= {phase: float(seconds.get(phase, 0.0)) for phase in PHASES}

    def _charge(self) -> None:
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


# --- intervals ---


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share: (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), z = 1.96.

    Args:
        successes: rows that have the property.
        n: rows.

    Returns:
        (low, high) in [0, 1]; (0, 1) for no rows, which say nothing.

    Raises:
        ValueError: when successes is not in [0, n].

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be in [0, n = {n}], got {successes}")
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959963984540054, successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def interval_text(summary: dict[str, Any], name: str) -> str:
    """One of an evaluation's figures with its 95 % interval."""
    value, interval = summary[name], summary["intervals"][name]
    return "-" if value is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def bootstrap_interval(values: Sequence[float], seed: int, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of a mean: the 2.5 and 97.5 percentiles of the means of resampled rows.

    Args:
        values: one per row.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many means.

    Returns:
        (low, high).

    Raises:
        ValueError: when there are no values.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife" (percentile form).
    """
    if len(values) == 0:
        raise ValueError("a bootstrap interval needs at least one value, got none")
    rows, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    means = [rows[rng.integers(rows.size, size=rows.size)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class Records:
    """What the first host writes of every step; nothing in the others. A context manager.

    Args:
        config: the options of the run.
        resume_step: updates done at the checkpoint that the run continues from; None for a new run.
    """

    def __init__(self, config: Any, resume_step: int | None):
        self._files = None
        if hosts.is_first():
            options = dataclasses.asdict(config)
            metrics = MetricsWriter(config.output_dir, config.report_to, resume_step, options)
            self._files = metrics, RolloutLog(config.output_dir)

    def write(
        self, step: int, record: dict[str, Any], trajectories: Sequence[Trajectory], *names: Any
    ) -> None:
        """A step's metrics, and its completions as `RolloutLog.write` takes them."""
        if self._files is not None:
            metrics, rollouts = self._files
            metrics.write(step, record)
            examples = [t.prompt.example for t in trajectories]
            rollouts.write(step, examples, trajectories, [t.advantage for t in trajectories], *names)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        if self._files is not None:
            self._files[0].close()
