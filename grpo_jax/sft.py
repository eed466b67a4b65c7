"""Cold start on gold calls: `python -m grpo_jax.sft`.

Supervised fine-tuning on the same prefix tree, with the same update, as GRPO: a
gold row is a trajectory whose turns were written instead of sampled. It ends by
a rule: a validation slice at the end of the training rows is evaluated greedily
every few updates until its exact_answer_match reaches `sft_stop_match`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.command import run_command
from grpo_jax.compiling import watch_compiles
from grpo_jax.config import ResolvedConfig, write_resolved
from grpo_jax.console import Console
from grpo_jax.data import Cursor, gold_calls, next_batch
from grpo_jax.evaluate import evaluate, greedy_sampler
from grpo_jax.metrics import PhaseTimer, write_json_atomic
from grpo_jax.optimizer import make_schedule
from grpo_jax.prefix_tree import make_tree, step_batch
from grpo_jax.sampler import Sampler
from grpo_jax.session import Prompts, Session, load_prompts, open_session
from grpo_jax.train_step import ModelStep, init_state, make_update, place_batch, sft_objective
from grpo_jax.types import Example, Status, Trajectory

WARMUP = 10  # updates; AdamW's second moment is not to be trusted before


def fine_tune(session: Session, data: Prompts, sampler: Sampler, folder: Path) -> dict:
    """Fine-tune on gold calls until the validation rule holds, and write an HF folder.

    Args:
        session: the job's parts.
        data: the training rows; the last `sft_validation_size` of them are held out.
        sampler: greedy, for the validation.
        folder: where the model is written.

    Returns:
        {"steps", "validation"}: updates done and the last validation's figures.

    Raises:
        ValueError: rows without gold calls, or too few of them.
    """
    config = session.config
    train, held_out = _split(session, data)
    _check_gold_calls(session, train.examples)
    schedule = make_schedule("constant_with_warmup", config.sft_learning_rate, WARMUP, config.sft_max_steps)
    optimizer = session.optimizer(schedule)
    state = init_state(session.load_params(), optimizer, session.training)
    step = ModelStep(session.model, session.training, session.dtype, remat=config.gradient_checkpointing)
    update = make_update(step, optimizer, sft_objective, state)
    cursor, report = Cursor(), {}
    with session.console.progress("Cold start", config.sft_max_steps) as bar:
        for done in range(1, config.sft_max_steps + 1):
            draws, cursor = next_batch(len(train.ids), config.sft_batch_size, cursor, config.seed)
            gold = gold_trajectories(
                session, [train.examples[i] for i, _ in draws], [train.ids[i] for i, _ in draws]
            )
            batch = place_batch(step.layout, step_batch(train.tree, gold, 1, [0.0] * len(gold)))
            state, metrics = update(state, batch)
            if done % config.sft_eval_steps == 0 or done == config.sft_max_steps:
                params = sampler.export(state.params)
                report = evaluate(session, sampler, params, held_out, "Validation").summary
                session.console.line(
                    f"cold start {done}: loss {float(metrics['loss']):.3f}, "
                    f"validation exact_answer_match {report['exact_answer_match']:.3f}"
                )
                if report["exact_answer_match"] >= config.sft_stop_match:
                    break
            bar.advance(1)
    session.save_model(folder, state.params)
    return {"steps": done, "validation": report}


def _check_gold_calls(session: Session, examples: Sequence[Example]) -> None:
    for example in examples:
        if not gold_calls(example, session.toolbox.functions):
            raise ValueError(
                f"{example.source}: fine-tuning needs a gold call in column tool_call or ground_truth, "
                "got none"
            )


def gold_trajectories(
    session: Session, examples: Sequence[Example], prompts: Sequence[list[int]]
) -> list[Trajectory]:
    """Gold rows as trajectories: each call in a turn of its own, its result, then the result as the answer.

    Every row must hold a gold call.

    Raises:
        ValueError: a gold conversation exceeds the budget.
    """
    gold = [gold_calls(e, session.toolbox.functions) for e in examples]
    flat = [(i, call) for i, calls in enumerate(gold) for call in calls]
    session.runner.start_step()
    results = session.runner.run([call for _, call in flat], [i for i, _ in flat])
    texts: list[list[str]] = [[] for _ in examples]
    for (i, _), result in zip(flat, results, strict=True):
        texts[i].append(result.text)
    return [_gold(session, *row) for row in zip(examples, prompts, gold, texts, strict=True)]


def _gold(session: Session, example: Example, prompt: list[int], calls, texts) -> Trajectory:
    ids: list[int] = []
    mask: list[bool] = []

    def append(new: list[int], learned: bool) -> None:
        ids.extend(new)
        mask.extend([learned] * len(new))

    for call, text in zip(calls, texts, strict=True):
        append(session.conversation.assistant_ids("", [call]), True)
        append(session.conversation.response_ids([(call.name, text)]), False)
    append(session.conversation.assistant_ids(texts[-1], []), True)
    budget = session.config.max_grpo_completion_length
    if len(ids) > budget:
        raise ValueError(
            f"{example.source}: the gold conversation has {len(ids)} tokens after the prompt, "
            f"max_grpo_completion_length is {budget}; raise it"
        )
    return Trajectory(prompt, ids, mask, [0.0] * len(ids), [], [], Status.ANSWERED)


def _split(session: Session, data: Prompts) -> tuple[Prompts, Prompts]:
    """Training rows, and the validation rows at the end of the file."""
    size = session.config.sft_validation_size
    if len(data.ids) < size + session.config.sft_batch_size:
        raise ValueError(
            f"the cold start needs sft_validation_size + sft_batch_size rows, "
            f"{size} + {session.config.sft_batch_size}, got {len(data.ids)}; lower one of them"
        )
    budget, devices = session.config.max_grpo_completion_length, session.row_devices

    def part(rows: slice) -> Prompts:
        return Prompts(data.examples[rows], data.ids[rows], make_tree(data.ids[rows], budget, devices))

    return part(slice(None, -size)), part(slice(-size, None))


def run(resolved: ResolvedConfig, console: Console) -> None:
    """Fine-tune, and leave `model/` and `sft.json` in output_dir."""
    config = resolved.config
    timer = PhaseTimer()
    with watch_compiles(console, timer):
        session = open_session(config, console, timer)
        with session.runner:
            data = load_prompts(session, config.required("dataset_id_or_path"))
            out = Path(config.output_dir)
            write_resolved(config, out / "resolved_config.yaml")
            with timer("cold_start"):
                report = fine_tune(session, data, greedy_sampler(session), out / "model")
    write_json_atomic(out / "sft.json", report | {"timings": timer.seconds})
    console.line(f"Fine-tuned for {report['steps']} updates; the model is in {out / 'model'}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command("sft", "Fine-tune on gold calls.", run, argv)


if __name__ == "__main__":
    sys.exit(main())
