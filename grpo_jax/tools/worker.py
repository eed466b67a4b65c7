"""The program of one tool worker: reads calls as JSON lines, answers each with one JSON line.

The first line is the set-up (`runner.py` writes it), answered with `["ready", "", 0.0]` or `["error", why, 0.0]`. Every
further line is a call `[name, arguments]`, answered with `[outcome, text, seconds]`. Imports neither jax nor
transformers, so that it starts in 0.2 s.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from grpo_jax.tools import process_state
from grpo_jax.tools.call import OUT_OF_MEMORY, execute
from grpo_jax.tools.load import load_functions

_UNLIMITED_STACK = 2 * 2**20  # bytes of a thread's stack where `ulimit -s` is unlimited, on x86-64
_THREAD_HEAP = 2**20  # bytes that malloc and Python take for a thread that does little
_ORPHAN_GRACE = 5.0  # seconds past the time limit, for the parent to act first


def main() -> None:
    """Serve calls until the parent closes the pipe."""
    # The pipes to the parent, moved away from where a tool prints and reads.
    calls = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    setup = json.loads(calls.readline())
    process_state.has_own_process = True
    try:
        functions = load_functions(setup["script"], setup["module"], setup["pickled"])
        _limit_memory(setup["limits"]["memory_mb"])
    except Exception as error:
        answers.write(json.dumps(["error", str(error), 0.0]) + "\n")
        return
    answers.write('["ready", "", 0.0]\n')
    worker = os.getpid()
    for line in calls:
        # Without its parent nothing else ends a hanging tool: SIGALRM's default action does.
        signal.setitimer(signal.ITIMER_REAL, setup["limits"]["seconds"] + _ORPHAN_GRACE)
        try:
            name, arguments = json.loads(line)
        except (ValueError, RecursionError) as error:
            answer = ["error", f"Error: the call cannot be read: {error}", 0.0]
        else:
            began = time.perf_counter()
            text, outcome = execute(functions, name, arguments, setup["lax"], setup["limits"]["characters"])
            if text == f"Error: {name} {OUT_OF_MEMORY}":
                text += f"; tool_memory_limit is {setup['limits']['memory_mb']} MB"
            answer = [outcome, text, time.perf_counter() - began]
        if os.getpid() != worker:  # a child that the tool forked: one call must not be answered twice
            os._exit(0)
        answers.write(json.dumps(answer) + "\n")
        signal.setitimer(signal.ITIMER_REAL, 0)
    os._exit(0)  # threads and exit handlers of tools do not hold the worker back


def _limit_memory(megabytes: int) -> None:
    """Cap the data of this process (heap and private mappings) at what it holds now plus `megabytes`.

    The stacks of threads are data to the kernel, though mostly untouched: each thread raises the cap by its own.
    Address space that is only reserved, as by malloc for each thread, does not count.
    """
    if sys.platform != "linux":
        print("tool_memory_limit needs Linux: tools run without it here", file=sys.stderr)
        return
    import resource

    status = Path("/proc/self/status").read_text()
    now = int(status.partition("VmData:")[2].split()[0]) * 1024
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = _UNLIMITED_STACK if stack == resource.RLIM_INFINITY else stack

    def limit_for(threads: int) -> None:
        limit = now + megabytes * 2**20 + threads * (max(stack, threading.stack_size()) + _THREAD_HEAP)
        resource.setrlimit(
            resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )

    def counted(start):
        def start_counted(*args, **kwargs):
            limit_for(native + threading.active_count())
            return start(*args, **kwargs)

        return start_counted

    native = 2 * (os.cpu_count() or 1)  # the pools of numerical libraries, which start when first used
    limit_for(native)
    for name in ("_start_new_thread", "_start_joinable_thread"):  # the latter from Python 3.13 on
        if hasattr(threading, name):
            setattr(threading, name, counted(getattr(threading, name)))
