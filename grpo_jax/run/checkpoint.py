"""Checkpoints: save, restore, and where a run starts.

Only this module uses Orbax. A checkpoint is a folder named after its step with three
items: `params`, `optimizer` (with the step counter) and `meta` (JSON). It appears
under its name only when it is complete; an interrupted save leaves a
`*.orbax-checkpoint-tmp` folder, which is never read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.args import (
    CheckpointArgs,
    Composite,
    JsonRestore,
    JsonSave,
    StandardRestore,
    StandardSave,
)
from orbax.checkpoint.checkpoint_managers import LatestN, PreservationPolicy

from grpo_jax import hosts
from grpo_jax.data.batches import Cursor
from grpo_jax.files import OutputError, cannot_write, writing
from grpo_jax.models.sharding import placed
from grpo_jax.run.identity import Identity, check_adapters, differences
from grpo_jax.run.memory import is_out_of_memory
from grpo_jax.text import first_line, shorten
from grpo_jax.update.update import TrainState

_log = logging.getLogger(__name__)
UNFINISHED = ".orbax-checkpoint-tmp"
MACHINE = ("threads", "xla_flags")  # in a meta: what decides the order of sums


OF_COLD_START = (
    "the checkpoint is that of a cold start which has not ended: only the command that wrote it can continue it, "
    "and writes the model when it ends"
)


class Meta(TypedDict):
    """What a checkpoint says in addition to the state, as JSON; no checkpoint has all of these keys."""

    # what the run started as; written by `progress.fresh_meta`
    run: Identity  # what it is compared by
    source: str  # folder of the model that its updates started from
    param_dtype: str
    threads: int
    xla_flags: str
    lora: dict[str, Any]  # with adapters: their settings
    base: dict[str, str]  # with adapters: what others call the model below them, and its dtype
    # how far it is; by `Progress.to_meta`
    cursor: dict[str, int]
    num_tokens: int
    best: dict[str, Any]
    tool_delays: dict[str, Any]
    solve_rates: dict[str, Any]  # with difficulty_sampling
    # by the trainer, with every save
    timings: dict[str, float]
    # by the trainer, for a step that was stopped in its evaluation: its record
    unevaluated: dict[str, Any]
    # by `find_start`: the step of another run that this one began from
    origin: str
    # by `cold_start`, whose checkpoints have these two alone: how far it is, and a digest of what decides its result
    at: dict[str, Any]
    of: str


class DamagedCheckpoint(ValueError):
    """A checkpoint, at `path`, cannot be read."""

    def __init__(self, path: Path, text: str):
        super().__init__(text)
        self.path = path


class Checkpoints:
    """The checkpoints of one run, in one folder.

    A context manager: leaving it waits for a save that is still being written. After a save that failed
    the next one may be tried.

    Args:
        keep: number of newest checkpoints to keep, None for all.
        async_save: return from `save` as soon as the state is copied, and write in the background.
        publish: called in the background when a save is written; it counts as written afterwards.

    Raises:
        ValueError: when keep is below 1, or the folder holds anything other than checkpoints.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int | None = None,
        async_save: bool = True,
        publish: Callable[[], None] | None = None,
    ):
        if keep is not None and keep < 1:
            raise ValueError(f"save_total_limit must be >= 1, or none to keep all checkpoints, got {keep}")
        self.directory = Path(directory).absolute()
        if self.directory.exists():
            if not self.directory.is_dir():
                raise ValueError(f"{self.directory} is a file; checkpoints need a folder")
            known = lambda name: name.isdigit() or name.endswith(UNFINISHED) or name.startswith(".")  # noqa: E731
            if others := sorted(p.name for p in self.directory.iterdir() if not known(p.name)):
                raise ValueError(
                    f"{self.directory} holds {others[0]!r}, which is not a checkpoint of this program "
                    "(those are folders named by their step). Choose another folder, or move it away"
                )
        self._kept = _NewestAndBest(keep)
        self._options = ocp.CheckpointManagerOptions(
            create=False,  # a mistyped folder to read from must not be created
            preservation_policy=self._kept,
            enable_async_checkpointing=async_save,
        )
        self._manager = self._open()
        self._waiter = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None  # of the last save: done when it is written and published
        self._publish = publish
        self._newest = self.directory  # what is being written, for messages
        self._quiet = contextlib.ExitStack()

    def _open(self) -> ocp.CheckpointManager:
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(self.directory, options=self._options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Saves a copy of the state; later changes, donation included, do not reach it.

        With several hosts, all of them call it.

        Args:
            step: updates done; newer than every checkpoint in the folder.

        Raises:
            ValueError: when the folder already holds this step or a newer one.
            TypeError: when meta is not JSON; nothing is saved then.
            OutputError: this save or an earlier one could not be written; older checkpoints are intact.
        """
        newest = self.latest()
        if newest is not None and step <= newest:
            raise ValueError(
                f"cannot save step {step}: {self.directory} already holds step {newest}. "
                "Resume from its newest checkpoint, or start over with --overwrite_output_dir"
            )
        items = Composite(
            params=StandardSave(state.params),
            optimizer=StandardSave(_optimizer_part(state)),
            # Through JSON here: the writer's thread would see later changes, and fail late.
            meta=JsonSave(json.loads(json.dumps(meta))),
        )

        def finish(manager: ocp.CheckpointManager) -> None:
            manager.wait_until_finished()
            if self._publish is not None:
                self._publish()

        self.wait()
        self._newest = self.directory / str(step)
        self._quiet.close()
        self._quiet.enter_context(_late_writes_ignored())
        with self._writing():
            self._manager.save(step, args=items)
        # Orbax reports that a save failed only when it is waited for
        self._written = self._waiter.submit(finish, self._manager)

    def keep_best(self, step: int) -> None:
        """Keep this step in addition to the newest ones, in place of the step of an earlier call."""
        self._kept.best = step

    def steps(self) -> list[int]:
        """The steps in the folder in rising order; the last may still be being written."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, or None when there is none."""
        return self._manager.latest_step()

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, Meta]:
        """What `save` was given, placed as the target says.

        Args:
            step: one of `steps()`.
            target: a state of `jax.ShapeDtypeStruct` with shardings (or of arrays), which
                gives shapes, dtypes, placement and the types of the optimizer's state.

        Returns:
            The state and the meta.

        Raises:
            DamagedCheckpoint: it cannot be read.
            ValueError: when there is no such step, or it is of another model.
        """
        optimizer = StandardRestore(_optimizer_part(target))
        restored = self._restore(step, target.params, optimizer=optimizer, meta=JsonRestore())
        return TrainState(params=restored.params, **restored.optimizer), restored.meta

    def restore_params(self, step: int, target: Any) -> Any:
        """The parameters alone, for export and evaluation; arguments and errors as `restore`."""
        return self._restore(step, target).params

    def meta(self, step: int) -> Meta:
        """The JSON of a step alone.

        Raises:
            DamagedCheckpoint: it cannot be read.
            ValueError: when there is no such step.
        """
        self._check_held(step)
        with self._damage_explained(step):
            restored: Any = self._manager.restore(step, args=Composite(meta=JsonRestore()))
            return restored.meta

    def set_aside(self, damaged: DamagedCheckpoint) -> str:
        """Rename a damaged newest step, so that the one before is the newest; returns a line that says so.

        Raises:
            DamagedCheckpoint: the same, where there is none before, it is another run's, or there are several
                hosts, of which each reads a part.
        """
        step, earlier = int(damaged.path.name), self.steps()[:-1]
        if damaged.path.parent != self.directory or not earlier or not hosts.alone():
            raise damaged
        away = self.directory / f".damaged-{step}"
        with writing(away):
            shutil.rmtree(away, ignore_errors=True)
            damaged.path.rename(away)
        self._manager.reload()
        return (
            f"Warning: the checkpoint of update {step} is damaged and was renamed to {away}; the one of update "
            f"{earlier[-1]} is used instead, and the later updates are repeated. ({damaged})"
        )

    def wait(self) -> None:
        """Returns when every save has been written; errors as `save`."""
        with self._writing():
            self._manager.wait_until_finished()
            if self._written is not None:
                self._written.result()

    def check(self) -> None:
        """Raises OutputError when a save that is written in the background has failed."""
        with self._writing():
            if self._written is not None and self._written.done():
                self._written.result()

    def close(self) -> None:
        """Waits for the saves and ends the background threads; errors as `save`."""
        try:
            self.wait()
        finally:
            self._waiter.shutdown()
            self._manager.close()
            self._quiet.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.close()
        except OutputError as error:
            if kind is None:
                raise
            if not issubclass(kind, OutputError):  # else the block ended because of it
                _log.warning("%s", error)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        # Orbax and TensorStore have no specific error for a disk that is full or gone.
        except Exception as error:
            failed, self._written = self._newest, None
            with contextlib.suppress(Exception):  # the same failure again
                self._manager.close()
            self._manager = self._open()  # the old one would count the step that failed
            if isinstance(error, OutputError):
                raise error from None
            raise cannot_write(failed, _reason(error)) from None

    def _check_held(self, step: int) -> None:
        if step not in self.steps():
            raise ValueError(f"no checkpoint of step {step} in {self.directory}, which holds {self.steps()}")

    def _restore(self, step: int, params: Any, **others: CheckpointArgs) -> Any:
        self.wait()
        self._check_held(step)
        with self._damage_explained(step):
            saved = _shapes(self._manager.item_metadata(step).params.tree)
        wanted = _shapes(params)
        for name in sorted(saved | wanted):
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.directory / str(step)} is of another model: {name} has shape {saved.get(name)} "
                    f"there and {wanted.get(name)} in this run. Run with the model it was saved with, or "
                    "choose another output_dir"
                )
        with self._damage_explained(step):
            return self._manager.restore(step, args=Composite(params=StandardRestore(params), **others))

    @contextlib.contextmanager
    def _damage_explained(self, step: int) -> Iterator[None]:
        try:
            yield
        # Orbax and TensorStore raise anything from AttributeError to a bare Exception on a damaged file.
        except Exception as error:
            if (
                is_out_of_memory(error)
                or isinstance(error, PermissionError)
                or "PERMISSION_DENIED" in str(error)
            ):
                raise  # it may be whole
            earlier = [s for s in self.steps() if s < step]
            fix = f"continue from step {earlier[-1]}" if earlier else "start over"
            raise DamagedCheckpoint(
                self.directory / str(step),
                f"cannot restore {self.directory / str(step)}: it is damaged, or of another optimizer than "
                f"this run's. Delete that folder to {fix}. ({type(error).__name__}: {_reason(error)})",
            ) from error


