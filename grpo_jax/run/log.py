"""What a run records: metrics by step, rollouts, seconds by phase. No jax here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax import hosts
from grpo_jax.files import OutputError, cannot_write, plain, whole_lines, write_text_atomic, writing
from grpo_jax.run.trackers import open_tracker
from grpo_jax.types import Trajectory

_log = logging.getLogger(__name__)
PHASES = ("compile", "cold_start", "rollout", "reward", "update", "evaluate", "save")


# --- files ---


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """Write an object as indented JSON, whole or not at all; see `files.plain`."""
    write_text_atomic(path, json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n")


def read_summary(output_dir: str | os.PathLike) -> dict[str, Any]:
    """summary.json of a run; empty before its first evaluation."""
    path = Path(output_dir) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Records:
    """What the first host writes of every step, and nothing in the others: metrics.jsonl, one object per step,
    the tracker that `report_to` names, and rollouts. A context manager.

    Args:
        resume_step: updates done at the checkpoint that the run continues from; later lines are dropped,
            since those steps are repeated. None for a new run.
    """

    def __init__(self, config: Any, resume_step: int | None = None):
        self._folder = Path(config.output_dir)
        self._path = self._folder / "metrics.jsonl"
        self._file = self._tracker = None
        if hosts.is_first():
            kept = []
            if resume_step is not None and self._path.exists():
                lines = whole_lines(self._path)
                kept = [line for line in lines if json.loads(line)["step"] <= resume_step]
            write_text_atomic(self._path, "".join(kept))
            self._file = self._path.open("a", encoding="utf-8")
            options = dataclasses.asdict(config)
            self._tracker = open_tracker(config.report_to, self._folder, resume_step, options)

    def write_metrics(self, step: int, record: dict[str, Any]) -> None:
        """Append a step's metrics and flush, so that a kill loses no finished step.

        Args:
            step: updates done.
            record: name -> number (or anything of JSON's types).

        Raises:
            OutputError: the file is gone, or the disk full.
        """
        if self._file is None:
            return
        values = plain(record)
        self._check()
        with writing(self._path):
            self._file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
            self._file.flush()
        if self._tracker is not None:
            self._tracker.log(step, {k: float(v) for k, v in values.items() if isinstance(v, int | float)})

    def write_rollouts(self, step: int, *completions: Any) -> None:
        """As the function `write_rollouts` takes them; the run continues without those that cannot be written."""
        if self._file is not None:
            self._check()
            try:
                write_rollouts(self._folder, step, *completions)
            except OutputError as error:
                _log.warning("%s", error)

    def _check(self) -> None:
        if not self._path.exists():  # what is written to a removed file is lost
            raise cannot_write(self._path, "it, or its folder, was removed while the run is writing it")

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._file, self._tracker):
            if one is not None:
                one.close()


def write_rollouts(
    output_dir: str | os.PathLike,
    step: int,
    trajectories: Sequence[Trajectory],
    reward_names: Sequence[str],
    extras: Mapping[str, Sequence[Any]] | None = None,
) -> Path:
    """Write rollouts/step_000012.jsonl: every completion of a step, one object per row.

    Args:
        trajectories: [B].
        reward_names: one per value of a trajectory's rewards.
        extras: more columns, [B] values each (what rewards gave to `log_extra`); none has the name of a
            row's own column, see `scoring.rewards.ROW_COLUMNS`.
    """
    rows = [
        {
            "prompt": last_user_message(one.prompt.example.messages),
            "messages": one.messages,
            "answer": one.prompt.example.answer,
            "rewards": dict(zip(reward_names, one.rewards, strict=True)),
            "status": one.status.value,
            "advantage": one.advantage,
            **{name: values[i] for name, values in (extras or {}).items()},
        }
        for i, one in enumerate(trajectories)
    ]
    path = Path(output_dir) / "rollouts" / f"step_{step:06d}.jsonl"
    write_text_atomic(path, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows))
    return path


def last_user_message(messages: Sequence[dict[str, Any]]) -> str:
    """Text of the last user message; empty when there is none."""
    return next((m.get("content") or "" for m in reversed(messages) if m.get("role") == "user"), "")


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
        """Charge the block to a phase, and note it on an error that leaves it.

        Raises:
            ValueError: for a name that is not in PHASES.
        """
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
        self._charge()
        self._running.append(phase)
        try:
            yield
        except Exception as error:
            error.add_note(f"phase: {phase}")
            raise
        finally:
            self._charge()
            self._running.pop()

    def move(self, phase: str, seconds: float) -> None:
        """Charge seconds that have just passed to a phase other than the current one."""
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


# --- figures of an evaluation ---


def interval_text(summary: dict[str, Any], name: str) -> str:
    """One of an evaluation's figures with its 95 % interval; "–" for what could not be computed."""
    value, interval = summary.get(name), summary["intervals"].get(name)  # an older run has fewer
    if value is None:
        return "–"
    return f"{value:.3f} (–)" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
