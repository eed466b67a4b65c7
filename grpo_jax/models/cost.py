"""The work of a GRPO step in FLOP and bytes, the least time that a machine could take for it, and its activations.

Pure arithmetic; docs/performance.md has the same formulas with their reasons. Letters as in CONTRIBUTING.md
and `grpo_jax.types`; one multiply-add is 2 FLOP. Only what no implementation can leave out is counted: no
padding, no norms, no softmax, and the last layer of the two shared levels computes keys and values only,
since its output is not used.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from grpo_jax.models.qwen import ModelConfig


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What a step is made of, in rows and tokens.

    Args:
        P: prompts.
        G: completions per prompt.
        T0: preamble tokens.
        T1: tokens of a prompt after the preamble, without its last one.
        T2: tokens of a completion; its last token passes through no layer, the prompt's last does.
    """

    P: int
    G: int
    T0: int
    T1: int
    T2: int

    @property
    def B(self) -> int:
        """Rows."""
        return self.P * self.G


class Rates(NamedTuple):
    """What a machine reaches: FLOP/s of a matrix product, bytes/s of a copy."""

    flops: float
    bytes: float


def layer_weights(cfg: ModelConfig) -> int:
    """W: weights of one layer's seven matrices."""
    return 2 * cfg.D * cfg.H * (cfg.N + cfg.K) + 3 * cfg.D * cfg.F


def weights(cfg: ModelConfig) -> int:
    """Weights of all matrices; norms and biases left out."""
    return cfg.L * layer_weights(cfg) + cfg.V * cfg.D * (1 if cfg.tied else 2)


def _kv_weights(cfg: ModelConfig) -> int:
    return 2 * cfg.D * cfg.K * cfg.H


def _shared_levels(x: Lengths) -> dict[str, tuple[int, float]]:
    """(tokens, keys that a token sees on average) of the levels whose last layer only makes keys and values."""
    return {"preamble": (x.T0, x.T0 / 2), "prompts": (x.P * x.T1, x.T0 + x.T1 / 2)}


def prefill_flop(cfg: ModelConfig, x: Lengths) -> dict[str, float]:
    """FLOP of the rollout's prefill by level: (L-1)·(2W + 4NH·keys) + 4DKH a token."""
    per_key = 4 * cfg.N * cfg.H
    return {
        name: tokens * ((cfg.L - 1) * (2 * layer_weights(cfg) + per_key * keys) + 2 * _kv_weights(cfg))
        for name, (tokens, keys) in _shared_levels(x).items()
    }


def decode_step(cfg: ModelConfig, x: Lengths, t: int, itemsize: int) -> tuple[float, float]:
    """(FLOP, bytes read) of decoding token t of every row, which has fed t tokens before.

    FLOP: B·(L·(2W + 4NH·(T0 + T1 + t + 1)) + 2DV). Bytes: every weight once, the preamble's keys and
    values once, each prompt's once, each row's own: itemsize·(LW + DV + 2KHL·(T0 + P·T1 + B·(t + 1))).
    """
    keys = x.T0 + x.T1 + t + 1
    flop = x.B * (cfg.L * (2 * layer_weights(cfg) + 4 * cfg.N * cfg.H * keys) + 2 * cfg.D * cfg.V)
    slots = x.T0 + x.P * x.T1 + x.B * (t + 1)
    read = cfg.L * layer_weights(cfg) + cfg.D * cfg.V + 2 * cfg.K * cfg.H * cfg.L * slots
    return flop, itemsize * read


