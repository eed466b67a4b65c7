"""Learning-rate schedules with the values of transformers' `get_scheduler` at every update."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.text import nearest


class Time(NamedTuple):
    """When an update is, for a decay.

    Args:
        after: updates since the warm-up ended, from 0 to `steps`.
        steps: updates from the end of the warm-up to the end of the run, at least 1.
        peak: the learning rate at the end of the warm-up.
    """

    after: jax.Array
    steps: int
    warmup: int
    peak: float

    @property
    def progress(self) -> jax.Array:
        """Share, 0 to 1, of the updates after the warm-up."""
        return self.after / self.steps


def _constant(t: Time):
    return jnp.ones_like(t.progress)


def _linear(t: Time):
    return 1 - t.progress


def _cosine(t: Time, num_cycles: float = 0.5):
    return 0.5 * (1 + jnp.cos(2 * math.pi * num_cycles * t.progress))


def _cosine_with_restarts(t: Time, num_cycles: int = 1):
    cosine = 0.5 * (1 + jnp.cos(math.pi * (num_cycles * t.progress % 1)))
    return jnp.where(t.after < t.steps, cosine, 0.0)


def _cosine_with_min_lr(
    t: Time, min_lr: float | None = None, min_lr_rate: float | None = None, num_cycles: float = 0.5
):
    low = (min_lr_rate or 0.0) if min_lr is None else min_lr / t.peak
    return _cosine(t, num_cycles) * (1 - low) + low


def _polynomial(t: Time, lr_end: float = 1e-7, power: float = 1.0):
    low = lr_end / t.peak
    return (1 - low) * (1 - t.progress) ** power + low


def _inverse_sqrt(t: Time, timescale: int | None = None):
    timescale = timescale or t.warmup or 10_000
    return jax.lax.rsqrt(1 + t.after / timescale)


def _warmup_stable_decay(
    t: Time,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
):
    stable = t.steps - num_decay_steps if num_stable_steps is None else num_stable_steps
    p = jnp.clip((t.after - stable) / max(1, num_decay_steps), 0.0, 1.0)
    cosine = 0.5 * (1 + jnp.cos(2 * math.pi * num_cycles * p))
    shape = {"linear": 1 - p, "cosine": cosine, "1-sqrt": 1 - jnp.sqrt(p)}[decay_type]
    return jnp.where(
        t.after < stable + num_decay_steps, shape * (1 - min_lr_ratio) + min_lr_ratio, min_lr_ratio
    )


# Factor on the peak learning rate at each update after the warm-up; its keywords are `lr_scheduler_kwargs`.
DECAYS: dict[str, Callable] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}
_SHAPES = ("linear", "cosine", "1-sqrt")


def schedule_problem(name: str, learning_rate: float, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with a schedule's arguments, in a sentence; None for nothing."""
    accepted = inspect.signature(DECAYS[name]).parameters
    known = [key for key in accepted if key != "t"]
    for key, value in arguments.items():
        if key not in known:
            close = nearest(key, known)
            takes = f"takes {', '.join(known)}" if known else "takes no arguments"
            return f"lr_scheduler_type {name} {takes}, got {key!r}" + (
                f"; nearest: {close[0]}" if close else ""
            )
        if key.endswith("_type"):
            if value not in _SHAPES:
                return f"lr_scheduler_kwargs: {key} must be one of {', '.join(_SHAPES)}, got {value!r}"
        elif isinstance(value, bool) or not isinstance(value, int | float | None) or (value or 0) < 0:
            return f"lr_scheduler_kwargs: {key} must be a number >= 0, got {value!r}"
    given = {key for key, value in arguments.items() if value is not None}
    required = [key for key in known if accepted[key].default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in given]:
        return f"lr_scheduler_type {name} needs {missing[0]} in lr_scheduler_kwargs"
    floors = given & {"min_lr", "min_lr_rate"}
    if name == "cosine_with_min_lr" and len(floors) != 1:
        return (
            "lr_scheduler_type cosine_with_min_lr needs min_lr or min_lr_rate in lr_scheduler_kwargs, got "
            + ("both" if floors else "neither")
        )
    end = arguments.get("lr_end", 1e-7)
    if name == "polynomial" and not learning_rate > end:
        return f"lr_scheduler_kwargs: lr_end must be below learning_rate {learning_rate:g}, got {end:g}"
    if name == "cosine_with_min_lr" and not learning_rate:
        return "lr_scheduler_type cosine_with_min_lr needs a learning_rate above 0, got 0"
    return None


def make_schedule(
    name: str,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    arguments: Mapping[str, Any] | None = None,
) -> optax.Schedule:
    """The learning rate of each update: a linear warm-up from 0, then the named decay.

    As in transformers, the first update of a warm-up has rate 0, and "constant" has no warm-up.

    Args:
        name: one of `DECAYS`.
        learning_rate: the peak.
        total_steps: updates until a decay ends; the rate stays there afterwards.
        arguments: `lr_scheduler_kwargs`, in which `schedule_problem` finds nothing wrong.

    Returns:
        A function from the number of updates done to the rate of the next one.

    Raises:
        ValueError: warm-up and decay take more updates than the run has.
    """
    arguments = arguments or {}
    warmup_steps = 0 if name == "constant" else warmup_steps
    decay_steps = max(1, total_steps - warmup_steps)
    if name == "warmup_stable_decay":
        decay, stable = arguments["num_decay_steps"], arguments.get("num_stable_steps")
        if stable is None and decay > total_steps - warmup_steps:
            raise ValueError(
                f"lr_scheduler_kwargs: num_decay_steps {decay} and {warmup_steps} updates of warm-up are more "
                f"than the run's {total_steps} updates; lower one of them"
            )

    def schedule(count: Any) -> Any:
        after = jnp.clip(count - warmup_steps, 0, decay_steps)
        decay = DECAYS[name](Time(after, decay_steps, warmup_steps, learning_rate), **arguments)
        warmup = jnp.minimum(1.0, count / warmup_steps) if warmup_steps else 1.0
        if name == "warmup_stable_decay" and warmup_steps:  # its warm-up has a shape and a floor
            p, low = warmup, arguments.get("min_lr_ratio", 0.0)
            cosine = 0.5 * (1 - jnp.cos(math.pi * p))
            shapes = {"linear": p, "cosine": cosine, "1-sqrt": 1 - jnp.sqrt(1 - p)}
            warmup = shapes[arguments.get("warmup_type", "linear")] * (1 - low) + low
        return learning_rate * warmup * decay

    return schedule
