"""Log-probabilities and entropies from hidden states, without ever holding [B, T, V]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.attention import dot_fp32
from grpo_jax.models.level import AnyArray
from grpo_jax.models.target import on_cpu

NEG = -1e30  # the first running maximum


def first_positions(mask: Bool[AnyArray, "B T"], J: int) -> tuple[Int[Array, "B J"], Bool[Array, "B J"]]:
    """Per row, the indices of its first J True entries, and which of the J are real."""
    index = jnp.argsort(~mask, axis=1, stable=True)[:, :J]
    return index, jnp.take_along_axis(mask, index, 1)


def token_logprobs(
    hidden: Float[Array, "B J D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B J"],
    temperature: float = 1.0,
    *,
    logits_bytes: int | None = None,
    shards: int = 1,
    constrain=lambda x, kind: x,
) -> tuple[Float[Array, "B J"], Float[Array, "B J"]]:
    """log softmax(hidden · headᵀ / temperature)[target], and the entropy, in nats and fp32.

    One pass over blocks of the vocabulary with a running maximum and sum; the backward pass
    computes each block's logits again. Only one block of logits exists at a time, and a block's
    gradient is written once: cutting positions instead adds to all of it once per cut. A loss
    that does not use the entropy does not pay for its gradient.

    Args:
        hidden: final hidden states at the positions that predict `targets`.
        head: output head, or the tied embedding table.
        logits_bytes: what one block of fp32 logits should stay under, by half more where that cuts
            V evenly; None means 16 MB on a CPU, which stay in its cache, and 256 MB elsewhere.
        shards: equal parts that V is sharded into; every block takes its share of each.
        constrain: sharding constraint by kind ("head_hidden", "head", "head_blocks", "logits_block").

    Returns:
        (log-probabilities, entropies).

    Source: the online softmax of Milakov & Gimelshein, arXiv:1805.02867, as in
        Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
    """
    B, J, D = hidden.shape
    if logits_bytes is None:
        logits_bytes = logits_block_bytes(on_cpu())
    plan = _Blocks.of(head.shape[0], shards, max(1, logits_bytes // (4 * B * J)), constrain, on_cpu())
    head = constrain(head.astype(hidden.dtype), "head")
    hidden_RD = constrain(hidden, "head_hidden").reshape(B * J, D)
    out: Any = _logprobs(hidden_RD, head, targets.reshape(B * J), temperature, plan)
    return tuple(x.reshape(B, J) for x in out)


def logits_block_bytes(on_cpu: bool) -> int:
    """What one block of fp32 logits should stay under where the caller does not say."""
    return (16 if on_cpu else 256) << 20


class _Blocks(NamedTuple):
    """How the vocabulary is cut: `count` blocks of `shards` × `width` rows of the head."""

    V: int
    shards: int
    count: int
    width: int
    constrain: Callable[[Any, str], Any]

    @classmethod
    def of(cls, V: int, shards: int, limit: int, constrain, on_cpu: bool):
        """The fewest even blocks of at most `limit` rows, or of half as many more; else the last is padded.

        Padding costs a copy of the head and a pass more over every block. On a TPU a block that ends within a tile of 8
        rows costs a copy too: of 151,936 rows 16 blocks of 9,496 are parts of the head, 32 of 4,748 are not.
        """
        local, tile = V // shards, 1 if on_cpu else 8
        limit = max(1, min(local, limit // shards))
        fewest = -(-local // limit)
        # on a CPU not half as many more itself, which would sum in another order than before
        least = max(2 * fewest // 3 + on_cpu, 1)
        counts = (*range(fewest, 2 * fewest), *range(fewest - 1, least - 1, -1))
        even = [n for n in counts if local % n == 0]
        count = next((n for n in even if local // n % tile == 0), (*even, fewest)[0])
        width = -(-local // count)
        if not (on_cpu or even):
            width += -width % tile
            count = -(-local // width)
        return cls(V, shards, count, width, constrain)

    def cut(self, head_VD):
        """[V, D] -> [count, shards · width, D]; a shard's rows stay on their device.

        Shards are not a separate dimension: for a single one a CPU would copy the whole head.
        """
        D = head_VD.shape[1]
        x = head_VD.reshape(self.shards, -1, D)
        x = jnp.pad(x, ((0, 0), (0, self.count * self.width - x.shape[1]), (0, 0)))
        x = x.reshape(self.shards, self.count, self.width, D).swapaxes(0, 1)
        return self.constrain(x.reshape(self.count, -1, D), "head_blocks")

    def join(self, blocks):
        """The inverse of `cut`."""
        x = blocks.reshape(self.count, self.shards, self.width, -1).swapaxes(0, 1)
        x = x.reshape(self.shards, self.count * self.width, -1)
        return x[:, : self.V // self.shards].reshape(self.V, -1)

    def by_shard(self, block):
        """[shards · width, D] -> [shards, width, D]."""
        return block.reshape(self.shards, self.width, -1)

    def tokens(self, block):
        """[shards, width, 1] token ids of a block; V where a row is padding."""
        local = self.V // self.shards
        row = block * self.width + jnp.arange(self.width)
        ids = row[None] + local * np.arange(self.shards)[:, None]
        ids = jnp.where((row < local)[None], ids, self.V)
        return ids[..., None]

    def logits(self, head_block, hidden_DR, tokens, temperature):
        """[shards, width, R] fp32. Positions come last, so that neither pass transposes a block."""
        x = dot_fp32("swd,dr->swr", head_block, hidden_DR) / temperature
        x = x if self.count * self.width * self.shards == self.V else jnp.where(tokens < self.V, x, 2 * NEG)
        return self.constrain(x, "logits_block")

    def of_targets(self, logits, targets_R, block):
        """[R] logits of the targets that are rows of this block, 0 for others.

        Each shard gathers along its own rows: nothing moves when V is sharded, and no block-sized mask is made.
        """
        local = self.V // self.shards
        row = targets_R[None] - block * self.width - local * np.arange(self.shards)[:, None]
        here = (row >= 0) & (row < jnp.minimum(self.width, local - block * self.width))
        mine = jnp.take_along_axis(logits, jnp.where(here, row, 0)[:, None], 1)[:, 0]
        return jnp.where(here, mine, 0).sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logprobs(hidden_RD, head_VD, targets_R, temperature, plan):
    return _sums(hidden_RD, head_VD, targets_R, temperature, plan)[0]


def _forward(hidden_RD, head_VD, targets_R, temperature, plan):
    hidden_RD, head_VD, targets_R = (x.value for x in (hidden_RD, head_VD, targets_R))
    out, log_z = _sums(hidden_RD, head_VD, targets_R, temperature, plan)
    return out, (hidden_RD, head_VD, targets_R, log_z, out[1])


def _sums(hidden_RD, head_VD, targets_R, temperature, plan):
    hidden_DR = hidden_RD.T

    def step(carry, x):
        peak, total, weighted, target = carry
        tokens = plan.tokens(x[1])
        logits = plan.logits(plan.by_shard(x[0]), hidden_DR, tokens, temperature)
        target = target + plan.of_targets(logits, targets_R, x[1])
        new_peak = jnp.maximum(peak, logits.max((0, 1)))
        mass, shrink = jnp.exp(logits - new_peak[None, None]), jnp.exp(peak - new_peak)
        total = total * shrink + mass.sum((0, 1))
        weighted = weighted * shrink + (mass * logits).sum((0, 1))
        return (new_peak, total, weighted, target), None

    zeros = jnp.zeros(targets_R.shape, jnp.float32)
    blocks = (plan.cut(head_VD), jnp.arange(plan.count))
    (peak, total, weighted, target), _ = jax.lax.scan(step, (zeros + NEG, zeros, zeros, zeros), blocks)
    log_z = peak + jnp.log(total)
    return (target - log_z, log_z - weighted / total), log_z


def _backward(temperature, plan, residuals, cotangents):
    hidden_RD, head_VD, targets_R, log_z, entropy = residuals
    entropy_counts = not isinstance(cotangents[1], SymbolicZero)
    zeros_R = jnp.zeros(targets_R.shape, jnp.float32)
    scaled, of_entropy = ((zeros_R if isinstance(x, SymbolicZero) else x) / temperature for x in cotangents)
    hidden_DR = hidden_RD.T

    def step(d_hidden_DR, x):
        block, tokens = plan.by_shard(x[0]), plan.tokens(x[1])
        logits = plan.logits(block, hidden_DR, tokens, temperature)
        mass = jnp.exp(logits - log_z[None, None])
        d_logits = (jnp.where(tokens == targets_R[None, None], 1.0, 0.0) - mass) * scaled[None, None]
        if entropy_counts:
            surprise = logits - log_z[None, None] + entropy[None, None]
            d_logits = d_logits - mass * surprise * of_entropy[None, None]
        d_logits = d_logits.astype(hidden_RD.dtype)
        d_hidden_DR = d_hidden_DR + dot_fp32("swd,swr->dr", block, d_logits)
        d_block = dot_fp32("swr,rd->swd", d_logits, hidden_RD).astype(head_VD.dtype)
        return d_hidden_DR, d_block.reshape(x[0].shape)

    zeros = jnp.zeros(hidden_DR.shape, jnp.float32)
    d_hidden_DR, d_head = jax.lax.scan(step, zeros, (plan.cut(head_VD), jnp.arange(plan.count)))
    return d_hidden_DR.T.astype(hidden_RD.dtype), plan.join(d_head), None


_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
