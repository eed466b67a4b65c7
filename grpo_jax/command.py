"""What the commands share: options, printing, and how errors reach the user."""

from __future__ import annotations

import sys
from collections.abc import Callable

from grpo_jax.config import ResolvedConfig, parse_config, print_config
from grpo_jax.console import Console, setup_logging

INTERRUPTED = 130  # the shell's status for Ctrl-C


def run_command(
    name: str,
    description: str,
    run: Callable[[ResolvedConfig, Console], int | None],
    argv: list[str] | None = None,
    default_config: str | None = None,
) -> int:
    """Parse the options and run a command; returns its exit status.

    Bad input (ValueError, FileNotFoundError) is printed in one line with status 2; anything
    else, as a reward function that raises, keeps its traceback.
    """
    console = Console()
    try:
        argv = sys.argv[1:] if argv is None else argv
        resolved = parse_config(
            argv, prog=f"python -m grpo_jax.{name}", default_config=default_config, description=description
        )
        if resolved.config.check and name != "train":
            raise ValueError(f"check belongs to python -m grpo_jax.train; leave it out of grpo_jax.{name}")
        if resolved.config.plan is not None and name != "train":
            raise ValueError(f"plan belongs to python -m grpo_jax.train; leave it out of grpo_jax.{name}")
        setup_logging(console, resolved.config.log_level)
        if resolved.config.print_config:
            print_config(resolved)
        return run(resolved, console) or 0
    except (ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
