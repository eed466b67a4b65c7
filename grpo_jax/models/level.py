"""What passes through the model: tokens of one level of the prefix tree, and their keys and values.

Not in `qwen`, whose annotated shapes the tests check: trees of these hold shardings too, and arrays with one
dimension more under a scan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, UInt32

AnyArray = Array | np.ndarray  # of what is numpy on the host and becomes a jax array on the devices


@struct.dataclass
class Level:
    """Tokens of one level of the prefix tree.

    Args:
        tokens: [n, T] ids.
        positions: [n, T] int32 logical positions.
        valid: [n, T] bool; invalid tokens are never attended to.
        shared: True for levels that many rows share (they shard over tokens, not rows).
        dropout_keys: [n, 2] a key per row for the adapters' dropout; None drops nothing.
    """

    tokens: Int[AnyArray, "n T"]
    positions: Int[AnyArray, "n T"]
    valid: Bool[AnyArray, "n T"]
    shared: bool = struct.field(pytree_node=False, default=False)
    dropout_keys: UInt32[Array, "n 2"] | None = None


class KV(NamedTuple):
    """Keys and values of a level in every layer: [L, n, K, T, H], or lists of [n, K, T, H]."""

    k: Any
    v: Any
