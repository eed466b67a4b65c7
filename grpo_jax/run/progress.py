"""How far a run is, and saving it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.data.batches import Cursor
from grpo_jax.data.difficulty import SolveRates
from grpo_jax.files import OutputError
from grpo_jax.rollout.delays import ToolDelays
from grpo_jax.run.checkpoint import Checkpoints, Stopped
from grpo_jax.run.log import PhaseTimer
from grpo_jax.run.stopping import Best
from grpo_jax.update.update import TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint says in addition to the state: where the data stands and what was found out.

    Args:
        cursor: the next batch's place in the data.
        num_tokens: of prompts and completions so far.
        best: the best evaluation.
        rates: how often each row was solved; None without difficulty_sampling.
        delays: of slow tools.
    """

    cursor: Cursor
    num_tokens: int
    best: Best
    rates: SolveRates | None
    delays: ToolDelays

    @classmethod
    def from_meta(cls, meta: dict[str, Any], figure: str, kept: Sequence[int], rows: int | None) -> Progress:
        """The inverse of `to_meta`.

        Args:
            figure, kept: see `Best.resumed`.
            rows: of the data set, with difficulty_sampling; None without.
        """
        best = Best.resumed(meta.get("best"), figure, kept)
        rates = None if rows is None else SolveRates.from_json(rows, meta.get("solve_rates", {}))
        delays = ToolDelays.from_json(meta.get("tool_delays", {}))
        return cls(Cursor.from_json(meta["cursor"]), meta["num_tokens"], best, rates, delays)

    def to_meta(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "cursor": self.cursor.to_json(),
            "num_tokens": self.num_tokens,
            "best": dataclasses.asdict(self.best),
            "tool_delays": self.delays.to_json(),
        } | ({} if self.rates is None else {"solve_rates": self.rates.to_json()})


@dataclasses.dataclass(frozen=True)
class Saver:
    """Saves a run as it learns.

    Args:
        checkpoints: where to.
        meta: what every checkpoint of the run says.
        timer: its seconds are saved too.
        line: prints a line.
    """

    checkpoints: Checkpoints
    meta: dict[str, Any]
    timer: PhaseTimer
    line: Callable[[str], None]

    def save(self, state: TrainState, progress: Progress, **found: Any) -> None:
        """A checkpoint; raises OutputError where it cannot be written. That the last could not is a warning."""
        meta = self.meta | progress.to_meta() | found | {"timings": self.timer.seconds}
        self.tried(self.checkpoints.wait)
        with self.timer("save"):
            self.checkpoints.save(int(state.step), state, meta)

    def tried(self, write: Callable[..., None], *arguments: Any) -> None:
        """A write to the checkpoints, whose failure is no reason to throw away what is being learned."""
        try:
            write(*arguments)
        except OutputError as error:
            self.line(f"Warning: {error}. Training continues, and the next save tries again")

    def stopped(self, state: TrainState, progress: Progress, **found: Any) -> Stopped:
        """Saves what was learned since the last checkpoint; what to raise."""
        step = int(state.step)
        self.tried(self.checkpoints.wait)  # or the newest is one that could not be written
        if step > (self.checkpoints.latest() or 0):
            self.save(state, progress, **found)
        self.checkpoints.wait()
        return Stopped(f"after update {step}, which is saved" if step else "before the first update")