def update_flop(cfg: ModelConfig, x: Lengths, remat: bool) -> dict[str, float]:
    """FLOP of one update by level.

    Per token and layer: 2W forward and 4W backward; a key costs 4NH forward and 10NH backward (scores are
    recomputed, never kept). With remat the forward pass is run again, except for attention, which keeps its
    output and log-sum-exp, and the MLP's last product, whose result the backward pass does not need: 2(W - DF).
    Head: 2DV a token, again in the backward pass, and twice that for the two gradients: 8DV.
    """
    dense = 6 * layer_weights(cfg) + (2 * (layer_weights(cfg) - cfg.D * cfg.F) if remat else 0)
    per_key = 14 * cfg.N * cfg.H
    last = (8 if remat else 6) * _kv_weights(cfg)
    flop = {
        name: tokens * ((cfg.L - 1) * (dense + per_key * keys) + last)
        for name, (tokens, keys) in _shared_levels(x).items()
    }
    rows = x.B * x.T2
    body = cfg.L * (dense + per_key * (x.T0 + x.T1 + x.T2 / 2))
    return flop | {"completions": rows * body, "head": rows * 8 * cfg.D * cfg.V}


def least_prefill(cfg: ModelConfig, x: Lengths, rates: Rates) -> float:
    """Seconds: FLOP alone."""
    return sum(prefill_flop(cfg, x).values()) / rates.flops


def least_decode(cfg: ModelConfig, x: Lengths, rates: Rates, itemsize: int) -> tuple[float, str]:
    """(seconds, what binds): per step the longer of its FLOP and its bytes."""
    steps = [decode_step(cfg, x, t, itemsize) for t in range(x.T2)]
    flop = sum(f for f, _ in steps) / rates.flops
    read = sum(b for _, b in steps) / rates.bytes
    least = sum(max(f / rates.flops, b / rates.bytes) for f, b in steps)
    return least, "bytes" if read > flop else "FLOP"


def least_update(cfg: ModelConfig, x: Lengths, remat: bool, rates: Rates) -> float:
    """Seconds: FLOP alone."""
    return sum(update_flop(cfg, x, remat).values()) / rates.flops


def kept_bytes(cfg: ModelConfig, itemsize: int, remat: bool = True, tensor: int = 1) -> float:
    """Bytes a token that all layers keep for the backward pass of an update.

    With remat every layer's input, attention's output and its fp32 log-sum-exp; without it, in fp32, norms,
    projections before and after their norm and rotation, and the MLP: 6D + 8NH + 8KH + 3F.

    Args:
        tensor: devices that share heads and width.
    """
    if remat:
        return cfg.L * (itemsize * cfg.D + (itemsize * cfg.H + 4) * cfg.N / tensor)
    return 4 * cfg.L * (6 * cfg.D + (8 * cfg.H * (cfg.N + cfg.K) + 3 * cfg.F) / tensor)


def layer_bytes(
    cfg: ModelConfig, tokens: float, tensor: int = 1, score_bytes: float = 0, whole_mlp: bool = True
) -> float:
    """About the bytes of one layer's working set in the backward pass; fp32, read off XLA's buffers on a CPU.

    Tokens go first through the MLP (6D + 6NH + 8KH + 7F a token), then through attention (6D + 12NH + 12KH, and its
    scores).

    Args:
        tokens: those that pass through it at a time.
        tensor: devices that share heads and width.
        score_bytes: bytes of the attention scores that exist at a time.
        whole_mlp: all tokens pass through the MLP at once, and not block by block, which takes less than attention.
    """
    queries, keys, mlp = (size / tensor for size in (cfg.N * cfg.H, cfg.K * cfg.H, cfg.F))
    through_mlp = (6 * cfg.D + 6 * queries + 8 * keys + 7 * mlp) * whole_mlp
    through_attention = 6 * cfg.D + 12 * queries + 12 * keys
    return max(4 * through_mlp * tokens, 4 * through_attention * tokens + score_bytes)


def micro_batches(
    cfg: ModelConfig, P: int, G: int, tokens: float, itemsize: int, remat: bool, memory: float
) -> int:
    """The fewest micro-batches whose completions' activations fit in a third of the memory.

    Args:
        tokens: those of a completion, divided by the devices that rows are spread over.
        memory: bytes that a device has.
    """
    rows = P * G * tokens
    needed = kept_bytes(cfg, itemsize, remat) * rows + layer_bytes(cfg, rows)
    for parts in range(1, P * G + 1):
        if P % (parts // math.gcd(parts, G)) == 0 and needed / parts <= memory / 3:
            return parts
    return P * G