class _NewestAndBest(PreservationPolicy):
    """What Orbax keeps: the newest n checkpoints, all where n is None, and one more."""

    def __init__(self, n: int | None):
        self._newest, self.best = LatestN(n), 0  # no step

    def should_preserve(self, checkpoints, *, context):
        newest = self._newest.should_preserve(checkpoints, context=context)
        return [new or one.step == self.best for new, one in zip(newest, checkpoints, strict=True)]


def is_step_folder(path: str | Path) -> bool:
    """Whether a path is one step's folder, as `runs/x/checkpoints/40`."""
    return Path(path).name.isdigit() and (Path(path) / "params").is_dir()


# Where a run starts


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts; from `find_start`.

    Args:
        checkpoint: folder of checkpoints and step to continue from; None for the model's own weights.
        meta: the `Meta` of the run's next checkpoint.
        notes: how the run differs from the checkpoint, for the user.
        finished: updates of the finished run in output_dir when no more are asked for: there is nothing to do.
    """

    checkpoint: tuple[Path, int] | None
    meta: dict[str, Any]
    notes: list[str]
    finished: int | None = None

    def restore(self, own: Checkpoints, fresh: TrainState, shardings: Any) -> TrainState:
        """The state to start with.

        Args:
            fresh: the state where there is no checkpoint; for one, its shapes and types suffice.
            shardings: a tree like it.
        """
        if self.checkpoint is None:
            return fresh
        target = placed(fresh, shardings)
        with _opened(self.checkpoint[0], own) as source:
            return source.restore(self.checkpoint[1], target)[0]


def find_start(
    checkpoints: Checkpoints,
    wanted: str | None,
    summary: Mapping[str, Any],
    fresh: Mapping[str, Any],
    allow_change: bool,
) -> Start:
    """Where a run starts, found before anything compiles.

    1. Fresh, from the model's weights: output_dir holds no checkpoint, and none is named.
    2. From the newest checkpoint in output_dir, when none is named, or when that one is.
    3. From a named step of another run, when output_dir holds no checkpoint; with the same step named, later as 2.
    4. Not at all: output_dir holds a finished run, and no more updates than it made are asked for, or it was
       stopped early and early_stop_patience is no higher now. Otherwise it continues as 2.

    Where there is a checkpoint, data, tools, rewards, seed, batch and options are compared with those that
    it was saved with.

    Args:
        wanted: resume_from_checkpoint: a step's folder, "none" for a fresh start, None for the newest.
        summary: summary.json of the run in output_dir, empty for a new one: `after` says that it is finished, `updates` how
            many it made, `stopped_early` after how many evaluations without a better one.
        allow_change: continue despite differences that change the result.

    Raises:
        ValueError: a fresh start over checkpoints; a path that is no step's folder; a named step that is not
            the newest of a run that has checkpoints; a finished run without any; other adapters; a
            difference that would silently change the result.
    """
    newest, updates = checkpoints.latest(), fresh["run"]["numbers"]["updates"]
    found, origin = _newest_or_named(checkpoints, wanted)
    finished = None
    if "after" in summary:
        done, waited = summary["updates"], summary.get("stopped_early", 0)
        patience = fresh["run"]["options"].get("early_stop_patience")
        if updates <= done or (patience is not None and waited >= patience):
            finished = done  # 4
        elif newest is None:
            raise ValueError(
                f"the run in {checkpoints.directory.parent} is finished after {done} updates and left no checkpoint to "
                f"continue from, {updates} are requested now: start over with --overwrite_output_dir, or train its model "
                f"further with --model_name_or_path {checkpoints.directory.parent / 'model'} and another --output_dir"
            )
    if found is None or (newest is None and finished is not None):
        return Start(None, dict(fresh), [], finished)  # 1, or 4 of a run without checkpoints
    with _opened(found[0], checkpoints) as source:
        try:
            saved = source.meta(found[1])
        except DamagedCheckpoint:
            if finished is None:
                raise
            return Start(None, dict(fresh), [], finished)
    where = found[0] / str(found[1])
    if "cursor" not in saved:
        raise ValueError(f"cannot resume from {where}: {OF_COLD_START}")
    # 2 or 3; of 4, what has changed is only said
    notes, meta = _compared(saved, fresh, where, finished is not None, allow_change)
    return Start(found, meta | ({"origin": origin} if origin else {}), notes, finished)


def _newest_or_named(
    checkpoints: Checkpoints, wanted: str | None
) -> tuple[tuple[Path, int] | None, str | None]:
    """The checkpoint to continue from, if there is one, and the named step where it is another run's."""
    newest = checkpoints.latest()
    own = None if newest is None else (checkpoints.directory, newest)
    if wanted is None:
        return own, None  # 2, or 1
    if wanted == "none":
        if own is not None:
            raise ValueError(
                f"resume_from_checkpoint is none, but {checkpoints.directory} holds checkpoints; "
                "start over with --overwrite_output_dir, or choose another --output_dir"
            )
        return None, None  # 1
    if not is_step_folder(wanted):
        raise ValueError(
            f"resume_from_checkpoint must be a step's folder (RUN/checkpoints/STEP), got {wanted}"
        )
    path = Path(wanted).absolute()
    named = path.parent, int(path.name)
    if own is None:
        return named, str(path)  # 3
    if own != named and checkpoints.meta(own[1]).get("origin") != str(path):
        raise ValueError(
            f"cannot resume from {path}: {checkpoints.directory} already holds step {newest}; "
            "choose another --output_dir to keep what was saved there"
        )
    return own, None  # 2


