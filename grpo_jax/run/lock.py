"""One active run per output_dir."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from grpo_jax import hosts
from grpo_jax.files import writing

_log = logging.getLogger(__name__)
LOCK = ".run.lock"
_HELD: set[Path] = set()  # in this process, which the system's lock does not keep from itself
_BUSY = (errno.EACCES, errno.EAGAIN)

# What a run leaves in output_dir, and all that --overwrite_output_dir removes.
LEAVINGS = (
    "resolved_config.yaml",
    "metrics.jsonl",
    "rollouts",
    "evaluation",
    "checkpoints",
    "model",
    "model_checkpoint",
    "adapter",
    "summary.json",
    "sft.json",
    "base_model",
    "cold_start",
    "cold_start_checkpoint",
    "tensorboard",
    "wandb",
    "mlflow.db",
    "tracker.json",
    "report.html",
)


@contextlib.contextmanager
def run_lock(output_dir: str | os.PathLike, command: str) -> Iterator[None]:
    """A block in which this run is the only one that writes into a folder, which is made if missing.

    The lock is the system's, on a file that also names host and process for the message of the second
    run. It ends with the process in every case, and is not inherited by forked children; a file
    that a killed run left behind locks nothing. Of several hosts the first locks for all.

    Raises:
        ValueError: another active run writes there, or the folder cannot be made or written.
    """
    path = Path(output_dir).absolute() / LOCK
    held: list[IO[str]] = []

    def acquire() -> None:
        check_writable(path.parent)
        if path in _HELD:
            raise _refusal(path, "this process")
        with writing(path):
            file = _locked(path)
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            about = {"host": socket.gethostname(), "pid": os.getpid(), "command": command, "started": started}
            json.dump(about, file)
            file.flush()
        held.append(file)
        _HELD.add(path)

    hosts.of_first(acquire)
    try:
        yield
    finally:
        if held:
            with contextlib.suppress(OSError):  # first: who opens it from now on locks another file
                if os.path.samestat(os.fstat(held[0].fileno()), path.stat()):
                    path.unlink()
            held[0].close()
            _HELD.discard(path)


def start_over(out: Path) -> None:
    """Remove what a run left in its folder, and nothing else: of a link, not what it points to."""
    for name in LEAVINGS:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make a folder, and write and remove a file in it.

    Raises:
        ValueError: that is not possible; says why.
    """
    blocked = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise ValueError(f"output_dir {folder}: {blocked} is a file; choose a folder for the results")
    probe = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise ValueError(
            f"output_dir {folder} cannot be written: {error.strerror}; choose another --output_dir"
        ) from None


def _locked(path: Path) -> IO[str]:
    """The lock file, open and locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = "another process"
            with file, contextlib.suppress(ValueError, KeyError, TypeError):
                file.seek(0)
                about = json.load(file)
                place = f"process {about['pid']} on host {about['host']}, since {about['started']}"
                holder = f"{about['command']} ({place})"
            if error.errno in _BUSY:
                raise _refusal(path, holder) from None
            _log.warning(
                "%s cannot be locked (%s): a second run in the same folder would not be noticed",
                path,
                error.strerror,
            )
            return path.open("a+", encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the run that held it removed it between our opening and our locking


def _refusal(path: Path, holder: str) -> ValueError:
    return ValueError(
        f"output_dir {path.parent} is in use by {holder}, and two runs would mix their results: wait until it "
        "ends, stop it, or choose another --output_dir"
    )
