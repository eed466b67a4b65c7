"""GRPO training: `python -m grpo_jax.train --config configs/quickstart.yaml`.

Top to bottom this is the algorithm: sample groups of completions with their tool
turns, score them, compare each with its group, update; then export what was learned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax import hosts
from grpo_jax.data.batches import Cursor, next_batch
from grpo_jax.evaluate import compare, evaluate, greedy_sampler
from grpo_jax.models.lora import Frozen, join
from grpo_jax.models.qwen import Params
from grpo_jax.preflight.check import check_job
from grpo_jax.preflight.plan import show_plan
from grpo_jax.report import write_report
from grpo_jax.rollout.loop import Rollout, ToolLoop, prefill_preamble, run_rollout
from grpo_jax.rollout.sampler import Sampler, Sampling
from grpo_jax.run.checkpoint import Checkpoints, StopSignal, is_step_folder
from grpo_jax.run.command import INTERRUPTED, run_command
from grpo_jax.run.compiling import watch_compiles
from grpo_jax.run.config import ResolvedConfig, write_resolved
from grpo_jax.run.console import Console
from grpo_jax.run.job import Prompts, Session, load_prompts, open_session
from grpo_jax.run.log import (
    MetricsWriter,
    PhaseTimer,
    RolloutLog,
    read_summary,
    trajectory_metrics,
    write_json_atomic,
)
from grpo_jax.run.options import Config
from grpo_jax.run.weights import adapters_meta, check_resumable
from grpo_jax.scoring.advantages import combine_rewards, group_advantages, group_std
from grpo_jax.scoring.rewards import RewardOutcome, call_rewards, joined
from grpo_jax.sft import fine_tune
from grpo_jax.types import Example, StepBatch, TrainState, Trajectory
from grpo_jax.update.batch import step_batch
from grpo_jax.update.optimizer import make_schedule
from grpo_jax.update.update import (
    GrpoObjective,
    ModelStep,
    init_state,
    make_score,
    make_update,
    micro_batches_for,
    place_batch,
    state_shardings,
    update_sizes,
)

log = logging.getLogger(__name__)

# What a run leaves in output_dir, and all that --overwrite_output_dir removes.
LEAVINGS = (
    "resolved_config.yaml",
    "metrics.jsonl",
    "rollouts",
    "checkpoints",
    "model",
    "adapter",
    "summary.json",
    "base_model",
    "cold_start",
    "tensorboard",
    "wandb",
    "mlflow.db",
    "tracker.json",
    "report.html",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the steps of a run follow from its options and data.

    Args:
        P: prompts per batch.
        G: completions per prompt.
        batches_per_epoch: full batches; an incomplete last one is dropped.
        batches: of the whole run.
        updates_per_batch: `num_iterations`.
    """

    P: int
    G: int
    batches_per_epoch: int
    batches: int
    updates_per_batch: int

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.batches * self.updates_per_batch


def make_plan(config: Config, rows: int, row_devices: int) -> Plan:
    """Derive batches and updates.

    Raises:
        ValueError: completions per update do not divide by num_generations, or the data has
            fewer rows than one batch has prompts.
    """
    G = config.num_generations
    P = config.batch_size(row_devices) // G
    if rows < P:
        raise ValueError(
            f"one update needs {P} prompts ({P} × {G} completions), the data has {rows} rows; "
            "lower per_device_train_batch_size or gradient_accumulation_steps, or add rows"
        )
    per_epoch = rows // P
    batches = math.ceil(config.num_train_epochs * per_epoch)
    if config.max_steps > 0:
        batches = math.ceil(config.max_steps / config.num_iterations)
    return Plan(P, G, per_epoch, batches, config.num_iterations)


@dataclasses.dataclass(frozen=True)
class Learner:
    """The compiled parts of an update and what they were made for.

    Args:
        step: how the model runs.
        schedule: updates done -> learning rate.
        update: the jitted update.
        score: jitted log-probabilities of a frozen or earlier policy.
        reference: parameters of the frozen reference; None when beta is 0.
        frozen: the base under trained adapters; None when all weights are trained.
        sizes: numbers of prompts that an update may shrink to.
    """

    step: ModelStep
    schedule: Callable[[int], float]
    update: Callable
    score: Callable
    reference: Any
    frozen: Frozen | None
    sizes: tuple[int, ...]

    def params(self, state: TrainState) -> Params:
        """The whole model's parameters."""
        return join(state.params, self.frozen)


