"""Announces compilations and measures their time."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

import jax
import jax.monitoring

from grpo_jax.run.console import Console
from grpo_jax.run.log import PhaseTimer

# The jitted functions of the project: worth a line each. Helpers of jax itself are not.
NAMED = ("prefill", "begin", "decode", "append", "export_layer", "update", "score")
_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_LOGGER = "jax._src.interpreters.pxla"


class _Announce(logging.Handler):
    """jax logs `Compiling jit(NAME) …` at DEBUG before it compiles."""

    def __init__(self, console: Console):
        super().__init__(logging.DEBUG)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        match = re.match(r"Compiling jit\((\w+)\)", record.getMessage())
        if match and match[1] in NAMED:
            self.console.line(f"Compiling {match[1]} …")


@contextlib.contextmanager
def watch_compiles(console: Console, timer: PhaseTimer) -> Iterator[None]:
    """Within the block, announce compilations and charge their seconds to the phase "compile".

    Tracing is not counted: it nests, so parts of it would be counted twice.
    """
    active = True

    def charge(event: str, duration_secs: float, **_: object) -> None:
        if active and event in _COMPILE_EVENTS:
            timer.move("compile", duration_secs)

    logger, handler = logging.getLogger(_LOGGER), _Announce(console)
    level, propagate = logger.level, logger.propagate
    jax.monitoring.register_event_duration_secs_listener(charge)  # jax cannot unregister one: hence `active`
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        active = False
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
