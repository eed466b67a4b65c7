"""The work of a GRPO step in FLOP and bytes, the least time that a machine could take for it, and its activations.

Pure arithmetic; docs/performance.md has the same formulas with their reasons. Letters as in DESIGN and
`grpo_jax.types`; one multiply-add is 2 FLOP. Only what no implementation can leave out is counted: no
padding, no norms, no softmax, and the last layer of the two shared levels computes keys and values only,
since nobody reads its output.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from grpo_jax.models.qwen import ModelConfig


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What a step is made of, in rows and tokens without padding.

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


class Machine(NamedTuple):
    """What a machine was measured to reach: FLOP/s of a matrix product, bytes/s of a copy."""

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
    """(FLOP, bytes read) of decoding token t of every row.

    FLOP: B·(L·(2W + 4NH·(T0 + T1 + t + 1)) + 2DV). Bytes: every weight once, the preamble's keys and
    values once, each prompt's once, each row's own: itemsize·(LW + DV + 2KHL·(T0 + P·T1 + B·(t + 1))).

    Args:
        cfg: sizes.
        x: lengths.
        t: tokens that the row has fed before.
        itemsize: bytes of a weight, a key or a value.
    """
    keys = x.T0 + x.T1 + t + 1
    flop = x.B * (cfg.L * (2 * layer_weights(cfg) + 4 * cfg.N * cfg.H * keys) + 2 * cfg.D * cfg.V)
    slots = x.T0 + x.P * x.T1 + x.B * (t + 1)
    read = cfg.L * layer_weights(cfg) + cfg.D * cfg.V + 2 * cfg.K * cfg.H * cfg.L * slots
    return flop, itemsize * read


def update_flop(cfg: ModelConfig, x: Lengths, remat: bool) -> dict[str, float]:
    """FLOP of one update by level.

    Per token and layer: 2W forward and 4W backward; a key costs 4NH forward and 10NH backward (scores are
    made again, never kept). With remat the forward is run again, but for attention, which keeps its output
    and log-sum-exp, and the MLP's last product, whose result the backward pass does not need: 2(W - DF).
    Head: 2DV a token, again in the backward pass, and twice that for the two gradients: 8DV.

    Args:
        cfg: sizes.
        x: lengths.
        remat: layers are recomputed in the backward pass.
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


def least_prefill(cfg: ModelConfig, x: Lengths, machine: Machine) -> float:
    """Seconds: FLOP alone."""
    return sum(prefill_flop(cfg, x).values()) / machine.flops


def least_decode(cfg: ModelConfig, x: Lengths, machine: Machine, itemsize: int) -> tuple[float, str]:
    """(seconds, what binds): per step the longer of its FLOP and its bytes."""
    steps = [decode_step(cfg, x, t, itemsize) for t in range(x.T2)]
    flop = sum(f for f, _ in steps) / machine.flops
    read = sum(b for _, b in steps) / machine.bytes
    least = sum(max(f / machine.flops, b / machine.bytes) for f, b in steps)
    return least, "bytes" if read > flop else "FLOP"


def least_update(cfg: ModelConfig, x: Lengths, remat: bool, machine: Machine) -> float:
    """Seconds: FLOP alone."""
    return sum(update_flop(cfg, x, remat).values()) / machine.flops


def update_bytes(
    cfg: ModelConfig, x: Lengths, itemsize: int, score_bytes: float, logits_bytes: float
) -> float:
    """About the temporary bytes of an update with remat, gradients included; not a lower bound.

    4·weights for the gradients, every layer's input and what attention returned (D + NH a token, and N
    log-sum-exps in fp32), one layer's values and their cotangents in fp32 (4D + 4NH + 3F a token), and
    three arrays of the size of a block of scores and of a chunk of logits.
    One formula for every device, to bound what XLA reports; `activation_bytes` is the finer one, by part.

    Args:
        cfg: sizes.
        x: lengths.
        itemsize: bytes of an activation.
        score_bytes: of a block of attention scores.
        logits_bytes: of a chunk of logits.
    """
    tokens = x.T0 + x.P * x.T1 + x.B * x.T2
    kept = kept_bytes(cfg, itemsize) * tokens
    layer = 8 * tokens * (4 * cfg.D + 4 * cfg.N * cfg.H + 3 * cfg.F)
    return 4 * weights(cfg) + kept + layer + 3 * (score_bytes + logits_bytes)


