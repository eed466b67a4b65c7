"""Cold start on gold calls alone: `python -m grpo_jax.sft`."""

from __future__ import annotations

import sys
from pathlib import Path

from grpo_jax import hosts
from grpo_jax.run.cold_start import fine_tune
from grpo_jax.run.command import INTERRUPTED, run_command
from grpo_jax.run.compiling import watch_compiles
from grpo_jax.run.config import ResolvedConfig, write_resolved
from grpo_jax.run.console import Console
from grpo_jax.run.job import load_data, open_job, read_inputs, starting_over
from grpo_jax.run.lock import run_lock
from grpo_jax.run.log import PhaseTimer, write_json_atomic
from grpo_jax.run.model_card import write_model_card
from grpo_jax.run.stopping import Stopped, StopSignal, how_to_continue


def run(resolved: ResolvedConfig, console: Console) -> int:
    """Fine-tune, and leave `model/` and `sft.json` in output_dir; with `use_peft` also `adapter/`.

    Returns:
        The exit status.
    """
    config, timer = resolved.config, PhaseTimer()
    out = Path(config.output_dir)
    inputs = read_inputs(config, config.required("dataset_id_or_path"))
    with run_lock(out, "grpo_jax.sft"):
        with watch_compiles(console, timer):
            done = hosts.of_first(lambda: (out / "sft.json").exists() and (out / "model").exists())
            if done and not config.overwrite_output_dir:
                console.line(
                    f"The fine-tuning in {out} is finished (sft.json, model/). --overwrite_output_dir starts over, "
                    "another --output_dir keeps both."
                )
                return 0
            lost = "a training run (summary.json or checkpoints), whose model/ fine-tuning would replace"
            with starting_over(config, ("summary.json", "checkpoints"), lost):
                job = open_job(config, console, timer, inputs)
                data = load_data(job, inputs.train)
            with job.runner:
                hosts.of_first(lambda: write_resolved(config, out / "resolved_config.yaml"))
                try:
                    with timer("cold_start"), StopSignal() as stop:
                        report = fine_tune(job, data, out / "model", out / "adapter", lambda: stop.requested)
                except Stopped as stopped:
                    console.line(f"Stopped {stopped}. {how_to_continue(config.overwrite_output_dir)}")
                    return INTERRUPTED
        report |= {"tools": list(inputs.toolbox.functions), "timings": timer.seconds}
        hosts.of_first(lambda: write_json_atomic(out / "sft.json", report))
        hosts.of_first(lambda: write_model_card(out / "model", out, 0))
    console.line(f"Fine-tuned for {report['steps']} updates; the model is in {out / 'model'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command("sft", "Fine-tune on gold calls.", run, argv)


if __name__ == "__main__":
    sys.exit(main())
