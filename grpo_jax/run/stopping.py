"""How a run ends before its last update: it is asked to stop, or its evaluations no longer get better."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Best:
    """The best of a run's evaluations; part of a checkpoint.

    Args:
        figure: name of the compared figure (`early_stop_metric`), the higher the better.
        step: updates done at that evaluation; 0 before the first one.
        value: the figure there; None before the first one.
        waited: evaluations since, none of which was better.
    """

    figure: str
    step: int = 0
    value: float | None = None
    waited: int = 0

    @classmethod
    def resumed(cls, saved: Mapping[str, Any] | None, figure: str, kept: Sequence[int]) -> Best:
        """What a checkpoint says is the best; none if that is of another figure, or not among the kept steps."""
        best = cls(**saved) if saved else cls(figure)
        return best if best.figure == figure and best.step in kept else cls(figure)

    def after(self, step: int, value: float) -> Best:
        """What is the best after one more evaluation; an equal one is no better."""
        if self.value is None or value > self.value:
            return Best(self.figure, step, value)
        return dataclasses.replace(self, waited=self.waited + 1)

    def ends(self, patience: int | None) -> bool:
        """Whether a run ends that waits for so many evaluations without a better one; None: it never does."""
        return patience is not None and self.waited >= patience


def how_to_continue(overwrites: bool) -> str:
    """What a stopped run says last."""
    if overwrites:
        return "The same command without overwrite_output_dir continues; with it, it starts over."
    return "The same command continues."


class Stopped(Exception):
    """A run was asked to stop, and has; the message says where, as "after update 3, which is saved"."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came: unlike Ctrl-C, which may end an answer or a line alone, it ends the command."""


class StopSignal:
    """A context in which Ctrl-C and SIGTERM only set `requested`, so that a step can end.

    SIGTERM also sets `hurry`: a machine that is taken away gives seconds. A second Ctrl-C raises KeyboardInterrupt at
    once. Only the main thread may handle signals: in another one, as of a web application, it does nothing.

    Example:
        with StopSignal() as stop:
            while not stop.requested:
                ...
    """

    def __init__(self) -> None:
        self.requested = self.hurry = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
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
        self.hurry = self.hurry or number == signal.SIGTERM