def kept_bytes(cfg: ModelConfig, itemsize: int, tensor: int = 1) -> float:
    """Bytes a token that remat keeps: every layer's input, attention's output and its fp32 log-sum-exp.

    Args:
        cfg: sizes.
        itemsize: bytes of an activation.
        tensor: devices that share heads.
    """
    return cfg.L * (itemsize * cfg.D + (itemsize * cfg.H + 4) * cfg.N / tensor)


def activation_bytes(
    cfg: ModelConfig,
    shared: float,
    rows: float,
    itemsize: int,
    remat: bool,
    tensor: int = 1,
    score_bytes: float = 0,
    mlp_tokens: float = math.inf,
) -> tuple[float, float]:
    """About the bytes of an update's activations on one device: (kept by all layers, one layer's working set).

    Values a token, in fp32. Without `remat` every layer keeps 6D + 8NH + 8KH + 3F: norms, projections before
    and after their norm and rotation, the MLP. With it `kept_bytes` are kept, and the backward pass makes
    the others again: 2D + 2NH + 4KH + 2F wait for their turn (2F only where the MLP takes all tokens at once).
    It takes the shared levels and the completions one after the other, first through the MLP (6D + 6NH + 8KH +
    7F; in blocks 14D + 6NH + 8KH, 7F for a block, twice its weights' gradients), then through attention (6D +
    12NH + 12KH, and blocks of scores). The numbers are read off XLA's buffers on a CPU: tests/test_plan.py
    compares.

    Args:
        cfg: sizes.
        shared: tokens of the preamble and the prompts.
        rows: tokens of the completions.
        itemsize: bytes of a layer's input.
        remat: layers are recomputed in the backward pass.
        tensor: devices that share heads and width.
        score_bytes: of attention scores at a time.
        mlp_tokens: that the MLP takes at a time under `remat`.
    """
    queries, keys, mlp = (size / tensor for size in (cfg.N * cfg.H, cfg.K * cfg.H, cfg.F))
    first, level = min(shared, rows), max(shared, rows)
    if remat:
        kept = kept_bytes(cfg, itemsize, tensor) * (shared + rows)
        waiting = 4 * (2 * cfg.D + 2 * queries + 4 * keys + 2 * mlp * (first <= mlp_tokens)) * first
    else:
        kept = 4 * cfg.L * (6 * cfg.D + 8 * queries + 8 * keys + 3 * mlp) * (shared + rows)
        waiting = 0
        mlp_tokens = math.inf
    through_mlp = 4 * ((6 * cfg.D + 6 * queries + 8 * keys) * level + 7 * mlp * min(level, mlp_tokens))
    if level > mlp_tokens:
        through_mlp += 4 * (8 * cfg.D * level + 2 * 3 * cfg.D * mlp)
    through_attention = 4 * (6 * cfg.D + 12 * queries + 12 * keys) * level + score_bytes
    return kept, waiting + max(through_mlp, through_attention)


def micro_batches(
    cfg: ModelConfig, P: int, G: int, tokens: float, itemsize: int, remat: bool, memory: float
) -> int:
    """The fewest micro-batches whose completions' activations fit in a third of the memory.

    Args:
        cfg: sizes.
        P: prompts per update.
        G: completions per prompt.
        tokens: of a completion, divided by the devices that rows are spread over.
        itemsize: bytes of an activation.
        remat: layers are recomputed in the backward pass.
        memory: of a device, in bytes.
    """
    needed = sum(activation_bytes(cfg, 0, P * G * tokens, itemsize, remat))
    for parts in range(1, P * G + 1):
        if P % (parts // math.gcd(parts, G)) == 0 and needed / parts <= memory / 3:
            return parts
    return P * G
