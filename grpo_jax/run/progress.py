"""How far a run is: what checkpoints save of it, what is due, and what is printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.data.batches import Cursor, Steps
from grpo_jax.data.difficulty import SolveRates
from grpo_jax.files import OutputError
from grpo_jax.rollout.delays import ToolDelays
from grpo_jax.run.checkpoint import machine_meta
from grpo_jax.run.console import Console
from grpo_jax.run.identity import adapters_meta, run_identity
from grpo_jax.run.job import DataSet, Job, lora_config
from grpo_jax.run.stopping import Best
from grpo_jax.types import Prompt, Trajectory


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint says in addition to the state: where the data stands and what was found out.

    Args:
        cursor: the next batch's place in the data.
        num_tokens: those of prompts and completions so far.
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


def tried(line: Callable[[str], None], write: Callable[..., None], *arguments: Any) -> None:
    """A write to the checkpoints, whose failure is printed: it is no reason to throw away what is being learned."""
    try:
        write(*arguments)
    except OutputError as error:
        line(f"Warning: {error}. Training continues, and the next save tries again")


def fresh_meta(job: Job, prompts: Sequence[Prompt], steps: Steps, source: str, name: str) -> dict[str, Any]:
    """What the first checkpoint of a run that starts from its model would say before any update; see `find_start`.

    Args:
        source: folder of the model that the run starts from.
        name: what others call that model: its hub id, or its folder.
    """
    config = job.config
    numbers = {"seed": config.seed, "prompts": steps.P, "num_generations": steps.G}
    numbers |= {"num_iterations": steps.updates_per_batch, "updates": steps.updates}
    meta = {"cursor": Cursor().to_json(), "num_tokens": 0, "source": source} | machine_meta()
    # adapters are float32 always
    meta["param_dtype"] = "float32" if config.use_peft else config.param_dtype
    if config.use_peft:
        meta |= adapters_meta(lora_config(config), name, job.dtype)
    options = dataclasses.asdict(config)
    model = str(job.adapter or source)
    meta["run"] = run_identity(prompts, job.toolbox, job.rewards, numbers, model, options)
    return meta


def print_steps(console: Console, steps: Steps, data: DataSet) -> None:
    """The shapes of a batch and how many there are."""
    tree = data.tree
    rest = max(len(tree.rest(p.ids)) for p in data.prompts) + 1
    console.line(
        f"Prefix tree: preamble {len(tree.preamble)} tokens once, {steps.P} prompts of up to {rest} tokens, "
        f"{steps.P} × {steps.G} completions of up to {tree.budget} tokens"
    )
    dropped = len(data.prompts) - steps.P * steps.batches_per_epoch
    console.line(
        f"{len(data.prompts)} rows, {steps.batches_per_epoch} batches an epoch"
        + (f" ({dropped} rows of each epoch's end are left out)" if dropped else "")
        + f", {steps.updates} updates in all"
    )


def print_update(
    job: Job, steps: Steps, step: int, record: Mapping[str, Any], trajectories: Sequence[Trajectory]
) -> None:
    """The line of an update, and sample conversations where log_completions asks for them."""
    sampled = ""
    if job.config.dynamic_sampling:
        sampled = (
            f", {record['rollout/rounds']} rollouts, {record['rollout/wasted_groups']:.0%} of groups wasted"
        )
    job.console.line(
        f"update {step}/{steps.updates}: reward {record['reward']:.3f} ± {record['reward_std']:.3f}, "
        f"length {record['completions/mean_length']:.1f}, loss {record['loss']:+.4f}, "
        f"entropy {record['entropy']:.3f}, {record['step_time']:.2f} s{sampled}"
    )
    if job.config.log_completions:
        job.console.samples(trajectories, [t.prompt.example.answer for t in trajectories])
