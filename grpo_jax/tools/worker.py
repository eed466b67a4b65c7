"""The program of one tool worker: reads calls as JSON lines, answers each with one JSON line.

The first line is the set-up (`runner.py` writes it), answered with `["ready", ""]` or `["error", why]`. Every
further line is a call `[name, arguments]`, answered with `[outcome, text]`. Imports neither jax nor
transformers, so that it starts in a few hundredths of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from grpo_jax.tools.call import execute
from grpo_jax.tools.load import load_functions

_ORPHAN_GRACE = 5.0  # seconds past the time limit, for the parent to act first


def main() -> None:
    """Serve calls until the parent closes the pipe."""
    calls, answers = _protocol_pipes()
    setup = json.loads(calls.readline())
    try:
        functions = load_functions(setup["script"], setup["module"])
        _limit_memory(setup["memory_limit_mb"])
    except Exception as error:
        answers.write(json.dumps(["error", str(error)]) + "\n")
        return
    answers.write('["ready", ""]\n')
    worker = os.getpid()
    for line in calls:
        # Should the parent be gone, nobody else ends a hanging tool: SIGALRM's default action does.
        signal.setitimer(signal.ITIMER_REAL, setup["timeout"] + _ORPHAN_GRACE)
        answer = _answer(functions, line, setup)
        if os.getpid() != worker:  # a child that the tool forked: one call must not be answered twice
            os._exit(0)
        answers.write(answer + "\n")
        signal.setitimer(signal.ITIMER_REAL, 0)
    os._exit(0)  # threads and exit handlers of tools do not hold the worker back


def _protocol_pipes():
    """The pipes to the parent, moved away from where a tool prints and reads."""
    calls = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return calls, answers


def _limit_memory(megabytes: int) -> None:
    """Cap the address space at what is mapped now plus `megabytes`."""
    if sys.platform != "linux":
        print("tool_memory_limit needs Linux: tools run without it here", file=sys.stderr)
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _answer(functions: dict, line: str, setup: dict) -> str:
    try:
        name, arguments = json.loads(line)
    except (ValueError, RecursionError) as error:
        return json.dumps(["error", f"Error: the call cannot be read: {error}"])
    text, outcome = execute(functions, name, arguments, setup["lax"], setup["result_limit"])
    return json.dumps([outcome, text])