def run(resolved: ResolvedConfig, console: Console) -> int:
    """Train as configured; returns the exit status."""
    config = resolved.config
    if config.plan is not None:
        return show_plan(config, console, make_plan)
    if config.check:
        return _check(config, console)
    out = Path(config.output_dir)
    if config.overwrite_output_dir:
        hosts.of_first(lambda: _start_over(out))
    summary = hosts.of_first(lambda: read_summary(out))
    if "after" in summary:
        console.line(
            f"The run in {out} is finished (summary.json, model/). "
            "--overwrite_output_dir starts over; another --output_dir keeps both."
        )
        return 0
    timer = PhaseTimer()
    timer.restore(summary.get("timings", {}))
    with watch_compiles(console, timer):
        session = open_session(config, console, timer)
        with session.runner:
            data = load_prompts(session, config.required("dataset_id_or_path"))
            return _train(session, resolved, data, summary)


def _check(config: Config, console: Console) -> int:
    """Check the job; nothing is left in output_dir, so a scratch model is made elsewhere."""
    with tempfile.TemporaryDirectory() as elsewhere:
        session = open_session(dataclasses.replace(config, output_dir=elsewhere), console, PhaseTimer())
        with session.runner:
            data = load_prompts(session, config.required("dataset_id_or_path"))
            source = config.eval_dataset_id_or_path
            evaluation = None if source is None else load_prompts(session, source)
            status = check_job(session, data, evaluation, lambda e, t: score_rewards(session, e, t, 0, 1))
            _say_plan(console, make_plan(config, len(data.ids), session.row_devices), data)
    return status


def _train(session: Session, resolved: ResolvedConfig, data: Prompts, summary: dict[str, Any]) -> int:
    config, console, out = session.config, session.console, Path(session.config.output_dir)
    plan = make_plan(config, len(data.ids), session.row_devices)
    hosts.share(range(plan.P))  # raises where the prompts do not divide by the hosts
    _check_inputs(session)
    _say_plan(console, plan, data)
    evaluated = config.eval_batch_size
    log.debug("Rows: P = %d, B = %d; P = B = %d in an evaluation", plan.P, plan.P * plan.G, evaluated)
    hosts.of_first(lambda: write_resolved(config, out / "resolved_config.yaml"))
    greedy = greedy_sampler(session)
    with Checkpoints(out / "checkpoints", keep=config.save_total_limit) as checkpoints:
        found = _checkpoint_to_resume(config, checkpoints)
        if config.cold_start:
            session = _cold_start(session, data, greedy, summary)

        evaluation = _Evaluation(session, greedy)
        sampler = session.sampler(_sampling(config))
        with StopSignal() as stop:
            learner, state, meta = _start(session, plan, data, checkpoints, found)
            if "before" not in summary and evaluation.possible:
                summary["before"] = evaluation(sampler.export(learner.params(state)), "Evaluation before")
                _write_summary(session, summary)
            state, stopped = _grpo(
                session, plan, data, sampler, learner, state, meta, checkpoints, stop, evaluation
            )
    if stopped:
        _write_summary(session, summary)
        hosts.of_first(lambda: write_report(out))
        console.line(f"Stopped after update {int(state.step)}, which is saved. The same command continues.")
        return INTERRUPTED
    _finish(session, sampler, learner, state, evaluation, summary)
    return 0


