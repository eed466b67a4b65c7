"""Cold start on gold calls.

Supervised fine-tuning on the same prefix tree, with the same update, as GRPO: a
gold row is a trajectory whose turns were written instead of sampled. It ends by
a rule: a validation slice at the end of the training rows is evaluated greedily
every few updates until its exact_answer_match reaches `sft_stop_match` and its answer_grounded
`sft_stop_grounded`, four times as often once half of that is reached: a small model learns the second
half in a few updates. With `sft_stop_reward` the slice is sampled, as GRPO will, until its mean reward reaches that.
A completion of the slice may be twice as long as the longest gold conversation,
so that a model that does not end its turns yet does not hold training up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax import hosts
from grpo_jax.data.batches import Cursor, next_batch
from grpo_jax.data.gold import failed_call, gold_calls, run_gold_calls, show_call
from grpo_jax.models.lora import Frozen, join
from grpo_jax.models.qwen import Params
from grpo_jax.models.sharding import placed
from grpo_jax.rollout.conversation import Conversation
from grpo_jax.rollout.loop import answer_text, answered, make_policy
from grpo_jax.rollout.parsing import assistant_message
from grpo_jax.run.checkpoint import Checkpoints
from grpo_jax.run.evaluation import completions, evaluate
from grpo_jax.run.inputs import check_gold_calls, check_stop_rule
from grpo_jax.run.job import DataSet, Job, optimizer_of
from grpo_jax.run.progress import tried
from grpo_jax.run.stopping import Stopped
from grpo_jax.scoring.advantages import combine_rewards
from grpo_jax.scoring.evaluation import summarize
from grpo_jax.scoring.rewards import TrainerState, same_answer
from grpo_jax.types import Message, ParsedTurn, Prompt, Status, ToolCall, ToolResult, Trajectory
from grpo_jax.update.batch import make_batch, make_tree
from grpo_jax.update.schedules import make_schedule
from grpo_jax.update.update import (
    ModelStep,
    TrainState,
    init_state,
    make_update,
    place_batch,
    sft_objective,
    state_shardings,
    turns_objective,
)

VALIDATION_LENGTHS = 2  # of the longest gold conversation: as long may a completion of the validation be
WARMUP = 10  # updates; AdamW's second moment is not reliable before
SAVED = "_checkpoint"  # after the folder's name: what a cold start that has not ended leaves
# What the result depends on, in addition to the gold conversations and the model.
OPTIONS = (
    "sft_", "adam_", "weight_decay", "max_grad_norm", "seed", "dtype", "param_dtype", "optim", "use_peft", "use_rslora", "lora_",
)  # fmt: skip


def fine_tune(
    job: Job,
    data: DataSet,
    folder: Path,
    adapter: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    before_saving: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Fine-tune on gold calls until the validation rule holds, and write an HF folder.

    With `use_peft` adapters are trained here too, and merged into the folder that is written:
    a run that starts from it, such as GRPO, has new adapters. Until it is done there is a checkpoint next to the
    folder, of the moment at which it was asked to stop or of every `save_steps` updates, from which the next call
    with the same options and data continues bit for bit.

    Args:
        data: the training rows; the last `sft_validation_size` of them are held out.
        adapter: PEFT folder to write if adapters were trained.
        stop: whether this host was asked to stop; asked before every update and in the validation.
        before_saving: gets what is returned, before the folder appears.

    Returns:
        {"steps", "validation"}: updates done and the last validation's figures.

    Raises:
        ValueError: see `cold_start_rows`; too few rows whose gold calls run, or a gold conversation over
            the budget; raised before anything is compiled.
        ValueError: the checkpoint of a stopped cold start cannot be read.
        Stopped: some host was asked to stop.
    """
    config = dataclasses.replace(job.config, eval_samples=None)  # the rule looks at greedy completions
    job = dataclasses.replace(job, config=config)
    train, held_out = cold_start_rows(job, data)
    if missing := len(data.prompts) - len(train.prompts) - len(held_out.prompts):
        job.console.line(
            f"Fine-tuning leaves out {missing} of {len(data.prompts)} rows, which have no gold call"
        )
    train, gold = _with_gold(job, train)
    limit = VALIDATION_LENGTHS * max(len(trajectory.completion_ids) for trajectory in gold)
    update, state, frozen = _update_and_state(job)
    digest, line, saved = _digest(job, gold), job.console.line, folder.with_name(folder.name + SAVED)
    state, progress = _continued(job, saved, digest, state)
    save_steps = config.interval("save", config.sft_max_steps, len(gold) // config.sft_batch_size)
    clock = [time.perf_counter()]  # when updates and validations began, in turn
    with (
        Checkpoints(saved, keep=1) as checkpoints,
        job.console.progress("Cold start", config.sft_max_steps) as bar,
    ):

        def save() -> None:
            if progress.done > (checkpoints.latest() or 0):
                checkpoints.save(progress.done, state, {"at": dataclasses.asdict(progress), "of": digest})

        if progress.done:
            line(f"Continuing the cold start after its update {progress.done}")
            bar.advance(progress.done)
        while True:
            try:
                if hosts.agree([stop()]).any():
                    raise Stopped
                if progress.validate:
                    clock.append(time.perf_counter())
                    params = job.greedy.export(join(state.params, frozen))
                    report = _validation(job, params, held_out, limit, stop)
                    clock.append(time.perf_counter())
                    progress = _after_validation(job, progress, report, clock[-3:])
                    if progress.ended:
                        break
            except Stopped:
                tried(line, checkpoints.wait)
                save()
                checkpoints.wait()
                saved_at = f"after its update {progress.done}, which is saved"
                raise Stopped(
                    f"in the cold start, {saved_at if progress.done else 'before it began'}"
                ) from None
            draws, cursor = next_batch(len(gold), config.sft_batch_size, progress.cursor, config.seed)
            batch = make_batch(train.tree, [gold[i] for i, _ in draws], generations=1)
            state, metrics = update(state, place_batch(job.training, batch))
            progress = progress.after(cursor, float(metrics["loss"]), config.sft_max_steps)
            bar.advance(1, loss=progress.loss)
            if save_steps and progress.done % save_steps == 0:
                tried(line, save)
    found = {"steps": progress.done, "validation": report}
    before_saving(found)
    job.save_model(state.params, frozen, folder, adapter)
    hosts.of_first(lambda: shutil.rmtree(saved, ignore_errors=True))
    return found


@dataclasses.dataclass(frozen=True)
class _Progress:
    """Where a cold start is; part of its checkpoint.

    Args:
        every: updates between validations.
        cursor: place in the data of the next batch.
        ended: the last validation was the end.
    """

    every: int
    done: int = 0
    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    validate: bool = False
    ended: bool = False
    loss: float = 0.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> _Progress:
        """The inverse of `dataclasses.asdict`."""
        return cls(**dict(values, cursor=Cursor.from_json(values["cursor"])))

    def after(self, cursor: Cursor, loss: float, last: int) -> _Progress:
        """After one more update, of which `last` is the last."""
        done = self.done + 1
        return _Progress(self.every, done, cursor, done % self.every == 0 or done == last, loss=loss)


def _update_and_state(job: Job) -> tuple[Callable, TrainState, Frozen | None]:
    """The jitted update, the state before the first one, and the base under trained adapters."""
    config = job.config
    schedule = make_schedule("constant_with_warmup", config.sft_learning_rate, WARMUP, config.sft_max_steps)
    optimizer = optimizer_of(config, schedule)
    trained, frozen = job.load_trained()
    state = init_state(trained, optimizer, job.training)
    step = ModelStep(job.model, job.training, job.dtype, remat=config.gradient_checkpointing)
    objective = turns_objective if config.sft_weights == "turns" else sft_objective
    return make_update(step, optimizer, objective, state, frozen), state, frozen


def _continued(job: Job, saved: Path, digest: str, fresh: TrainState) -> tuple[TrainState, _Progress]:
    """What the same cold start left when it was stopped; the fresh state, and an empty folder, where it did not."""
    if saved.exists():
        with Checkpoints(saved) as checkpoints:
            try:
                last = checkpoints.latest()
                if last is not None and checkpoints.meta(last)["of"] == digest:
                    target = placed(fresh, state_shardings(job.training, fresh))
                    state, meta = checkpoints.restore(last, target)
                    return state, _Progress.from_json(meta["at"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"the cold start cannot continue from {saved}: the checkpoint there is damaged, or an earlier version "
                    "of grpo_jax wrote it; delete that folder to begin the cold start again"
                ) from error
    hosts.of_first(lambda: shutil.rmtree(saved, ignore_errors=True))
    return fresh, _Progress(job.config.sft_eval_steps)


def _after_validation(
    job: Job, progress: _Progress, report: dict[str, Any], clock: Sequence[float]
) -> _Progress:
    """Print a validation, and decide whether it was the last and how soon the next one comes.

    Args:
        clock: when the updates before it began, when it began and when it ended, in seconds.
    """
    config = job.config
    if config.sft_stop_reward is None:
        rule = {"exact_answer_match": config.sft_stop_match}
    else:
        rule = {"reward": config.sft_stop_reward}
    rule["answer_grounded"] = config.sft_stop_grounded

    def reached(share: float) -> bool:  # a figure that is None counts as 0
        return all((report[name] or 0.0) >= least * share for name, least in rule.items())

    shown = ", ".join(f"{name} {report[name] or 0.0:.3f}" for name in rule)
    job.console.line(f"cold start {progress.done}: loss {progress.loss:.3f}, validation {shown}")
    trained, validated = clock[1] - clock[0], clock[2] - clock[1]
    if progress.done > config.sft_eval_steps and validated > trained:  # the first compiles
        job.console.line(
            f"Validation took {validated:.0f} s, the updates before it {trained:.0f} s; a larger "
            "sft_eval_steps or a smaller sft_validation_size makes that less"
        )
    sooner = max(1, config.sft_eval_steps // 4) if reached(0.5) else progress.every
    ended = reached(1.0) or progress.done == config.sft_max_steps
    return dataclasses.replace(progress, every=sooner, ended=ended)


def _validation(
    job: Job, params: Params, data: DataSet, limit: int, stop: Callable[[], bool]
) -> dict[str, Any]:
    """The figures of the validation rows, completed greedily, or sampled where the rule looks at their rewards."""
    if job.config.sft_stop_reward is None:
        return evaluate(job, params, data, "Validation", limit, stop).summary
    loop = dataclasses.replace(job.tool_loop(job.sampled, data.tree), limit=limit)
    rows = completions(job, loop, make_policy(loop, params), data, "Validation", 1, stop)
    values = job.score_all(rows, TrainerState(0, 1, 0.0, job.config.num_train_epochs)).means
    rewards = combine_rewards(values, job.reward_weights)
    figures = summarize(rows, [gold_calls(p.example, job.toolbox.functions) for p in data.prompts])
    # rows to which no reward applies have none
    return figures | {"reward": float(np.nanmean(rewards)) if np.isfinite(rewards).any() else None}


def _digest(job: Job, gold: Sequence[Trajectory]) -> str:
    """A digest of what decides the result."""
    options = {name: x for name, x in dataclasses.asdict(job.config).items() if name.startswith(OPTIONS)}
    made_of = [options, str(job.checkpoint or job.folder), [t.prompt.ids for t in gold]]
    made_of.append([t.completion_ids for t in gold])
    return hashlib.sha256(json.dumps(made_of, default=int).encode()).hexdigest()[:16]


def _with_gold(job: Job, train: DataSet) -> tuple[DataSet, list[Trajectory]]:
    """The rows to train on, whose gold calls run, with their trajectories; refused calls are not imitated."""
    # not in every host: a tool that answers differently would make them run different programs
    gold = hosts.of_first(lambda: gold_trajectories(job, train.prompts))
    config, runs, failed = job.config, [], []
    for prompt, trajectory in zip(train.prompts, gold, strict=True):
        answers = same_answer(trajectory.calls[-1][1].text, prompt.example.answer)
        if (pair := failed_call(trajectory.calls, answers)) is None:
            runs.append((prompt, trajectory))
        else:
            failed.append((prompt.example.source, pair))
    if failed:
        source, pair = failed[0]
        shown = f"the first, {source}: {show_call(*pair)}; correct the call or the tool"
        if not runs:
            raise ValueError(f"no gold call of the {len(gold)} rows to fine-tune on runs; {shown}")
        found = f"the gold calls of {len(failed)} of {len(gold)} rows do not run"
        if len(runs) < (size := config.sft_batch_size):
            raise ValueError(
                f"{found}, and the {len(runs)} others are fewer than sft_batch_size, {size}; lower it, or correct the "
                f"rows: {shown}"
            )
        job.console.line(f"Warning: {found}, and fine-tuning leaves these rows out; {shown}")
        train, gold = _part(job, [prompt for prompt, _ in runs]), [trajectory for _, trajectory in runs]
    for trajectory in gold:
        if (tokens := len(trajectory.completion_ids)) > config.max_grpo_completion_length:
            raise ValueError(
                f"{trajectory.prompt.example.source}: the gold conversation has {tokens} tokens after the prompt, "
                f"more than max_grpo_completion_length {config.max_grpo_completion_length}; raise that"
            )
    return train, list(map(turns_weighted, gold)) if config.sft_weights == "turns" else gold


def gold_trajectories(job: Job, prompts: Sequence[Prompt]) -> list[Trajectory]:
    """Gold rows as trajectories: their calls with the results of running them; the last result is the answer.

    Every row must hold a gold call. The budget is not looked at.
    """
    made = run_gold_calls([p.example for p in prompts], job.toolbox.functions, job.runner)
    if job.config.stop_after_tools:
        made = [calls[:1] for calls in made]

    def last_turn(prompt: Prompt, calls: Sequence[tuple[ToolCall, ToolResult]]) -> str | ToolCall | None:
        result = calls[-1][1].text
        refused = failed_call(calls, same_answer(result, prompt.example.answer)) is not None
        return job.last_turn(result, refused)  # a row whose call is refused is left out

    return [
        written_trajectory(job.conversation, prompt, calls, last_turn(prompt, calls))
        for prompt, calls in zip(prompts, made, strict=True)
    ]


def written_trajectory(
    conversation: Conversation,
    prompt: Prompt,
    calls: Sequence[tuple[ToolCall, ToolResult]],
    last: str | ToolCall | None,
) -> Trajectory:
    """A trajectory whose turns were written instead of sampled.

    Args:
        calls: each is a separate turn, followed by its result; may be empty.
        last: the last turn: a text, the call of a final tool with its one argument, or None for none: the
            conversation then ends with the calls of its last turn (`stop_after_tools`).
    """
    ids: list[int] = []
    mask: list[bool] = []
    messages: list[Message] = []

    def append(new: list[int], learned: bool, message: Message) -> None:
        ids.extend(new)
        mask.extend([learned] * len(new))
        messages.append(message)

    for i, (call, result) in enumerate(calls):
        turn = assistant_message(ParsedTurn("", None, (call,), None))
        append(conversation.assistant_ids("", [call]), True, turn)
        response = {"role": "tool", "name": call.name, "content": result.text}
        fed = conversation.response_ids([(call.name, result.text)])
        append(fed if last is not None or i + 1 < len(calls) else [], False, response)
    if isinstance(last, ToolCall):
        text = answer_text(next(iter(last.arguments.values())))
        turn = assistant_message(ParsedTurn(text, None, (last,), None))
        append(conversation.assistant_ids("", [last]), True, turn)
    elif last is not None:
        append(conversation.assistant_ids(last, []), True, {"role": "assistant", "content": last})
    status = Status.TOOLS_DONE if last is None else answered(calls)
    return Trajectory(prompt, ids, mask, [0.0] * len(ids), messages, list(calls), status)


def turns_weighted(trajectory: Trajectory) -> Trajectory:
    """A written trajectory whose turns count equally in `turns_objective`, whatever their number of tokens.

    Of N written tokens in K turns, one in a turn of n has the weight N / (K·n), so that the mean weight is 1. It is
    stored as −log(weight) in `logprobs`.
    """
    turns = [(written, len([*run])) for written, run in itertools.groupby(trajectory.sampled_mask)]
    K, N = sum(written for written, _ in turns), trajectory.sampled_tokens
    logprobs = [math.log(K * n / N) if written else 0.0 for written, n in turns for _ in range(n)]
    return dataclasses.replace(trajectory, logprobs=logprobs)


def cold_start_rows(job: Job, data: DataSet) -> tuple[DataSet, DataSet]:
    """Training rows that have a gold call, and the validation rows at the end of the file.

    Raises:
        ValueError: too few rows, too few of them with a gold call, or validation rows whose answers are all errors.
    """
    size, batch = job.config.sft_validation_size, job.config.sft_batch_size
    if len(data.prompts) < size + batch:
        raise ValueError(
            f"the cold start needs at least sft_validation_size {size} + sft_batch_size {batch} rows, "
            f"got {len(data.prompts)}; lower one of them, or add rows"
        )
    rows = data.prompts[:-size]
    found = [bool(gold_calls(p.example, job.toolbox.functions)) for p in rows]
    if sum(found) < batch:
        first = rows[found.index(False)].example.source
        raise ValueError(
            f"{first}: fine-tuning needs a gold call in column tool_call or ground_truth, got none; {sum(found)} of "
            f"{len(rows)} rows have one, fewer than sft_batch_size, {batch}"
        )
    train, held_out = _part(job, list(itertools.compress(rows, found))), _part(job, data.prompts[-size:])
    check_gold_calls(held_out.prompts, job.toolbox.functions)
    if job.config.sft_stop_reward is None:
        check_stop_rule(held_out.prompts, job.config.sft_stop_match)
    return train, held_out


def _part(job: Job, prompts: list[Prompt]) -> DataSet:
    budget = job.config.max_grpo_completion_length
    return DataSet(prompts, make_tree([p.ids for p in prompts], budget, job.row_devices))
