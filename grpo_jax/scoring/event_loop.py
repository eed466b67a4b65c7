"""The one event loop that reward functions run in, for the lifetime of the process.

Objects that a reward's module keeps between updates (semaphores, clients, connections, background tasks) belong
to the loop in which they were first used, so each update must use the same one.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from grpo_jax.tools.call import no_running_loop

SECONDS_TO_END = 1.0  # for background tasks to end when the process exits


class EventLoop:
    """An event loop that runs where it is needed, and in a separate thread between its uses.

    Rewards run in the caller's thread, since signals (time limits, for one) work in the main thread only.
    The thread keeps connections and background tasks alive from one update to the next; it starts with the
    first coroutine, as plain functions leave nothing behind that needs it.
    """

    def __init__(self) -> None:
        self._loop: Any = None  # an asyncio.AbstractEventLoop once a coroutine has run
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._has_run = False

    @contextlib.contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """Within the block no loop runs in this thread, and `asyncio.get_event_loop()` returns this one.

        A loop that the caller is running, as a notebook does, is set aside for that time.
        """
        with self._lock:
            self._stop_thread()
            usual = asyncio.get_event_loop_policy()
            try:
                with no_running_loop():
                    asyncio.set_event_loop_policy(_Policy(usual, self._open))
                    try:
                        yield
                    finally:
                        asyncio.set_event_loop_policy(usual)
            finally:
                if self._has_run and not self._loop.is_closed():
                    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
                    self._thread.start()

    def run(self, main: Coroutine) -> Any:
        """What a coroutine returns; to be called within `in_this_thread`."""
        loop = self._open()
        asyncio.set_event_loop(loop)
        self._has_run = True
        task = loop.create_task(main)
        while True:
            try:
                return loop.run_until_complete(task)
            except SystemExit:
                # Raised in a task that `main` may be waiting for: `main` is to see it, not the whole program.
                if task.done():
                    raise
            except KeyboardInterrupt:
                task.cancel()
                raise

    def _open(self) -> asyncio.AbstractEventLoop:
        """The loop; a new one where a user's function closed it."""
        if self._loop is None:
            atexit.register(self._close)
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        return self._loop

    def _stop_thread(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._thread = None

    def _close(self) -> None:
        with self._lock:
            self._stop_thread()
            if self._loop.is_closed():
                return
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=SECONDS_TO_END))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


class _Policy(asyncio.AbstractEventLoopPolicy):  # pyright: ignore[reportGeneralTypeIssues]
    """The caller's policy, except for what this thread finds as its current loop.

    That is the given one unless code sets another, and again when it has none: `asyncio.run` leaves none.
    """

    def __init__(self, usual: asyncio.AbstractEventLoopPolicy, open_loop: Callable):
        self._usual, self._open = usual, open_loop
        self._thread, self._set = threading.get_ident(), None

    def get_event_loop(self):
        if threading.get_ident() != self._thread:
            return self._usual.get_event_loop()
        return self._open() if self._set is None or self._set.is_closed() else self._set

    def set_event_loop(self, loop):
        if threading.get_ident() != self._thread:
            self._usual.set_event_loop(loop)
        else:
            self._set = loop

    def new_event_loop(self):
        return self._usual.new_event_loop()

    def get_child_watcher(self):
        return self._usual.get_child_watcher()

    def set_child_watcher(self, watcher):
        self._usual.set_child_watcher(watcher)
