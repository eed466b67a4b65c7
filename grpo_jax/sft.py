"""Cold start on gold calls: `python -m grpo_jax.sft`.

Supervised fine-tuning on the same prefix tree, with the same update, as GRPO: a
gold row is a trajectory whose turns were written instead of sampled. It ends by
a rule: a validation slice at the end of the training rows is evaluated greedily
every few updates until its exact_answer_match reaches `sft_stop_match`, four times as
often once half of that is reached: a small model learns the second half in a few updates.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_jax import hosts
from grpo_jax.data.batches import Cursor, next_batch
from grpo_jax.data.gold import failed_call, gold_calls, run_gold_calls, show_call
from grpo_jax.evaluate import evaluate, greedy_sampler
from grpo_jax.models.lora import join
from grpo_jax.rollout.conversation import Conversation
from grpo_jax.rollout.loop import answered
from grpo_jax.rollout.parsing import call_message
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.run.command import run_command
from grpo_jax.run.compiling import watch_compiles
from grpo_jax.run.config import ResolvedConfig, write_resolved
from grpo_jax.run.console import Console
from grpo_jax.run.job import Prompts, Session, load_prompts, open_session
from grpo_jax.run.log import PhaseTimer, write_json_atomic
from grpo_jax.scoring.rewards import same_answer
from grpo_jax.types import Example, Message, ToolCall, ToolResult, Trajectory
from grpo_jax.update.batch import make_tree, step_batch
from grpo_jax.update.optimizer import make_schedule
from grpo_jax.update.update import ModelStep, init_state, make_update, place_batch, sft_objective

WARMUP = 10  # updates; AdamW's second moment is not to be trusted before


def fine_tune(
    session: Session, data: Prompts, sampler: Sampler, folder: Path, adapter: Path | None = None
) -> dict:
    """Fine-tune on gold calls until the validation rule holds, and write an HF folder.

    With `use_peft` adapters are trained here too, and merged into the folder that is written:
    what starts from it, as GRPO, has adapters of its own.

    Args:
        session: the job's parts.
        data: the training rows; the last `sft_validation_size` of them are held out.
        sampler: greedy, for the validation.
        folder: where the model is written.
        adapter: where a PEFT folder is written, if adapters were trained.

    Returns:
        {"steps", "validation"}: updates done and the last validation's figures.

    Raises:
        ValueError: rows without gold calls, too few whose calls run, or a gold conversation over the
            budget; raised before anything is compiled.
    """
    config = session.config
    train, held_out = _split(session, data)
    train, gold = _with_gold(session, train)
    _check_budget(train.examples, gold, config.max_grpo_completion_length)
    schedule = make_schedule("constant_with_warmup", config.sft_learning_rate, WARMUP, config.sft_max_steps)
    optimizer = session.optimizer(schedule)
    trained, frozen = session.load_trained()
    state = init_state(trained, optimizer, session.training)
    step = ModelStep(session.model, session.training, session.dtype, remat=config.gradient_checkpointing)
    update = make_update(step, optimizer, sft_objective, state, frozen)
    cursor, report, every = Cursor(), {}, config.sft_eval_steps
    with session.console.progress("Cold start", config.sft_max_steps) as bar:
        for done in range(1, config.sft_max_steps + 1):
            draws, cursor = next_batch(len(train.ids), config.sft_batch_size, cursor, config.seed)
            rows = [gold[i] for i, _ in draws]
            batch = place_batch(step.layout, step_batch(train.tree, rows, 1, [0.0] * len(rows)))
            state, metrics = update(state, batch)
            if done % every == 0 or done == config.sft_max_steps:
                params = sampler.export(join(state.params, frozen))
                report = evaluate(session, sampler, params, held_out, "Validation").summary
                session.console.line(
                    f"cold start {done}: loss {float(metrics['loss']):.3f}, "
                    f"validation exact_answer_match {report['exact_answer_match']:.3f}"
                )
                if report["exact_answer_match"] >= config.sft_stop_match:
                    break
                if report["exact_answer_match"] >= config.sft_stop_match / 2:
                    every = max(1, config.sft_eval_steps // 4)
            bar.advance(1)
    session.save_model(state.params, frozen, folder, adapter)
    return {"steps": done, "validation": report}


def _with_gold(session: Session, train: Prompts) -> tuple[Prompts, list[Trajectory]]:
    """The rows whose gold calls run, with their trajectories; refused calls are nothing to imitate."""
    for example in train.examples:
        if not gold_calls(example, session.toolbox.functions):
            raise ValueError(
                f"{example.source}: fine-tuning needs a gold call in column tool_call or ground_truth, "
                "got none"
            )
    # not in every host: a tool that answers differently would make them run different programs
    gold = hosts.of_first(lambda: gold_trajectories(session, train.examples, train.ids))
    runs, failed = [], {}
    for i, (example, trajectory) in enumerate(zip(train.examples, gold, strict=True)):
        answers = same_answer(trajectory.calls[-1][1].text, example.answer)
        if (pair := failed_call(trajectory.calls, answers)) is None:
            runs.append(i)
        else:
            failed[i] = pair
    if not failed:
        return train, gold
    first, pair = next(iter(failed.items()))
    shown = f"the first, {train.examples[first].source}: {show_call(*pair)}; correct the call or the tool"
    if not runs:
        raise ValueError(f"no gold call of the {len(gold)} rows to fine-tune on runs; {shown}")
    found = f"the gold calls of {len(failed)} of {len(gold)} rows do not run"
    if len(runs) < (size := session.config.sft_batch_size):
        raise ValueError(
            f"{found}, and the {len(runs)} others are fewer than sft_batch_size, {size}; lower it, or correct the "
            f"rows: {shown}"
        )
    session.console.line(f"Warning: {found}, and fine-tuning leaves these rows out; {shown}")
    return _part(session, train, runs), [gold[i] for i in runs]


def _check_budget(examples: Sequence[Example], gold: Sequence[Trajectory], budget: int) -> None:
    for example, trajectory in zip(examples, gold, strict=True):
        if (tokens := len(trajectory.completion_ids)) > budget:
            raise ValueError(
                f"{example.source}: the gold conversation has {tokens} tokens after the prompt, "
                f"max_grpo_completion_length is {budget}; raise it"
            )


def gold_trajectories(
    session: Session, examples: Sequence[Example], prompts: Sequence[list[int]]
) -> list[Trajectory]:
    """Gold rows as trajectories: their calls with the results of running them; the last result is the answer.

    Every row must hold a gold call. The budget is not looked at.
    """
    made = run_gold_calls(examples, session.toolbox.functions, session.runner)
    return [
        written_trajectory(session.conversation, prompt, calls, calls[-1][1].text)
        for prompt, calls in zip(prompts, made, strict=True)
    ]


def written_trajectory(
    conversation: Conversation,
    prompt: list[int],
    calls: Sequence[tuple[ToolCall, ToolResult]],
    answer: str,
) -> Trajectory:
    """A trajectory whose turns were written instead of sampled.

    Args:
        conversation: tokenizer and template.
        prompt: the prompt's token ids.
        calls: each is a turn of its own, followed by its result; may be empty.
        answer: the text of the last turn.
    """
    ids: list[int] = []
    mask: list[bool] = []
    messages: list[Message] = []

    def append(new: list[int], learned: bool, message: Message) -> None:
        ids.extend(new)
        mask.extend([learned] * len(new))
        messages.append(message)

    for call, result in calls:
        turn = {"role": "assistant", "content": "", "tool_calls": [call_message(call)]}
        append(conversation.assistant_ids("", [call]), True, turn)
        response = {"role": "tool", "name": call.name, "content": result.text}
        append(conversation.response_ids([(call.name, result.text)]), False, response)
    append(conversation.assistant_ids(answer, []), True, {"role": "assistant", "content": answer})
    return Trajectory(prompt, ids, mask, [0.0] * len(ids), messages, list(calls), answered(calls))


def _split(session: Session, data: Prompts) -> tuple[Prompts, Prompts]:
    """Training rows, and the validation rows at the end of the file."""
    size = session.config.sft_validation_size
    if len(data.ids) < size + session.config.sft_batch_size:
        raise ValueError(
            f"the cold start needs sft_validation_size + sft_batch_size rows, "
            f"{size} + {session.config.sft_batch_size}, got {len(data.ids)}; lower one of them"
        )
    rows = range(len(data.ids))
    return _part(session, data, rows[:-size]), _part(session, data, rows[-size:])


def _part(session: Session, data: Prompts, rows: Sequence[int]) -> Prompts:
    ids = [data.ids[i] for i in rows]
    tree = make_tree(ids, session.config.max_grpo_completion_length, session.row_devices)
    return Prompts([data.examples[i] for i in rows], ids, tree)


def run(resolved: ResolvedConfig, console: Console) -> None:
    """Fine-tune, and leave `model/` and `sft.json` in output_dir; with `use_peft` also `adapter/`."""
    config = resolved.config
    timer = PhaseTimer()
    with watch_compiles(console, timer):
        session = open_session(config, console, timer)
        with session.runner:
            data = load_prompts(session, config.required("dataset_id_or_path"))
            out = Path(config.output_dir)
            hosts.of_first(lambda: write_resolved(config, out / "resolved_config.yaml"))
            with timer("cold_start"):
                report = fine_tune(session, data, greedy_sampler(session), out / "model", out / "adapter")
    hosts.of_first(lambda: write_json_atomic(out / "sft.json", report | {"timings": timer.seconds}))
    console.line(f"Fine-tuned for {report['steps']} updates; the model is in {out / 'model'}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command("sft", "Fine-tune on gold calls.", run, argv)


if __name__ == "__main__":
    sys.exit(main())
