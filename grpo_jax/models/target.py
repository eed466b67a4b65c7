"""What programs are compiled for: the devices that are present, unless a compilation ahead of time names others."""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

Devices = Sequence[Any]  # of jax.Device, which jax declares as a variable and not as a type
_named: contextvars.ContextVar[Devices | None] = contextvars.ContextVar("devices", default=None)
# the smallest slice, and the axes of it that are doubled in turn; v4 is left out, whose devices libtpu counts by core
SLICES = {"v5e": ((2, 2), (1, 0)), "v6e": ((2, 2), (1, 0)), "v5p": ((2, 2, 1), (2, 1, 0))}


def on_cpu() -> bool:
    """Whether blocks and products are to suit a CPU."""
    devices = _named.get()
    return (devices[0].platform if devices else jax.default_backend()) == "cpu"


def device_count() -> int:
    """Devices that a program runs on."""
    return len(_named.get() or jax.devices())


@contextlib.contextmanager
def compiling_for(devices: Devices) -> Iterator[None]:
    """Trace for these devices, which need not be present: `tpu_devices` describes a TPU's."""
    token = _named.set(devices)
    try:
        yield
    finally:
        _named.reset(token)


def tpu_devices(kind: str, count: int) -> Devices:
    """Devices of a TPU slice to compile for; the slice need not exist.

    Args:
        kind: a name in `SLICES`.
        count: the slice is the smallest that has so many devices.

    Raises:
        RuntimeError: libtpu, which compiles for a TPU, is not installed.
    """
    shape, axes = SLICES[kind]
    for doubled in range(64):
        if math.prod(shape) >= count:
            break
        axis = axes[doubled % len(axes)]
        shape = tuple(size * 2 if i == axis else size for i, size in enumerate(shape))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a TPU in this machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # to compile takes no TPU that others could want
    name = f"{kind}:{'x'.join(map(str, shape))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:count]