def _grpo(
    session: Session,
    plan: Plan,
    data: Prompts,
    sampler: Sampler,
    learner: Learner,
    state: TrainState,
    meta: dict[str, Any],
    checkpoints: Checkpoints,
    stop: StopSignal,
    evaluation: _Evaluation,
) -> tuple[TrainState, bool]:
    """The training loop; returns the last state and whether it was asked to stop early."""
    config, console, timer = session.config, session.console, session.timer
    loop = session.tool_loop(sampler, data.tree)
    cursor, num_tokens = Cursor.from_json(meta["cursor"]), meta["num_tokens"]
    first = int(state.step)
    records = _Records(config, resume_step=first or None)
    names = [reward.name for reward in session.rewards]
    with console.progress("GRPO", plan.batches) as bar:
        bar.advance(first // plan.updates_per_batch)
        for _ in range(first // plan.updates_per_batch, plan.batches):
            began = time.perf_counter()
            draws, next_cursor = next_batch(len(data.ids), plan.P, cursor, config.seed)
            examples = [data.examples[i] for i, _ in draws for _ in range(plan.G)]

            with timer("rollout"):
                rollout = _sample(session, plan, data, sampler, learner.params(state), loop, draws, stop)
                trajectories = rollout.trajectories
            if session.purity is not None:  # beside what follows, which needs no tools
                session.purity.start(call for t in hosts.share(trajectories) for call in t.calls)
            with timer("reward"):
                outcome = _score_shares(session, examples, trajectories, int(state.step), plan.updates)
                rewards = combine_rewards(outcome.values, config.reward_weights or [1.0] * len(names))
                advantages = group_advantages(rewards, plan.G, config.scale_rewards)
                trajectories = [
                    dataclasses.replace(t, rewards=tuple(None if math.isnan(v) else float(v) for v in values))
                    for t, values in zip(trajectories, outcome.values, strict=True)
                ]
            with timer("update"):
                batch = _make_batch(config, data, trajectories, plan, advantages, learner.sizes)
                state, metrics = _update(learner, state, place_batch(learner.step.layout, batch), plan)

            cursor, step = next_cursor, int(state.step)
            num_tokens += sum(len(t.prompt_ids) + len(t.completion_ids) for t in trajectories)
            spread = group_std(rewards, plan.G)
            record = {
                **trajectory_metrics(trajectories, rewards, spread, names),
                **outcome.metrics,
                **metrics,
                "learning_rate": float(learner.schedule(step - 1)),
                "epoch": cursor.epoch + cursor.next_index / len(data.ids),
                "num_tokens": num_tokens,
                "rollout/wasted_decode": rollout.wasted_decode,
            }
            if session.purity is not None:
                record["tools/impure"] = sum(hosts.gather(session.purity.finish))
            record["step_time"] = time.perf_counter() - began
            if evaluation.possible and _due(config.eval_steps, step, plan) and step < plan.updates:
                figures = evaluation(sampler.export(learner.params(state)), f"Evaluation at {step}")
                record |= {f"eval/{k}": v for k, v in figures.items() if isinstance(v, float | int)}
            records.write(step, record, examples, trajectories, advantages, names, outcome.extras)
            bar.advance(1, reward=record["reward"], spread=record["reward_std"])
            _print_step(session, step, plan, record, examples, trajectories)
            meta = {**meta, "cursor": cursor.to_json(), "num_tokens": num_tokens, "timings": timer.seconds}
            done = step >= plan.updates
            # several hosts stop after the same update: one that is asked after its rollout stops after the next
            stopping = stop.requested if hosts.alone() else rollout.stop
            if stopping or _save_due(config, step, cursor, done, plan):
                with timer("save"):
                    checkpoints.save(step, state, meta)
            if stopping and not done:
                records.close()
                return state, True
    records.close()
    return state, False


class _Records:
    """What the first host writes of every step; nothing in the others."""

    def __init__(self, config: Config, resume_step: int | None):
        self._files = None
        if hosts.is_first():
            options = dataclasses.asdict(config)
            metrics = MetricsWriter(config.output_dir, config.report_to, resume_step, options)
            self._files = metrics, RolloutLog(config.output_dir)

    def write(self, step: int, record: dict[str, Any], *rows: Any) -> None:
        """A step's metrics, and its rows as `RolloutLog.write` takes them."""
        if self._files is not None:
            metrics, rollouts = self._files
            metrics.write(step, record)
            rollouts.write(step, *rows)

    def close(self) -> None:
        if self._files is not None:
            self._files[0].close()


def _sample(
    session: Session,
    plan: Plan,
    data: Prompts,
    sampler: Sampler,
    params: Params,
    loop: ToolLoop,
    draws: Sequence[tuple[int, int]],
    stop: StopSignal,
) -> Rollout:
    """One batch of trajectories; the rollout's copy of the weights does not outlive it."""
    chosen = [i for i, _ in draws]
    with session.console.progress("Rollout", plan.P * plan.G) as rows:
        weights = sampler.export(params)
        return run_rollout(
            loop,
            weights,
            prefill_preamble(loop, weights),
            [data.ids[i] for i in chosen],
            [draw for _, draw in draws],
            generations=plan.G,
            seed=session.config.seed,
            schemas=[session.schemas_of(data.examples[i]) for i in chosen],
            on_turn=_row_counter(rows),
            stop=lambda: stop.requested,
        )


def _score_shares(
    session: Session, examples: Sequence[Example], trajectories: Sequence[Trajectory], step: int, updates: int
) -> RewardOutcome:
    """The rewards of a batch: each host scores the rows whose tools it ran, and all get them all."""
    own = hosts.share(list(zip(examples, trajectories, strict=True)))

    def score() -> tuple[RewardOutcome, float]:
        return score_rewards(session, *zip(*own, strict=True), step, updates), session.runner.cache_hit_rate

    outcomes, hit_rates = zip(*hosts.gather(score), strict=True)
    outcome = joined(outcomes)
    outcome.metrics["tools/cache_hit_rate"] = sum(hit_rates) / len(hit_rates)
    return outcome


def score_rewards(
    session: Session, examples: Sequence[Example], trajectories: Sequence[Trajectory], step: int, updates: int
) -> RewardOutcome:
    """Call the user's reward functions on a batch, with every column of its rows."""
    columns = {name for example in examples for name in example.extra}
    return call_rewards(
        session.rewards,
        completions=[t.messages for t in trajectories],
        answer=[e.answer for e in examples],
        prompts=[e.messages for e in examples],
        completion_ids=[t.completion_ids for t in trajectories],
        trainer_state={"global_step": step, "max_steps": updates},
        columns={name: [e.extra.get(name) for e in examples] for name in sorted(columns)},
    )


def _make_batch(
    config: Config,
    data: Prompts,
    trajectories: Sequence[Trajectory],
    plan: Plan,
    advantages: np.ndarray,
    sizes: Sequence[int],
) -> StepBatch:
    learned = [not (config.mask_truncated_completions and t.status.truncated) for t in trajectories]
    return step_batch(data.tree, trajectories, plan.G, advantages, learned, sizes)


def _update(
    learner: Learner, state: TrainState, batch: StepBatch, plan: Plan
) -> tuple[TrainState, dict[str, float]]:
    """One batch's updates; metrics are those of the last."""
    if learner.reference is not None:
        batch = dataclasses.replace(batch, ref_logprobs=learner.score(learner.reference, batch))
    if plan.updates_per_batch > 1:
        batch = dataclasses.replace(batch, old_logprobs=learner.score(learner.params(state), batch))
    for _ in range(plan.updates_per_batch):
        state, metrics = learner.update(state, batch)
    return state, {name: float(value) for name, value in jax.device_get(metrics).items()}


def _start(
    session: Session, plan: Plan, data: Prompts, checkpoints: Checkpoints, found: tuple[Path, int] | None
) -> tuple[Learner, TrainState, dict[str, Any]]:
    """The learner and the state to go on from: that of the checkpoint that was found, or a fresh one."""
    config, model = session.config, session.model
    schedule = make_schedule(
        config.lr_scheduler_type, config.learning_rate, config.warmup_updates(plan.updates), plan.updates
    )
    optimizer = session.optimizer(schedule)
    trained, frozen = session.load_trained()
    state = init_state(trained, optimizer, session.training)
    step = ModelStep(
        model, session.training, session.dtype, config.gradient_checkpointing, config.temperature
    )
    fits = lambda: micro_batches_for(step, data.tree, plan.P, plan.G)  # noqa: E731
    parts = config.micro_batches or hosts.of_first(fits)  # hosts may differ in memory
    if parts > 1:
        session.console.line(f"The update runs its {plan.P * plan.G} completions in {parts} micro-batches")
    step = dataclasses.replace(step, micro_batches=parts)
    objective = GrpoObjective(
        config.epsilon,
        config.epsilon if config.epsilon_high is None else config.epsilon_high,
        config.delta,
        config.beta,
        config.loss_type,
        config.importance_sampling_level,
        config.max_grpo_completion_length,
        config.top_entropy_quantile,
    )
    reference = None
    if config.beta:
        reference = frozen.base if frozen else session.load_params(dtype=session.dtype)
    update = make_update(step, optimizer, objective, state, frozen)
    # with a KL every row has a gradient, and a quantile is one of all rows' tokens
    all_rows = config.beta or config.top_entropy_quantile < 1
    sizes = () if all_rows else update_sizes(step, plan.P, plan.G)
    log.debug("Updates of %s prompts", " or ".join(map(str, (plan.P, *sizes))))
    learner = Learner(step, schedule, update, make_score(step), reference, frozen, sizes)
    meta = {"cursor": Cursor().to_json(), "num_tokens": 0, "source": str(session.folder.absolute())}
    meta["param_dtype"] = "float32" if frozen else config.param_dtype  # adapters are float32 always
    meta |= _machine()
    if frozen is not None:
        meta |= adapters_meta(frozen.config, session.model_name, session.dtype)
    if found is None:
        return learner, state, meta
    directory, number = found
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(step.layout, state),
    )
    with (
        Checkpoints(directory)
        if directory != checkpoints.directory
        else contextlib.nullcontext(checkpoints) as source
    ):
        check_resumable(source, number, meta)
        state, saved = source.restore(number, shapes)
    for name, value in _machine().items():
        if saved.get(name) != value:
            session.console.line(
                f"Warning: {name} was {saved.get(name)!r} when step {number} was saved and is {value!r} now; "
                "sums are then taken in another order, and the run may differ in the last bits"
            )
    session.timer.restore(saved.get("timings", {}))
    session.console.line(f"Continuing from the checkpoint of update {number} in {directory}")
    return learner, state, {**saved, **_machine(), "param_dtype": meta["param_dtype"]}


def _checkpoint_to_resume(config: Config, checkpoints: Checkpoints) -> tuple[Path, int] | None:
    """(folder, step) of the checkpoint that `resume_from_checkpoint` means; None for a fresh start."""
    wanted, newest = config.resume_from_checkpoint, checkpoints.latest()
    if wanted == "none" and newest is not None:
        raise ValueError(
            f"resume_from_checkpoint is none, but {checkpoints.directory} holds checkpoints; "
            "start over with --overwrite_output_dir, or choose another --output_dir"
        )
    if wanted in (None, "none"):
        return None if newest is None else (checkpoints.directory, newest)
    if not is_step_folder(wanted):
        raise ValueError(
            f"resume_from_checkpoint must be a step's folder (RUN/checkpoints/STEP), got {wanted}"
        )
    path = Path(wanted).absolute()
    if newest is not None and (path.parent, int(path.name)) != (checkpoints.directory, newest):
        raise ValueError(
            f"cannot resume from {path}: {checkpoints.directory} already holds step {newest}; "
            "choose another --output_dir, so that what was saved stays saved"
        )
    return path.parent, int(path.name)


def _machine() -> dict[str, Any]:
    """What decides the order of sums: resumes are bit for bit only where it is the same."""
    return {"threads": len(os.sched_getaffinity(0)), "xla_flags": os.environ.get("XLA_FLAGS", "")}


def _cold_start(session: Session, data: Prompts, greedy: Sampler, summary: dict[str, Any]) -> Session:
    """The session with the cold-started model in place of its own; fine-tunes unless that is done."""
    folder = Path(session.config.output_dir) / "cold_start"
    if not hosts.of_first(folder.exists):
        with session.timer("cold_start"):
            report = fine_tune(session, data, greedy, folder)
        session.console.line(
            f"Cold start: {report['steps']} updates on gold calls; GRPO starts from {folder}"
        )
        summary["cold_start"] = report
        _write_summary(session, summary)
    return dataclasses.replace(session, folder=folder, checkpoint=None, model_name=str(folder.absolute()))


class _Evaluation:
    """Evaluation on the test file, which is read at the first one and not before."""

    def __init__(self, session: Session, greedy: Sampler):
        self.session, self.greedy = session, greedy
        self.source = session.config.eval_dataset_id_or_path
        self._prompts: Prompts | None = None

    @property
    def possible(self) -> bool:
        """Whether there is a test file."""
        return self.source is not None

    def __call__(self, params: Any, title: str) -> dict[str, Any]:
        """The figures of rollout weights."""
        with self.session.timer("evaluate"):
            if self._prompts is None:
                self._prompts = load_prompts(self.session, self.source)
            summary = evaluate(self.session, self.greedy, params, self._prompts, title).summary
        value = summary["exact_answer_match"]
        self.session.console.line(f"{title}: exact_answer_match {value:.3f} on {summary['n']} rows")
        return summary


def _finish(
    session: Session,
    sampler: Sampler,
    learner: Learner,
    state: TrainState,
    evaluation: _Evaluation,
    summary: dict[str, Any],
) -> None:
    """Export, evaluate again, and write the summary."""
    out = Path(session.config.output_dir)
    with session.timer("save"):
        session.save_model(state.params, learner.frozen, out / "model", out / "adapter")
    summary["after"] = None
    if evaluation.possible:
        summary["after"] = evaluation(sampler.export(learner.params(state)), "Evaluation after")
        compare(session.console, {"before": summary["before"], "after": summary["after"]})
    _write_summary(session, summary)
    report = hosts.of_first(lambda: write_report(out))
    session.console.line(f"Finished: {int(state.step)} updates; the model is in {out / 'model'}")
    session.console.line(f"Curves and conversations: {report}")


def _write_summary(session: Session, summary: dict[str, Any]) -> None:
    path = Path(session.config.output_dir) / "summary.json"
    hosts.of_first(lambda: write_json_atomic(path, {**summary, "timings": session.timer.seconds}))


def _start_over(out: Path) -> None:
    for name in LEAVINGS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_inputs(session: Session) -> None:
    # the rows are read only when evaluating, which is too late to find that there is no file
    path = re.sub(r"\[[^\[\]]*\]$", "", session.config.eval_dataset_id_or_path or "")  # without its slice
    if path.endswith((".jsonl", ".json")) and not Path(path).expanduser().is_file():
        raise FileNotFoundError(
            f"eval_dataset_id_or_path: {path} does not exist; name a JSONL file, or leave the option out"
        )


def _say_plan(console: Console, plan: Plan, data: Prompts) -> None:
    tree = data.tree
    rest = max(len(tree.rest(p)) for p in data.ids) + 1
    console.line(
        f"Prefix tree: preamble {len(tree.preamble)} tokens once, {plan.P} prompts of up to {rest} tokens, "
        f"{plan.P} × {plan.G} completions of up to {tree.budget} tokens"
    )
    dropped = len(data.ids) - plan.P * plan.batches_per_epoch
    console.line(
        f"{len(data.ids)} rows, {plan.batches_per_epoch} batches an epoch"
        + (f" ({dropped} rows of each epoch's end are left out)" if dropped else "")
        + f", {plan.updates} updates in all"
    )


def _sampling(config: Config) -> Sampling:
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p or 0.0)


