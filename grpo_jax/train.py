"""GRPO training: `python -m grpo_jax.train --config configs/quickstart.yaml`."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

from grpo_jax.files import is_url
from grpo_jax.run.command import INTERRUPTED, run_command
from grpo_jax.run.config import ResolvedConfig
from grpo_jax.run.console import Console


def run(resolved: ResolvedConfig, console: Console) -> int:
    """Train as configured, or only say what training would meet (`check`, `plan`); returns the exit status."""
    from grpo_jax.preflight.plan import show_plan  # here, so that --help does not wait for jax
    from grpo_jax.run.lock import check_writable
    from grpo_jax.run.remote import Remote
    from grpo_jax.trainer import GRPOTrainer

    config = resolved.config
    if config.plan is not None:
        return show_plan(config, console)
    if config.check:
        if is_url(config.output_dir):
            Remote(config.output_dir).check()
        else:
            out = Path(config.output_dir).absolute()
            check_writable(next(path for path in (out, *out.parents) if path.exists()))
        with tempfile.TemporaryDirectory() as elsewhere:  # nothing is left in output_dir
            trainer = GRPOTrainer(args=dataclasses.replace(config, output_dir=elsewhere), console=console)
            with trainer.job.runner:
                return 0 if trainer.check() else 1
    trainer = GRPOTrainer(args=config, console=console)
    with trainer.job.runner:
        return 0 if trainer.train().finished else INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    description = "Train a model with GRPO to call your Python functions."
    default = Path("configs/default.yaml")
    if not default.exists():  # outside of the repository
        default = Path(__file__).parents[1] / default
    return run_command("train", description, run, argv, default_config=str(default))


if __name__ == "__main__":
    sys.exit(main())
