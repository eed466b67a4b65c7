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


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: frequencies that turn seldom are divided by `factor`, with a ramp to those that are kept.

    Args:
        factor: what slow frequencies are divided by, >= 1.
        original: positions of the pretraining.
        low: a frequency with fewer turns than this in `original` positions is divided by `factor`.
        high: one with more turns than this is kept.

    Source: `_compute_llama3_parameters` of transformers 5.24.
    """

    factor: float
    original: int
    low: float
    high: float
    attention_factor: float = 1.0


Scaling = Yarn | Llama3
LLAMA3_KEYS = (
    "factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings", "rope_theta",
    "rope_type", "type",
)  # fmt: skip
YARN_KEYS = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "rope_theta", "rope_type", "truncate", "type",
)  # fmt: skip


def read_rope(config: dict[str, Any], source: str) -> tuple[float, Scaling | None]:
    """The base of the frequencies and their scaling, as a `config.json` gives them.

    Args:
        config: has `rope_theta` and perhaps `rope_scaling`, or transformers 5's `rope_parameters`.

    Raises:
        KeyError: a key is missing.
        ValueError: a type of scaling other than YaRN and Llama 3's, or an option of it that is unknown or out of range.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    theta = float(rope.get("rope_theta") or config["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, _read_llama3(rope, f"{source}: {key}")
    if kind != "yarn":
        raise ValueError(
            f"{source}: {key}: the rope type must be 'default', 'yarn' or 'llama3', got {kind!r}"
        )
    outside = {name: config[name] for name in ("original_max_position_embeddings",) if name in config}
    return theta, _read_yarn(
        {"original_max_position_embeddings": config.get("max_position_embeddings")} | rope | outside,
        f"{source}: {key}",
    )


def read_position_limit(config: dict[str, Any], scaling: Scaling | None) -> int | None:
    """Positions that the model was made for, as a `config.json` gives them; None where it does not say.

    With YaRN they are `factor` times those of the pretraining, whether or not `max_position_embeddings`
    already counts them.
    """
    stated = config.get("max_position_embeddings")
    if not isinstance(scaling, Yarn):
        return stated
    return max(stated or 0, int(scaling.factor * scaling.original))


def _read_llama3(rope: dict[str, Any], source: str) -> Llama3:
    factor, original = _read_factor(rope, "llama3", LLAMA3_KEYS, source)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    if not 0 < low < high:
        raise ValueError(
            f"{source}: low_freq_factor must be above 0 and below high_freq_factor, got {low} and {high}"
        )
    return Llama3(factor, original, float(low), float(high))


def _read_factor(rope: dict[str, Any], kind: str, keys: tuple[str, ...], source: str) -> tuple[float, int]:
    """The factor and the positions of the pretraining, in options that are all known."""
    for name in sorted(rope.keys() - set(keys)):
        raise ValueError(f"{source}: {kind} has no option {name}; it has {', '.join(keys)}")
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    for name, value in (("factor", factor), ("original_max_position_embeddings", original)):
        if not isinstance(value, int | float) or not 1 <= value < math.inf:
            raise ValueError(f"{source}: {name} must be a number >= 1, got {value!r}")
    return float(factor), original


def _read_yarn(rope: dict[str, Any], source: str) -> Yarn:
    factor, original = _read_factor(rope, "yarn", YARN_KEYS, source)
    fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    if fast < slow:
        raise ValueError(f"{source}: beta_fast must be >= beta_slow, got {fast} and {slow}")
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        mscales: tuple[Any, Any] = rope.get("mscale"), rope.get("mscale_all_dim")
        above, below = mscales if all(mscales) else (1.0, 0.0)
        magnitude = _magnitude(factor, above) / _magnitude(factor, below)
    return Yarn(factor, original, magnitude, fast, slow, rope.get("truncate", True))


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def frequencies(theta: float, H: int, scaling: Scaling | None = None) -> np.ndarray:
    """Radians per position, [H/2] in float32 with the roundings of the published models.

    One rounding in another place moves a third of them by one unit in the last place: 1e-2 radians
    at position 131,072.

    Args:
        theta: base; frequency i is theta^(-2i/H).
    """
    exponent = np.arange(0, H, 2, dtype=np.float32) / H
    period = (theta ** exponent.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return 1 / period
    if isinstance(scaling, Llama3):
        return _llama3(1 / period, scaling)
    keep = 1 - _ramp(theta, H, scaling)
    return 1 / (scaling.factor * period) * (1 - keep) + 1 / period * keep


def _llama3(frequency: np.ndarray, scaling: Llama3) -> np.ndarray:
    wave = np.float32(2 * math.pi) / frequency  # positions of one turn
    keep = (scaling.original / wave - scaling.low) / (scaling.high - scaling.low)
    blended = (1 - keep) * frequency / scaling.factor + keep * frequency
    slow, fast = wave > scaling.original / scaling.low, wave < scaling.original / scaling.high
    return np.where(slow, frequency / scaling.factor, np.where(fast, frequency, blended)).astype(np.float32)


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