def _row_counter(bar) -> Callable[[int, int], None]:
    seen = 0

    def on_turn(finished: int, rows: int) -> None:
        nonlocal seen
        bar.advance(finished - seen)
        seen = finished

    return on_turn


def _save_due(config: Config, step: int, cursor: Cursor, done: bool, plan: Plan) -> bool:
    if config.save_strategy == "no":
        return False
    if done:
        return True
    if config.save_strategy == "epoch":
        return cursor.next_index == 0
    return _due(config.save_steps, step, plan)


def _due(every: int | None, step: int, plan: Plan) -> bool:
    """Whether this batch reached a multiple of `every`; several updates per batch may step over it."""
    return every is not None and step // every > (step - plan.updates_per_batch) // every


def _print_step(session: Session, step: int, plan: Plan, record, examples, trajectories) -> None:
    due = _due(session.config.logging_steps, step, plan) or step in (plan.updates_per_batch, plan.updates)
    if record["skipped"]:
        session.console.line(f"Warning: update {step} was skipped: its loss or gradient is not finite")
    if not due:
        return
    session.console.line(
        f"update {step}/{plan.updates}: reward {record['reward']:.3f} ± {record['reward_std']:.3f}, "
        f"length {record['completions/mean_length']:.1f}, loss {record['loss']:+.4f}, "
        f"entropy {record['entropy']:.3f}, {record['step_time']:.2f} s"
    )
    if session.config.log_completions:
        session.console.samples(trajectories, [e.answer for e in examples])


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    description = "Train a Qwen model with GRPO to call your Python functions."
    default = Path("configs/default.yaml")
    if not default.exists():  # outside of the repository
        default = Path(__file__).parents[1] / default
    return run_command("train", description, run, argv, default_config=str(default))


if __name__ == "__main__":
    sys.exit(main())
