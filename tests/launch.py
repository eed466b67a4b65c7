"""Runs of the commands: the smoke run and one small run, each made once, and how to make more.

The small run trains a two-layer model in this process; its compiled programs are kept in the
session's cache, so that every later run of that shape takes about three seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache

from grpo_jax import train
from grpo_jax.files import write_text_atomic
from grpo_jax.models.scratch import Sizes, make_tiny_checkpoint
from grpo_jax.tools import load_tools

ROOT = Path(__file__).parents[1]
_TEMPORARY = tempfile.TemporaryDirectory(prefix="grpo_jax_runs_")  # removed when the session ends
FOLDER = Path(_TEMPORARY.name)
XLA_CACHE = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])  # the session's, see conftest
# slices of JSONL files are cached by TFDS, which must not write into the user's own cache
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(FOLDER / "tfds")}

SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64}
UPDATES = 4
# The completions of a random model differ in it, unlike in any reward for right calls.
SPREAD = "def reward_func(completions, completion_ids, **kwargs):\n    return {value}\n"
SPREAD_VALUE = "[sum(ids) % 11 / 10 for ids in completion_ids]"

_backend_compiles: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _count(event: str, seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _backend_compiles.append(event)


def compiles() -> int:
    """Programs compiled (or fetched from the cache) by this process so far."""
    return len(_backend_compiles)


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a command did.

    Args:
        folder: its output_dir.
        status: its exit status.
        out: standard output.
        err: standard error.
        seconds: wall time.
        compiles: programs compiled (or fetched from the cache); None for another process.
    """

    folder: Path
    status: int
    out: str
    err: str
    seconds: float
    compiles: int | None = None

    def json(self, name: str) -> Any:
        """A JSON file of the output_dir."""
        return json.loads((self.folder / name).read_text())

    def jsonl(self, name: str) -> list[dict]:
        """The objects of a JSONL file of the output_dir."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def weights(self, folder: str = "model") -> bytes:
        """The bytes of an HF folder's weights."""
        return (self.folder / folder / "model.safetensors").read_bytes()

    def samples(self) -> list[str]:
        """The sample conversations that `evaluate` printed; a random model writes others for other weights."""
        return self.out.split("Sample conversations\n")[1].split("\nEvaluation on")[0].split("  status ")[1:]


def rows(first: int, n: int) -> list[dict]:
    """Data set rows: sums, with their gold calls."""
    return [
        {
            "prompt": f"Add {i} and {i + 5}.",
            "answer": f"Sum: {i + i + 5}",
            "tool_call": {"name": "add", "arguments": {"a": i, "b": i + 5}},
        }
        for i in range(first, first + n)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write a JSONL file."""
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path: Path, text: str) -> Path:
    """Write a text file, with its folder."""
    write_text_atomic(path, text)
    return path


@functools.cache
def train_rows() -> Path:
    """The 24 training rows of the small run."""
    return write_rows(FOLDER / "train.jsonl", rows(10, 24))


@functools.cache
def evaluation_rows() -> Path:
    """Six rows for evaluation that are not among them."""
    return write_rows(FOLDER / "test.jsonl", rows(60, 6))


@functools.cache
def small_model() -> Path:
    """An HF folder of two layers whose tokenizer knows the small run's data."""
    schemas = load_tools(module="tools_funcs.math_tools").schemas
    texts = [json.dumps(schemas)] * 8 + [json.dumps(row) for row in rows(10, 24)]
    return make_tiny_checkpoint(FOLDER / "small_model", texts, Sizes(vocab_size=512, **SHAPE))


@functools.cache
def spread_reward() -> Path:
    """A reward that differs between the completions of a random model."""
    return write(FOLDER / "rewards" / "spread.py", SPREAD.format(value=SPREAD_VALUE))


def reward_that(folder: Path, when: str, then: str) -> Path:
    """A file with the small run's reward, which does something else too, the first time that a condition holds.

    Args:
        folder: of the file.
        when: an expression of `step`, the updates done.
        then: a statement.
    """
    return write(
        folder / "spread.py",
        "import os\nimport resource\nimport shutil\nimport signal\nfrom pathlib import Path\n\n\n"
        "def reward_func(completions, completion_ids, trainer_state, **kwargs):\n"
        "    once, step = Path(__file__).with_name('once'), trainer_state['global_step']\n"
        f"    if {when} and not once.exists():\n"
        "        once.touch()\n"
        f"        {then}\n"
        f"    return {SPREAD_VALUE}\n",
    )


def options(output_dir: Path, **changes: Any) -> list[str]:
    """The words of a small run: 4 updates of 2 prompts × 4 generations, a checkpoint after each.

    They name a config file next to the output_dir.

    Args:
        output_dir: the run's folder.
        changes: options that differ; None leaves one out.
    """
    values = {
        "model_name_or_path": small_model(),
        "dataset_id_or_path": train_rows(),
        "tool_functions_module": "tools_funcs.math_tools",
        "tool_executor": "inline",
        "reward_fn": spread_reward(),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": UPDATES,
        "max_grpo_completion_length": 79,
        "max_tool_calling_iterations": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "sft_batch_size": 8,
        "sft_validation_size": 4,
        "eval_batch_size": 4,
        "save_steps": 1,
        "logging_steps": 1,
        "output_dir": output_dir,
        "compilation_cache_dir": XLA_CACHE,
    } | changes
    given = {name: value for name, value in values.items() if value is not None}
    return ["--config", str(write(Path(f"{output_dir}.yaml"), json.dumps(given, default=str)))]


def call(main: Callable, argv: list[Any], folder: Path) -> Ran:
    """Run a command in this process.

    Args:
        main: the command's.
        argv: its words.
        folder: its output_dir.
    """
    out, err = io.StringIO(), io.StringIO()
    before, began = compiles(), time.perf_counter()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, ENVIRONMENT),
        _jax_settings_kept(),
    ):
        status = main([str(word) for word in argv])
    seconds = time.perf_counter() - began
    return Ran(folder, status, out.getvalue(), err.getvalue(), seconds, compiles() - before)


@contextlib.contextmanager
def _jax_settings_kept():
    """A command may set a compile cache; jax decides at its first compile whether there is one."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def start(command: str, argv: list[Any], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a command as a user does, in a separate process group."""
    return subprocess.Popen(
        [sys.executable, "-m", f"grpo_jax.{command}", *map(str, argv)],
        cwd=ROOT,
        env=(os.environ if environment is None else environment) | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, folder: Path) -> Ran:
    """Wait for a started command."""
    began = time.perf_counter()
    out, err = process.communicate(timeout=570)
    return Ran(folder, process.returncode, out, err, time.perf_counter() - began)


def small_run(folder: Path, *flags: Any, **changes: Any) -> Ran:
    """Train as `options` say, in this process."""
    return call(train.main, [*options(folder, **changes), *flags], folder)


@functools.cache
def whole() -> Ran:
    """The small run, uninterrupted; it compiles all its functions, whatever ran in this process before."""
    jax.clear_caches()
    return small_run(FOLDER / "whole")


@functools.cache
def smoke() -> Ran:
    """The command of configs/smoke.yaml, in a separate process."""
    return smoke_run(FOLDER / "smoke")


def smoke_run(folder: Path, environment: dict[str, str] | None = None, cache: Path = XLA_CACHE) -> Ran:
    """Run configs/smoke.yaml; `environment` None is that of the tests, which compiles faster."""
    flags = ["--config", "configs/smoke.yaml", "--output_dir", folder, "--compilation_cache_dir", cache]
    return finish(start("train", flags, environment), folder)