def _compared(
    saved: Meta, fresh: Mapping[str, Any], where: Path, finished: bool, allow_change: bool
) -> tuple[list[str], dict[str, Any]]:
    """What to say of a checkpoint's differences from the run, and the meta to continue with; errors as `find_start`."""
    check_adapters(saved, fresh, where)
    then, now = (meta["run"]["options"].get("optim") for meta in (saved, fresh))
    if not finished and then != now:
        raise ValueError(
            f"cannot continue from {where}: it holds the moments of --optim {then}, which {now} cannot use. Continue "
            f"with --optim {then}, or choose another --output_dir for a new run"
        )
    found = differences(saved["run"], fresh["run"])
    refused = [one.text for one in found if one.refused]
    if refused and not (allow_change or finished):
        raise ValueError(
            f"cannot continue from {where}: this run differs from the one that saved it ({'; '.join(refused)}), which "
            "would silently change the result. Restore what it was saved with, choose another --output_dir for "
            "a new run, or continue anyway with --allow_config_change"
        )
    notes = [f"Warning: not as when {where} was saved: {one.text}" for one in found]
    notes += [
        f"Warning: {name} was {saved.get(name)!r} when {where} was saved and is {fresh[name]!r} now; "
        "sums are then computed in another order, and the run may differ in the last bits"
        for name in MACHINE
        if saved.get(name) != fresh[name]
    ]
    meta = {**saved, **{name: fresh[name] for name in ("run", "param_dtype", *MACHINE)}}
    if saved["run"]["rows"]["order"] != fresh["run"]["rows"]["order"]:
        notes.append(
            "The training data is not that of the checkpoint, so it is read from the start of an epoch"
        )
        meta["cursor"] = Cursor().to_json()
        meta.pop("solve_rates", None)
    return notes, meta


