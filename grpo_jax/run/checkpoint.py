"""Checkpoints: save, restore, and stopping cleanly on Ctrl-C or SIGTERM.

All of Orbax is in here. A checkpoint is a folder named after its step with three
items: `params`, `optimizer` (with the step counter) and `meta` (JSON). It appears
under its name only when it is complete; a save that was cut off leaves a
`*.orbax-checkpoint-tmp` folder, which nothing reads.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

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
from orbax.checkpoint.checkpoint_managers import LatestN

from grpo_jax.update.update import TrainState

UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run, in one folder.

    A context manager: leaving it waits for a save that is still being written.

    Args:
        directory: the folder; made by the first save.
        keep: number of newest checkpoints to keep, None for all.
        async_save: return from `save` as soon as the state is copied, and write in the background.

    Raises:
        ValueError: when keep is below 1, or the folder holds something else than checkpoints.
    """

    def __init__(self, directory: str | Path, *, keep: int | None = None, async_save: bool = True):
        if keep is not None and keep < 1:
            raise ValueError(f"save_total_limit must be >= 1, or none to keep all checkpoints, got {keep}")
        self.directory = Path(directory).absolute()
        _refuse_foreign(self.directory)
        options = ocp.CheckpointManagerOptions(
            create=False,  # a mistyped folder to read from must not appear
            preservation_policy=LatestN(keep),
            enable_async_checkpointing=async_save,
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves a copy of the state; later changes, donation included, do not reach it.

        With several hosts, all of them call it.

        Args:
            step: updates done; newer than every checkpoint in the folder.
            state: what to restore.
            meta: anything JSON: data cursor, timings, thread count, flags.

        Raises:
            ValueError: when the folder already holds this step or a newer one.
            TypeError: when meta is not JSON; nothing is saved then.
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
        self._manager.save(step, args=items)

    def steps(self) -> list[int]:
        """The steps in the folder in rising order; the last may still be being written."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, or None when there is none."""
        return self._manager.latest_step()

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """What `save` was given, placed as the target says.

        Args:
            step: one of `steps()`.
            target: a state of `jax.ShapeDtypeStruct` with shardings (or of arrays), which
                gives shapes, dtypes, placement and the types of the optimizer's state.

        Returns:
            The state and the meta.

        Raises:
            ValueError: when there is no such step, or it is damaged or of another model.
        """
        optimizer = StandardRestore(_optimizer_part(target))
        restored = self._restore(step, target.params, optimizer=optimizer, meta=JsonRestore())
        return TrainState(params=restored.params, **restored.optimizer), restored.meta

    def restore_params(self, step: int, target: Any) -> Any:
        """The parameters alone, for export and evaluation; arguments and errors as `restore`."""
        return self._restore(step, target).params

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON of a step alone.

        Raises:
            ValueError: when there is no such step, or it is damaged.
        """
        if step not in self.steps():
            raise ValueError(f"no checkpoint of step {step} in {self.directory}, which holds {self.steps()}")
        with self._damage_explained(step):
            return self._manager.restore(step, args=Composite(meta=JsonRestore())).meta

    def wait(self) -> None:
        """Returns when every save has been written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves and ends the background threads."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restore(self, step: int, params: Any, **others: CheckpointArgs) -> Composite:
        self.wait()
        if step not in self.steps():
            raise ValueError(f"no checkpoint of step {step} in {self.directory}, which holds {self.steps()}")
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
            earlier = [s for s in self.steps() if s < step]
            mend = f"go on from step {earlier[-1]}" if earlier else "start over"
            raise ValueError(
                f"cannot restore {self.directory / str(step)}: it is damaged, or of another optimizer than "
                f"this run's. Delete that folder to {mend}. ({type(error).__name__}: {error})"
            ) from error


def is_step_folder(path: str | Path) -> bool:
    """Whether a path is one step's folder, as `runs/x/checkpoints/40`."""
    return Path(path).name.isdigit() and (Path(path) / "params").is_dir()


class StopSignal:
    """A context in which Ctrl-C and SIGTERM only set `requested`, so that a step can end.

    A second Ctrl-C raises KeyboardInterrupt at once. Enter it from the main thread,
    the only one that Python lets handle signals.

    Example:
        with StopSignal() as stop:
            while not stop.requested:
                ...
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def _optimizer_part(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path and shape of each leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}


def _refuse_foreign(directory: Path) -> None:
    """Raises ValueError when the folder holds anything but checkpoints."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; checkpoints need a folder")
    foreign = [
        p.name
        for p in directory.iterdir()
        if not p.name.isdigit() and not p.name.endswith(UNFINISHED) and not p.name.startswith(".")
    ]
    if foreign:
        raise ValueError(
            f"{directory} holds {sorted(foreign)[0]!r}, which is not a checkpoint of this program "
            "(those are folders named by their step). Choose another folder, or move it away"
        )
