"""What programs are compiled for: the devices that are present, unless a compilation ahead of time names others."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax

_named: contextvars.ContextVar[Sequence[jax.Device] | None] = contextvars.ContextVar("devices", default=None)


def on_cpu() -> bool:
    """Whether blocks and products are to suit a CPU."""
    devices = _named.get()
    return (devices[0].platform if devices else jax.default_backend()) == "cpu"


def device_count() -> int:
    """Devices that a program runs on."""
    return len(_named.get() or jax.devices())


@contextlib.contextmanager
def compiling_for(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Trace for these devices, which need not be here: `jax.experimental.topologies` describes a TPU's."""
    token = _named.set(devices)
    try:
        yield
    finally:
        _named.reset(token)
