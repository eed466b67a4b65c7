"""GRPO: sample groups of completions with their tool turns, score them, compare each with its group, update.

`GRPOTrainer.train` is the algorithm from the first batch to the finished model; `_learn` is its loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax import hosts
from grpo_jax.data.batches import Steps, choose_groups, cursor_after, next_batch
from grpo_jax.data.rows import read_prompt
from grpo_jax.files import plain
from grpo_jax.models.qwen import Params
from grpo_jax.models.sharding import placed
from grpo_jax.preflight.check import check_job
from grpo_jax.rollout.faults import faults
from grpo_jax.rollout.loop import ToolLoop, Work, make_policy, roll_out
from grpo_jax.run.checkpoint import Checkpoints, DamagedCheckpoint, Start, find_start
from grpo_jax.run.cold_start import cold_start_rows, fine_tune
from grpo_jax.run.compiling import watch_compiles
from grpo_jax.run.config import write_resolved
from grpo_jax.run.console import Console, note_dependencies, setup_logging
from grpo_jax.run.evaluation import compare, evaluate
from grpo_jax.run.fields import DEFAULT_TOOLS
from grpo_jax.run.inputs import check_compared_figure, check_context, check_gold_calls
from grpo_jax.run.job import (
    Job,
    credit_of,
    load_data,
    open_job,
    read_inputs,
    schedule_of,
    starting_over,
    steps_of,
)
from grpo_jax.run.learner import Learner, make_learner
from grpo_jax.run.lock import run_lock
from grpo_jax.run.log import PhaseTimer, Records, read_summary, write_json_atomic
from grpo_jax.run.model_card import write_model_card
from grpo_jax.run.options import GRPOConfig
from grpo_jax.run.progress import Progress, fresh_meta, print_steps, print_update, tried
from grpo_jax.run.remote import open_remote
from grpo_jax.run.report import write_missing_report, write_report
from grpo_jax.run.rules import check_no_evaluation_is_due, compares_evaluations
from grpo_jax.run.stopping import Best, Stopped, StopSignal, how_to_continue
from grpo_jax.run.trl_options import trainer_options
from grpo_jax.run.weights import source_of
from grpo_jax.scoring.advantages import batch_advantages, combine_rewards, group_std
from grpo_jax.scoring.evaluation import is_exact
from grpo_jax.scoring.metrics import FirstCalls, trajectory_metrics
from grpo_jax.scoring.rewards import RewardOutcome, TrainerState, joined
from grpo_jax.types import Example, Message, Trajectory
from grpo_jax.update.batch import make_batch, make_tree
from grpo_jax.update.update import Split, TrainState, place_batch, state_shardings

note_dependencies()


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The state of a run when `train` returns.

    Args:
        global_step: updates done.
        finished: False when it was asked to stop before its last update.
        metrics: the figures of summary.json.
    """

    global_step: int
    finished: bool
    metrics: dict[str, Any]


