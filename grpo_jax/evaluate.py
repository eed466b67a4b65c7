"""Greedy evaluation of a model folder or checkpoint: `python -m grpo_jax.evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path

from grpo_jax import hosts
from grpo_jax.run.command import run_command
from grpo_jax.run.compiling import watch_compiles
from grpo_jax.run.config import ResolvedConfig
from grpo_jax.run.console import Console
from grpo_jax.run.evaluation import compare, evaluate
from grpo_jax.run.inputs import check_gold_calls
from grpo_jax.run.job import load_data, open_job, read_inputs
from grpo_jax.run.lock import check_writable
from grpo_jax.run.log import PhaseTimer, write_json_atomic


def run(resolved: ResolvedConfig, console: Console) -> None:
    """Evaluate one model folder or checkpoint; writes `evaluation.json` and `evaluation/evaluate.jsonl`."""
    config, timer = resolved.config, PhaseTimer()
    check_writable(Path(config.output_dir).absolute())
    with watch_compiles(console, timer):
        inputs = read_inputs(config, _rows_of(resolved))
        job = open_job(config, console, timer, inputs)
        with job.runner:
            data = load_data(job, inputs.train)
            check_gold_calls(data.prompts, job.toolbox.functions)
            with timer("evaluate"):
                params = job.greedy.export(job.load_params())
                result = evaluate(job, params, data, "Evaluation", name="evaluate")
    console.samples(result.trajectories, [p.example.answer for p in data.prompts])
    model = str(job.checkpoint or job.adapter or job.folder)
    compare(console, {model: result.summary})
    path = Path(config.output_dir) / "evaluation.json"
    found = result.summary | {"model": model, "timings": timer.seconds}
    hosts.of_first(lambda: write_json_atomic(path, found))
    console.line(f"Written: {path}, and its conversations to {path.with_suffix('') / 'evaluate.jsonl'}")


def _rows_of(resolved: ResolvedConfig) -> str:
    """The data to evaluate on: the evaluation data, unless a flag names other rows; a run's file names those it learns from."""
    config = resolved.config
    asked = resolved.by_flag("dataset_id_or_path") and not resolved.by_flag("eval_dataset_id_or_path")
    evaluation = None if asked else config.eval_dataset_id_or_path
    return evaluation or config.required("dataset_id_or_path")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command("evaluate", "Evaluate a model folder or checkpoint.", run, argv)


if __name__ == "__main__":
    sys.exit(main())
