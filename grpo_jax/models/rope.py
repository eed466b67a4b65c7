"""Rotary position embedding: what a `config.json` says of it, and the frequencies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN: slow frequencies are divided by `factor`, so that more positions fit than were trained.

    Static, as in transformers and vLLM: it applies to short texts just as to long ones.

    Args:
        factor: context length over that of the pretraining, >= 1.
        original: positions of the pretraining.
        attention_factor: what cosines and sines are multiplied by.
        beta_fast: a frequency with more turns than this in `original` positions is kept.
        beta_slow: one with fewer turns than this is divided by `factor`; a ramp lies between.
        truncate: the ramp starts and ends at whole frequencies.

    Source: Peng et al. 2023, "YaRN", arXiv:2309.00071; options and defaults as transformers 5.23 reads them.
    """

    factor: float
    original: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


YARN_KEYS = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "rope_theta", "rope_type", "truncate", "type",
)  # fmt: skip


def read_rope(config: dict[str, Any], source: str) -> tuple[float, Yarn | None]:
    """The base of the frequencies and their scaling, as a `config.json` gives them.

    Args:
        config: has `rope_theta` and perhaps `rope_scaling`, or transformers 5's `rope_parameters`.
        source: the file, for messages.

    Raises:
        KeyError: a key is missing.
        ValueError: a type of scaling other than YaRN, or an option of it that is unknown or out of range.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    theta = float(rope.get("rope_theta") or config["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"{source}: {key}: the rope type must be 'default' or 'yarn', got {kind!r}")
    outside = {name: config[name] for name in ("original_max_position_embeddings",) if name in config}
    return theta, _read_yarn(
        {"original_max_position_embeddings": config.get("max_position_embeddings")} | rope | outside,
        f"{source}: {key}",
    )


def read_position_limit(config: dict[str, Any], yarn: Yarn | None) -> int | None:
    """Positions that the model was made for, as a `config.json` gives them; None where it does not say.

    With YaRN they are `factor` times those of the pretraining, whether or not `max_position_embeddings`
    already counts them.

    Args:
        config: has `max_position_embeddings`.
        yarn: from `read_rope`.
    """
    stated = config.get("max_position_embeddings")
    if yarn is None:
        return stated
    return max(stated or 0, int(yarn.factor * yarn.original))


def _read_yarn(rope: dict[str, Any], source: str) -> Yarn:
    for name in sorted(rope.keys() - set(YARN_KEYS)):
        raise ValueError(f"{source}: yarn has no option {name}; it has {', '.join(YARN_KEYS)}")
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    for name, value in (("factor", factor), ("original_max_position_embeddings", original)):
        if not isinstance(value, int | float) or value < 1:
            raise ValueError(f"{source}: {name} must be a number >= 1, got {value!r}")
    fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    if fast < slow:
        raise ValueError(f"{source}: beta_fast must be >= beta_slow, got {fast} and {slow}")
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        mscales = rope.get("mscale"), rope.get("mscale_all_dim")
        above, below = mscales if all(mscales) else (1.0, 0.0)
        magnitude = _magnitude(factor, above) / _magnitude(factor, below)
    return Yarn(float(factor), original, magnitude, fast, slow, rope.get("truncate", True))


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def frequencies(theta: float, H: int, yarn: Yarn | None = None) -> np.ndarray:
    """Radians per position, [H/2] in float32 with the roundings of the published models.

    One rounding in another place moves a third of them by one unit in the last place: 1e-2 radians
    at position 131,072.

    Args:
        theta: base; frequency i is theta^(-2i/H).
        H: head size.
    """
    exponent = np.arange(0, H, 2, dtype=np.float32) / H
    period = (theta ** exponent.astype(np.float64)).astype(np.float32)
    if yarn is None:
        return 1 / period
    keep = 1 - _ramp(theta, H, yarn)
    return 1 / (yarn.factor * period) * (1 - keep) + 1 / period * keep


def _ramp(theta: float, H: int, yarn: Yarn) -> np.ndarray:
    """[H/2]: 0 for frequencies that are kept, 1 for those that are divided by the factor."""

    def place(turns: float) -> float:
        """The (fractional) index of the frequency with so many turns in the original positions."""
        return H * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(yarn.beta_fast), place(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    high += 0.001 if low == high else 0
    return np.clip((np.arange(H // 2, dtype=np.float32) - low) / (high - low), 0, 1)