class GRPOTrainer:
    """Trains a model to call Python functions with GRPO; the keyword names are TRL's.

    Args:
        model: hub id, HF folder, a checkpoint's folder, or "scratch" for a new small model.
        reward_funcs: one reward, or several: functions, and names of built-in rewards.
        args: every other option; see `GRPOConfig`.
        train_dataset: path or name of a data set, a list of dicts, or a `datasets.Dataset`.
        eval_dataset: the same, for the evaluations.
        tools: the functions that the model may call.
        console: where it prints.
        **trl: other keywords of TRL's trainer: `peft_config` and `processing_class` set their options, and
            the rest is refused or has no effect.

    Arguments that are left out are taken from `args`. Everything is loaded and checked here, before
    anything compiles.

    Raises:
        ValueError, TypeError, FileNotFoundError: bad input; says the rule, the offending value and the fix.

    Example:
        trainer = GRPOTrainer("scratch", exact, GRPOConfig(output_dir="runs/mine"), rows, tools=[add])
        trainer.train()
        trainer.generate("What is 15 plus 27?")
    """

    def __init__(
        self,
        model: str | None = None,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tools: Sequence[Callable] | None = None,
        console: Console | None = None,
        **trl: Any,
    ):
        config = GRPOConfig() if args is None else args
        if not isinstance(config, GRPOConfig):
            raise TypeError(f"args must be a GRPOConfig of grpo_jax, got {type(args).__name__}")
        if trl:
            config = dataclasses.replace(config, **trainer_options(trl))
        if model is not None:
            config = dataclasses.replace(config, model_name_or_path=str(model))
        config = config.with_absolute_paths()  # code of the user may change the working directory
        self.remote = open_remote(config.output_dir, config.report_to)
        if self.remote is not None:
            config = config.with_output_dir(str(self.remote.folder))
        console, timer = console or Console(), PhaseTimer()
        setup_logging(console, config.log_level)
        self.output_dir = Path(config.output_dir)
        self._current: tuple[Learner, TrainState] | None = None
        self._best = Best(config.early_stop_metric)
        by_options = config.tools_script or config.tool_functions_module != DEFAULT_TOOLS
        if tools is None and not by_options and (train_dataset is not None or reward_funcs is not None):
            raise ValueError("tools must be a list with at least one function, got None")
        train = config.required("dataset_id_or_path") if train_dataset is None else train_dataset
        evaluation = config.eval_dataset_id_or_path if eval_dataset is None else eval_dataset
        inputs = read_inputs(config, train, evaluation, tools, reward_funcs)  # before anything is written
        if inputs.evaluation is None:
            check_no_evaluation_is_due(config)
        with run_lock(self.output_dir, "grpo_jax.train"), watch_compiles(console, timer):
            if self.remote is not None:
                console.line(self.remote.fetch(empty=config.overwrite_output_dir))
            lost = "a fine-tuned model (sft.json, model/), which training would replace"
            with starting_over(config, ("sft.json",), lost):
                self.job = open_job(config, console, timer, inputs)  # writes a new model into base_model
                weakref.finalize(self, self.job.runner.close)
                self.data = load_data(self.job, inputs.train)
                asked = inputs.evaluation
                self.evaluation = None if asked is None else load_data(self.job, asked)
                if self.evaluation is not None:
                    prompts, functions = self.evaluation.prompts, self.job.toolbox.functions
                    check_gold_calls(prompts, functions)
                    if compares_evaluations(config):
                        check_compared_figure(prompts, functions, config.early_stop_metric)
                if not config.check:  # a check gives its hints first
                    self._check_steps()

    def _check_steps(self) -> None:
        """Whether data, batches, schedule, micro-batches and hosts fit; raises ValueError."""
        config, steps = self.job.config, self.steps
        schedule_of(config, steps.updates)
        if config.micro_batches:
            Split.of(steps.P, steps.G, config.micro_batches)
        hosts.share(range(steps.P))

    @property
    def _learner_and_state(self) -> tuple[Learner, TrainState]:
        """What updates the policy, and the state so far; made by `_run`."""
        assert self._current is not None
        return self._current

    @functools.cached_property
    def steps(self) -> Steps:
        """The batches and updates of the run."""
        return steps_of(self.job.config, len(self.data.prompts), self.job.row_devices)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainResult:
        """Train to the run's last update and export the model.

        A run that was interrupted continues from its newest checkpoint; a finished one returns its figures.

        Args:
            resume_from_checkpoint: as the option of this name; the option where it is None or, as in TRL, a bool.
        """
        if isinstance(resume_from_checkpoint, str | Path):
            given = dataclasses.replace(self.job.config, resume_from_checkpoint=str(resume_from_checkpoint))
            self.job = dataclasses.replace(self.job, config=given)
        job, config, out, line = self.job, self.job.config, self.output_dir, self.job.console.line
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_lock(out, "grpo_jax.train"))
            stack.enter_context(watch_compiles(job.console, job.timer))
            summary = hosts.of_first(lambda: read_summary(out))
            job.timer.restore(summary.get("timings", {}))
            if config.cold_start and not hosts.of_first((out / "cold_start").exists):
                cold_start_rows(job, self.data)  # called for its errors, before anything compiles
            print_steps(job.console, self.steps, self.data)
            checkpoints = stack.enter_context(
                Checkpoints(out / "checkpoints", keep=config.save_total_limit, publish=self._publish)
            )
            start = self._found_start(checkpoints, summary)
            if start.finished is not None:
                line(
                    f"The run in {out} is finished after {start.finished} updates (summary.json, model/). A higher "
                    f"{'--early_stop_patience' if 'stopped_early' in summary else '--max_steps or --num_train_epochs'} "
                    "continues it, --overwrite_output_dir starts over, another --output_dir keeps both."
                )
                hosts.of_first(lambda: write_missing_report(out))
                self.job = dataclasses.replace(job, folder=out / "model", checkpoint=None, adapter=None)
                return TrainResult(start.finished, True, summary)
            for name in ("after", "stopped_early"):
                summary.pop(name, None)
            hosts.of_first(lambda: write_resolved(config, out / "resolved_config.yaml"))
            try:
                with StopSignal() as stop:
                    return self._run(start, summary, checkpoints, stop)
            except Stopped as stopped:
                step = 0 if self._current is None else int(self._current[1].step)
                self._write_summary(summary)
                if step:  # where a machine is taken away, drawing would take as long as all else of a stop
                    hosts.of_first(lambda: None if stop.hurry else write_report(out))
                self._publish()
                line(f"Stopped {stopped}. {how_to_continue(config.overwrite_output_dir)}")
                return TrainResult(step, False, summary)

    def _found_start(self, checkpoints: Checkpoints, summary: dict[str, Any]) -> Start:
        """See `find_start`; a damaged newest checkpoint is set aside."""
        config, line = self.job.config, self.job.console.line
        wanted, allowed = config.resume_from_checkpoint, config.allow_config_change
        source, name = self._shown(self.job.folder.absolute()), self.job.model_name
        if config.cold_start:
            source = name = self._shown((self.output_dir / "cold_start").absolute())
        fresh = fresh_meta(self.job, self.data.prompts, self.steps, source, name)
        while True:
            try:
                start = find_start(checkpoints, wanted, summary, fresh, allowed)
            except DamagedCheckpoint as error:
                line(checkpoints.set_aside(error))
                continue
            for note in start.notes:
                line(note)
            return start

    def _run(
        self, start: Start, summary: dict[str, Any], checkpoints: Checkpoints, stop: StopSignal
    ) -> TrainResult:
        """Cold start, learn, finish; raises Stopped where it is asked to stop."""
        job, config, out, line = self.job, self.job.config, self.output_dir, self.job.console.line
        if config.cold_start:
            job = self.job = self._cold_started(summary, stop, start.meta)
        learner = make_learner(job, self.data.tree, self.steps.P, self.steps.updates)
        shardings = state_shardings(learner.forward.layout, learner.shapes)
        while start.checkpoint is not None:
            try:
                state = start.restore(checkpoints, learner.shapes, shardings)
            except DamagedCheckpoint as error:
                line(checkpoints.set_aside(error))
                start = self._found_start(checkpoints, summary)
                continue
            job.timer.restore(start.meta.get("timings", {}))
            line(f"Continuing from the checkpoint of update {start.checkpoint[1]} in {start.checkpoint[0]}")
            break
        else:
            state = learner.fresh()
        self._current = learner, state
        if "before" not in summary and self.evaluation is not None:
            summary["before"] = self._evaluated("Evaluation before", "before", stop)
            self._write_summary(summary)
        self._learn(start.meta, checkpoints, stop)
        step = int(self._learner_and_state[1].step)
        self.save_model(out / "model", out / "adapter")
        found: dict[str, Any] = {"after": None, "updates": step}
        if step < self.steps.updates:
            found["stopped_early"] = self._best.waited
        if self.evaluation is not None:
            # without checkpoints, stopping here would lose the whole training
            found["after"] = self._evaluated(
                "Evaluation after", "after", None if config.save_strategy == "no" else stop
            )
            compare(job.console, {"before": summary["before"], "after": found["after"]})
        checkpoints.wait()  # before summary.json says that the run is finished
        summary |= found
        self._write_summary(summary)
        self._write_card(out / "model")  # again, now with the figures
        report = hosts.of_first(lambda: write_report(out))
        self._publish()
        line(f"Finished: {step} updates; the model is in {self._shown(out / 'model')}")
        line(f"Curves and conversations: {self._shown(report)}")
        return TrainResult(step, True, summary)

    def _learn(self, meta: dict[str, Any], checkpoints: Checkpoints, stop: StopSignal) -> None:
        """The GRPO loop, from the current state. When asked to stop, it saves a checkpoint and raises Stopped."""
        job, data, steps, config, timer = self.job, self.data, self.steps, self.job.config, self.job.timer
        learner, state = self._learner_and_state
        loop, line = job.tool_loop(job.sampled, data.tree), job.console.line
        first, per_batch = int(state.step), steps.updates_per_batch
        step = first
        unevaluated = meta.pop("unevaluated", None)  # the record of a step that was stopped in its evaluation
        # its line in metrics.jsonl is written again
        records = Records(config, resume_step=first - (unevaluated is not None) if first else None)
        rated = len(data.prompts) if config.difficulty_sampling else None
        progress = Progress.from_meta(meta, config.early_stop_metric, checkpoints.steps(), rated)
        checkpoints.keep_best(progress.best.step)
        first_calls = FirstCalls(batches=min(3, steps.batches))
        every = {
            event: config.interval(event, steps.updates, steps.updates_per_epoch)
            for event in ("eval", "save", "logging")
        }

        def due(event: str) -> bool:
            """Whether the batch, whose updates may step over a multiple of the interval, reached one."""
            n = every[event]
            return n is not None and step // n > (step - per_batch) // n

        def save(**found: Any) -> None:
            """A checkpoint; raises OutputError where it cannot be written. That the last could not is a warning."""
            saved = meta | progress.to_meta() | found | {"timings": timer.seconds}
            tried(line, checkpoints.wait)
            with timer("save"):
                checkpoints.save(step, state, saved)

        def stopped(**found: Any) -> Stopped:
            """What to raise, with what was learned since the last checkpoint saved."""
            tried(line, checkpoints.wait)  # or the newest is one that could not be written
            if step > (checkpoints.latest() or 0):
                save(**found)
            checkpoints.wait()
            return Stopped(f"after update {step}, which is saved" if step else "before the first update")

        def evaluated(record: dict[str, Any]) -> dict[str, Any]:
            """The record with an evaluation's figures; one that is interrupted is repeated when the run continues."""
            nonlocal progress
            try:
                figures = self._evaluated(f"Evaluation at {step}", f"step_{step:06d}", stop)
            except Stopped:
                raise stopped(unevaluated=plain(record)) from None
            if compares_evaluations(config):
                best = progress.best.after(step, figures[progress.best.figure])
                progress = dataclasses.replace(progress, best=best)
            return record | {f"eval/{k}": v for k, v in figures.items() if isinstance(v, float | int)}

        with records, job.console.progress("GRPO", steps.batches) as bar:
            bar.advance(first // per_batch)
            if unevaluated is not None:
                records.write_metrics(step, evaluated(unevaluated))
                checkpoints.keep_best(progress.best.step)
            for _ in range(first // per_batch, steps.batches):
                if (best := progress.best).ends(config.early_stop_patience):
                    line(
                        f"Stopping early: in {best.waited} evaluations {best.figure} was not above "
                        f"{best.value:.3f}, that at update {best.step}"
                    )
                    break
                began = time.perf_counter()

                # Roll out G completions of each of the next P prompts, with the tools that they call, and score them.
                groups = self._next_groups(learner, state, loop, progress, stop)
                if groups is None:  # asked to stop; a later run samples the same tokens
                    raise stopped()

                # Compare each completion with its group.
                groups = groups.with_advantages(job)
                if job.purity is not None:  # while what follows runs, which needs no tools
                    job.purity.start(call for t in hosts.share(groups.trajectories) for call in t.calls)

                # Update the policy on the batch.
                state, metrics = self._update(learner, state, groups.batch)
                self._current, step, progress = (learner, state), int(state.step), groups.progress

                # Record; evaluate when due.
                record = self._record(learner, state, groups, metrics) | {
                    "step_time": time.perf_counter() - began
                }
                records.write_rollouts(step, groups.trajectories, job.reward_names, groups.outcome.extras)
                last = step >= steps.updates
                # `_run` evaluates the final model; the last update is evaluated here only to be compared with earlier ones
                if self.evaluation is not None and (compares_evaluations(config) if last else due("eval")):
                    record = evaluated(record)
                done = last or progress.best.ends(config.early_stop_patience)
                records.write_metrics(step, record)
                bar.advance(1, reward=record["reward"], spread=record["reward_std"])
                if hint := first_calls.hint(groups.trajectories):
                    line(hint)
                if record["skipped"]:
                    line(f"Warning: update {step} was skipped: its loss or gradient is not finite")
                if due("logging") or step == per_batch or done:
                    print_update(job, steps, step, record, groups.trajectories)

                # Save and stop when due. Several hosts stop in the same rollout.
                tried(line, checkpoints.check)
                checkpoints.keep_best(progress.best.step)
                if done and config.save_strategy != "no":
                    save()
                elif due("save") or step == progress.best.step:
                    tried(line, save)
                if stop.requested and hosts.alone() and not done:
                    raise stopped()

        self._best = best = progress.best
        if config.load_best_model_at_end and best.step not in (0, step):
            params = placed(state.params, state_shardings(learner.forward.layout, state).params)
            params = checkpoints.restore_params(best.step, params)
            self._current = learner, dataclasses.replace(state, params=params)
            line(f"The model is that of update {best.step}: {best.figure} {best.value:.3f} is the best")

    def _update(
        self, learner: Learner, state: TrainState, trajectories: list[Trajectory]
    ) -> tuple[TrainState, dict[str, float]]:
        """The state after the updates on one batch, and their metrics."""
        config, steps = self.job.config, self.steps
        with self.job.timer("update"):
            masked = config.mask_truncated_completions
            batch = make_batch(
                self.data.tree, trajectories, steps.G, mask_truncated=masked, sizes=learner.sizes
            )
            batch = place_batch(learner.forward.layout, batch)
            if learner.reference is not None:
                batch = batch.with_logprobs(ref_logprobs=learner.score(learner.reference, batch))
            if steps.updates_per_batch > 1:  # else the policy that is differentiated is the one that sampled
                batch = batch.with_logprobs(old_logprobs=learner.score(learner.params(state), batch))
            for _ in range(steps.updates_per_batch):
                state, metrics = learner.update(state, batch)
            return state, {name: float(value) for name, value in jax.device_get(metrics).items()}

    def _record(
        self, learner: Learner, state: TrainState, groups: Groups, metrics: dict[str, float]
    ) -> dict[str, Any]:
        """The line of an update in metrics.jsonl, of all completions that were rolled out for it."""
        job = self.job
        rewards = combine_rewards(groups.outcome.means, job.reward_weights)
        record = {
            **trajectory_metrics(
                groups.trajectories, rewards, group_std(rewards, self.steps.G), job.reward_names
            ),
            **groups.outcome.metrics,
            **metrics,
            "learning_rate": float(learner.schedule(int(state.step) - 1)),
            "epoch": self._epoch(groups.progress),
            "num_tokens": groups.progress.num_tokens,
            **groups.metrics,
        }
        if job.purity is not None:
            record["tools/impure"] = sum(hosts.gather(job.purity.finish))
        return record

    def _epoch(self, progress: Progress) -> float:
        """Passes over the data done."""
        return progress.cursor.epoch + progress.cursor.next_index / len(self.data.prompts)

    def _next_groups(
        self, learner: Learner, state: TrainState, loop: ToolLoop, progress: Progress, stop: StopSignal
    ) -> Groups | None:
        """Roll out the next P prompts and score their completions; None where a host was asked to stop.

        The order of prompts is that of seed and epoch, or with difficulty_sampling by how often they are solved.
        With dynamic_sampling more prompts follow, until P groups have an advantage, and those after the last one
        that the batch needs are drawn again.
        """
        job, data, steps, config, timer = self.job, self.data, self.steps, self.job.config, self.job.timer
        trainer_state = TrainerState(
            global_step=int(state.step),
            max_steps=steps.updates,
            epoch=self._epoch(progress),
            num_train_epochs=steps.batches / steps.batches_per_epoch,
        )
        with timer("rollout"):
            policy = make_policy(loop, job.sampled.export(learner.params(state)))
        cursor, rates, delays = progress.cursor, progress.rates, progress.delays
        drawn, trajectories, work, outcomes, useful = [], [], Work(), [], []
        rounds = config.dynamic_sampling_max_rounds if config.dynamic_sampling else 1
        while len(outcomes) < rounds and sum(useful) < steps.P:
            draws, cursor = next_batch(
                len(data.prompts), steps.P, cursor, config.seed, config.shuffle_dataset
            )
            if rates is not None:
                draws = rates.draw(draws, config.seed, config.difficulty_floor)
            prompts = [dataclasses.replace(data.prompts[i], draw=draw) for i, draw in draws]
            with timer("rollout"), job.console.progress("Rollout", steps.P * steps.G) as rows:
                sampled = roll_out(
                    dataclasses.replace(loop, delays=delays.steps),
                    policy,
                    prompts,
                    generations=steps.G,
                    seed=config.seed,
                    on_progress=rows.advance,
                    stop=lambda: stop.requested,
                )
            if sampled.interrupted:
                return None
            delays = delays.after(sampled)
            with timer("reward"):
                outcomes.append(job.score_all(sampled.trajectories, trainer_state))
                drawn, trajectories = drawn + draws, trajectories + sampled.trajectories
                work += sampled.work
                if config.dynamic_sampling:
                    compared = with_advantages(job, sampled.trajectories, outcomes[-1])
                    has = [t.has_advantage for t in compared]
                    useful += [any(has[i : i + steps.G]) for i in range(0, len(has), steps.G)]
            if rates is not None:
                rates = rates.after([i for i, _ in draws], list(map(is_exact, sampled.trajectories)))
        chosen = np.arange(steps.P)
        metrics = {
            "rollout/wasted_decode": work.wasted,
            "rollout/tokens_per_pass": work.tokens_per_pass or 0.0,
        }
        if config.dynamic_sampling:
            chosen = choose_groups(np.array(useful), steps.P)
            if sum(useful) >= steps.P:
                cursor = cursor_after(drawn[chosen[-1]][1], len(data.prompts), steps.P)
            wasted = 1 - np.array(useful)[chosen].sum() / len(useful)
            metrics |= {"rollout/rounds": len(outcomes), "rollout/wasted_groups": wasted}
        outcome = joined(outcomes)
        scored = [
            dataclasses.replace(t, rewards=tuple(values))
            for t, values in zip(trajectories, outcome.means.tolist(), strict=True)
        ]
        tokens = sum(len(t.prompt.ids) + len(t.completion_ids) for t in scored)
        after = Progress(cursor, progress.num_tokens + tokens, progress.best, rates, delays)
        rows = (chosen[:, None] * steps.G + np.arange(steps.G)).reshape(-1)
        return Groups(scored, outcome, rows, after, metrics)

    def check(self) -> bool:
        """Print what the run would learn from, as `--check` does; False when no right answer would be rewarded."""
        passed = check_job(self.job, self.data, self.evaluation) == 0
        self._check_steps()
        print_steps(self.job.console, self.steps, self.data)
        return passed

    def evaluate(self) -> dict[str, Any]:
        """The figures of a greedy evaluation on `eval_dataset`, with their intervals; its conversations are in
        evaluation/evaluate.jsonl of output_dir.

        Raises:
            ValueError: there is no evaluation data set.
        """
        with watch_compiles(self.job.console, self.job.timer):
            return self._evaluated("Evaluation", "evaluate")

    def generate(self, prompt: str | list[Message]) -> list[Message]:
        """A whole conversation with tools, sampled greedily.

        Args:
            prompt: the user's text, or chat messages.

        Returns:
            The prompt's messages and those that follow: assistant turns, tool calls and their results.

        Raises:
            ValueError: it is no prompt, or with its completion longer than the model's positions.
        """
        messages = read_prompt(prompt)
        asked = self.job.prompt(Example(messages, "", source="prompt"))
        check_context([asked], self.data.tree.budget, self.job.model.positions)
        shared = self.data.tree.preamble
        tree = make_tree([asked.ids, [*shared, *asked.ids[-1:]]], self.data.tree.budget, self.job.row_devices)
        loop = self.job.tool_loop(self.job.greedy, tree)
        with watch_compiles(self.job.console, self.job.timer):
            rollout = roll_out(loop, make_policy(loop, self._weights()), [asked])
        return messages + rollout.trajectories[0].messages

    def save_model(self, folder: str | Path | None = None, adapter: str | Path | None = None) -> None:
        """Write the model as an HF folder, adapters merged.

        Args:
            folder: of the model; None for "model" in output_dir. Other files in it stay.
            adapter: PEFT folder for the adapters alone; left out where there are none.
        """
        folder = self.output_dir / "model" if folder is None else Path(folder)
        if self._current is None:
            trained, frozen = self.job.load_trained()
        else:
            trained, frozen = self._current[1].params, self._current[0].frozen
        with self.job.timer("save"):
            self.job.save_model(trained, frozen, folder, None if adapter is None else Path(adapter))
        self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        updates = 0 if self._current is None else int(self._current[1].step)
        hosts.of_first(lambda: write_model_card(folder, self.output_dir, updates))

    def _weights(self) -> Params:
        """Rollout weights of the policy as it is now."""
        if self._current is None:
            return self.job.greedy.export(self.job.load_params())
        learner, state = self._current
        return self.job.greedy.export(learner.params(state))

    def _evaluated(self, title: str, name: str, stop: StopSignal | None = None) -> dict[str, Any]:
        if self.evaluation is None:
            raise ValueError("evaluate needs eval_dataset, got none; give it to GRPOTrainer")
        asked = (lambda: False) if stop is None else (lambda: stop.requested)
        with self.job.timer("evaluate"):
            made = evaluate(self.job, self._weights(), self.evaluation, title, stop=asked, name=name)
        summary, figures = made.summary, ("exact_answer_match", "answer_grounded", "turn_closed")
        shown = (f"{of} {'–' if summary[of] is None else format(summary[of], '.3f')}" for of in figures)
        self.job.console.line(f"{title}: {', '.join(shown)} on {summary['n']} rows")
        return summary

    def _cold_started(self, summary: dict[str, Any], stop: StopSignal, meta: dict[str, Any]) -> Job:
        """The job with the cold-started model in place of its own; fine-tunes unless that is done.

        Args:
            meta: of the start; a run that began from another one's checkpoint has that one's cold start.
        """
        job, folder = self.job, self.output_dir / "cold_start"
        if "origin" in meta:
            folder = source_of(meta, Path(meta["origin"]).parent.parent)

        def note(report: dict[str, Any]) -> None:
            """Written before the folder appears, which means that the cold start is done."""
            summary["cold_start"] = report
            self._write_summary(summary)

        if not hosts.of_first(folder.exists):
            with job.timer("cold_start"):
                report = fine_tune(job, self.data, folder, None, lambda: stop.requested, note)
            self._publish()
            job.console.line(
                f"Cold start: {report['steps']} updates on gold calls; GRPO starts from {self._shown(folder)}"
            )
        name = self._shown(folder.absolute())
        return dataclasses.replace(job, folder=folder, checkpoint=None, adapter=None, model_name=name)

    def _publish(self) -> None:
        """Upload output_dir where it is a URL; called before a line says that something is saved."""
        if self.remote is not None:
            self.remote.publish()

    def _shown(self, path: Path) -> str:
        """A path of the run, in the store where output_dir is a URL: the local folder may be another next time."""
        return str(path) if self.remote is None else self.remote.shown(path)

    def _write_summary(self, summary: dict[str, Any]) -> None:
        path, job = self.output_dir / "summary.json", self.job
        names = {"tools": list(job.toolbox.functions), "rewards": [reward.name for reward in job.rewards]}
        hosts.of_first(lambda: write_json_atomic(path, {**summary, **names, "timings": job.timer.seconds}))


@dataclasses.dataclass(frozen=True)
class Groups:
    """Scored completions, the G of a prompt next to each other, and which of them make the next batch.

    Args:
        trajectories: of all groups, with their rewards.
        outcome: what the rewards said of them.
        rows: [P·G] indices of the completions in the batch, rising.
        progress: of the run after the batch.
        metrics: of the rollout.
    """

    trajectories: list[Trajectory]
    outcome: RewardOutcome
    rows: np.ndarray
    progress: Progress
    metrics: dict[str, float]

    @property
    def batch(self) -> list[Trajectory]:
        """The P·G completions in the batch."""
        return [self.trajectories[i] for i in self.rows]

    def with_advantages(self, job: Job) -> Groups:
        """The completions in the batch compared with their groups."""
        trajectories = list(self.trajectories)
        compared = with_advantages(job, self.batch, self.outcome.of_rows(self.rows))
        for i, t in zip(self.rows, compared, strict=True):
            trajectories[i] = t
        return dataclasses.replace(self, trajectories=trajectories)


def with_advantages(job: Job, trajectories: Sequence[Trajectory], outcome: RewardOutcome) -> list[Trajectory]:
    """The completions with their advantages: one for each, and one per token where turns are rewarded or bad calls
    penalised."""
    config, credit, G = job.config, credit_of(job.config), job.config.num_generations
    advantages = batch_advantages(
        outcome.values,
        job.reward_weights,
        G,
        scale=config.scale_rewards,
        aggregation=config.multi_objective_aggregation,
        estimator=config.advantage_estimator,
    )
    compared = [
        dataclasses.replace(t, advantage=a) for t, a in zip(trajectories, advantages.tolist(), strict=True)
    ]
    if not (outcome.turns or credit.penalises):
        return compared
    wrong = [faults(t, job.conversation) if credit.penalises else [] for t in compared]
    return credit.of_tokens(compared, G, outcome.turn_rewards(job.reward_weights), wrong)
