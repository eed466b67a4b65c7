"""What programs are compiled for: the devices that are present, unless a compilation ahead of time names others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax

_named: list[Sequence[jax.Device]] = []


def on_cpu() -> bool:
    """Whether blocks and products are to suit a CPU."""
    return (_named[-1][0].platform if _named else jax.default_backend()) == "cpu"


def device_count() -> int:
    """Devices that a program runs on."""
    return len(_named[-1]) if _named else jax.device_count()


@contextlib.contextmanager
def compiling_for(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Trace for these devices, which need not be here: `jax.experimental.topologies` describes a TPU's."""
    _named.append(devices)
    try:
        yield
    finally:
        _named.pop()
