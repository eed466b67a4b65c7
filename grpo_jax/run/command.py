"""What the commands share: options, printing, and how errors reach the user."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from grpo_jax.files import OutputError, is_url
from grpo_jax.run.config import ResolvedConfig, parse_config, print_config
from grpo_jax.run.console import Console, note_dependencies, setup_logging
from grpo_jax.run.stopping import Terminated

INTERRUPTED = 130  # the shell's status for Ctrl-C
LOST = (
    "If another process of this run has ended (see its own output), this error follows from it. The same command, "
    "started on all hosts, continues from the newest checkpoint"
)
# What errors say where another process is gone: of the collectives of CPUs and GPUs, of jax's coordination service,
# and of connections.
OF_LOST = (
    "Gloo", "NCCL", "coordination service", "heartbeat", "UNAVAILABLE", "DEADLINE_EXCEEDED",
    "Connection reset by peer", "Connection closed by peer",
)  # fmt: skip


def run_command(
    name: str,
    description: str,
    run: Callable[[ResolvedConfig, Console], int | None],
    argv: list[str] | None = None,
    default_config: str | None = None,
    console: Console | None = None,
) -> int:
    """Parse the options and run a command, or only print them (`print_config`); returns its exit status.

    Bad input (ValueError, FileNotFoundError) is printed as a sentence, with status 2, results that cannot
    be written (OutputError) as one with status 1; anything else, as a reward function that raises, keeps
    its traceback. Of several hosts the first prints, and all end when one fails. Paths are absolute before
    any user code runs. SIGTERM is an interruption like Ctrl-C, with the same status: the same command may be
    started again.
    """
    from_shell = argv is None
    argv = sys.argv[1:] if argv is None else argv
    try:
        resolved = parse_config(
            argv, prog=f"python -m grpo_jax.{name}", default_config=default_config, description=description
        )
        config = resolved.config.with_absolute_paths()
        for option in ("check", "plan"):
            if getattr(config, option) and name != "train":
                raise ValueError(f"{option} is an option of grpo_jax.train; leave it out of grpo_jax.{name}")
        if is_url(config.output_dir) and name not in ("train", "chat", "serve"):  # the latter write nothing
            raise ValueError(
                f"output_dir may be a URL in grpo_jax.train only, got {config.output_dir}; name a local folder"
            )
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if config.print_config:
        print_config(resolved)
        return 0

    import jax  # after the options, so that --help and a wrong one do not wait for it

    from grpo_jax import hosts

    console = console or Console()
    if from_shell:  # no user code has run since the imports
        note_dependencies()
    try:
        if config.plan is None:  # a plan is for a machine that need not be here
            hosts.join_processes()
        if not hosts.is_first():
            console.mute()
        setup_logging(console, config.log_level)
        console.line(resolved.sources())
        with _sigterm_interrupts():
            status = run(dataclasses.replace(resolved, config=config), console) or 0
    except hosts.HostError as error:  # every host has it; the one that failed has the traceback
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"Error: {error}", file=sys.stderr)
        status = 1
    except BaseException as error:
        status = _explained(error)
        if not hosts.alone():
            _end_all(status, error)
        if status is None:
            raise
        return status
    if not hosts.alone():
        jax.distributed.shutdown()
    return status


def _explained(error: BaseException) -> int | None:
    """The exit status of an error, of which a sentence is printed; None for one that needs its traceback."""
    import jax

    from grpo_jax.run.memory import explain, is_out_of_memory

    if isinstance(error, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, ValueError | FileNotFoundError | OutputError):
        print(f"Error: {error}", file=sys.stderr)
        return 1 if isinstance(error, OutputError) else 2
    if isinstance(error, jax.errors.JaxRuntimeError) and is_out_of_memory(error):
        print(f"Error: {explain(error)}", file=sys.stderr)
        return 1
    return None


def _end_all(status: int | None, error: BaseException) -> NoReturn:
    """End at once for an error of which the other hosts do not know: jax then ends those, which would wait forever."""
    if status is None:
        traceback.print_exception(error)
    if status != INTERRUPTED and _of_lost_process(error):
        print(LOST, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if status is None else status)  # a proper end would wait for the others


def _of_lost_process(error: BaseException | None) -> bool:
    """Whether an error of one of several processes may follow from the end of another.

    The runtime's own error does, and any that says one of `OF_LOST`: gloo's is a ValueError, and Orbax's thread
    raises what it likes. Either may be the cause of ours, as of a checkpoint that cannot be written.
    """
    import jax

    from grpo_jax.run.memory import is_out_of_memory

    while error is not None:
        runtime = isinstance(error, jax.errors.JaxRuntimeError) and not is_out_of_memory(error)
        if runtime or any(words in str(error) for words in OF_LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A block in which SIGTERM raises Terminated; only the main thread may set a handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