def machine_meta() -> dict[str, Any]:
    """What decides the order of sums: resumes are bit for bit only where it is the same."""
    return dict(zip(MACHINE, (len(os.sched_getaffinity(0)), os.environ.get("XLA_FLAGS", "")), strict=True))


def _opened(directory: Path, own: Checkpoints) -> contextlib.AbstractContextManager[Checkpoints]:
    """The checkpoints of a folder; the run's own stay open."""
    return contextlib.nullcontext(own) if directory == own.directory else Checkpoints(directory)


def _reason(error: BaseException) -> str:
    """What the system said, as "No space left on device"; else the first line of the library's message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's
        return os.strerror(int(found[1]))
    return shorten(first_line(error), 300)


class _OrbaxTraces(logging.Filter):
    """Drops what is logged of the writes of a save that fails, one by one: `Checkpoints` raises it once.

    Orbax's threads log theirs, and asyncio those that nobody waited for.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or "orbax" not in f"{record.pathname} {error}"


for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(_OrbaxTraces())
# Python's warning of those writes that had not begun
warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)


@contextlib.contextmanager
def _late_writes_ignored() -> Iterator[None]:
    """A block after whose failed save nothing is printed of the writes that end after Orbax gave up.

    TensorStore calls each into an event loop that is closed by then, and prints the trace of that.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = previous  # left in place by a save that failed, since writes may end after the block


def _optimizer_part(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path and shape of each leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}
