"""From trajectories, which are ragged, to the batch of an update, the padded prefix tree.

A batch is a tree: one preamble, P prompts, B completions. Shapes come from buckets, so that a run
compiles few programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from grpo_jax.data.batches import choose_groups
from grpo_jax.models.level import AnyArray, Level
from grpo_jax.types import Trajectory

SMALLEST_COMPLETION = 64  # shorter completions are padded to it: another program costs more


@dataclasses.dataclass(frozen=True)
class Tree:
    """The lengths of a data set's prefix tree and what its rows share.

    Args:
        preamble: the longest common token prefix of all prompts, at most the shortest prompt − 1.
        T0: bucket of the preamble, in tokens; 0 when nothing is shared.
        T1: bucket of the longest rest of a prompt, without its last token.
        budget: tokens that a completion may have.
    """

    preamble: tuple[int, ...]
    T0: int
    T1: int
    budget: int

    def rest(self, prompt: Sequence[int]) -> Sequence[int]:
        """A prompt's own tokens: what follows the preamble, except the last token."""
        return prompt[len(self.preamble) : -1]


def make_tree(prompts: Sequence[list[int]], budget: int, devices: int = 1) -> Tree:
    """Find the shared preamble of a data set's prompts and choose the buckets.

    Args:
        prompts: token ids of every prompt, each of at least one token.
        devices: along data and fsdp; shared levels are sharded over their tokens.
    """
    preamble = common_prefix(prompts)
    rest = max(len(p) - len(preamble) - 1 for p in prompts)
    return Tree(tuple(preamble), bucket(len(preamble), devices), bucket(rest, devices), budget)


def common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The longest common prefix, at most the shortest prompt − 1 (a last token stays to predict from)."""
    low, high = min(prompts), max(prompts)  # what these two share, all share
    limit = min(len(p) for p in prompts) - 1
    same = 0
    while same < limit and low[same] == high[same]:
        same += 1
    return list(low[:same])


def bucket(n: int, devices: int = 1) -> int:
    """The padded length of a shared level: 16, 32, multiples of 64, from 512 on of 128, and of the devices."""
    if n == 0:
        return 0
    size = next((b for b in (16, 32) if n <= b), -(-n // 64) * 64 if n <= 512 else -(-n // 128) * 128)
    return -(-size // devices) * devices


def completion_bucket(n: int, budget: int) -> int:
    """The padded length of completions: 64, 128, 256, … while well under the budget, else all of it."""
    whole = -(-budget // 16) * 16
    size = SMALLEST_COMPLETION
    while size < n:
        size *= 2
    return size if size <= 0.75 * whole else whole


def response_bucket(n: int) -> int:
    """The padded length of the tokens fed after a tool turn: a power of two from 32 on."""
    size = 32
    while size < n:
        size *= 2
    return size


def update_shapes(budget: int) -> list[tuple[int, int]]:
    """Every (T2, J) that a batch may have: padded completions, and loss positions per row."""
    sizes = sorted({completion_bucket(n, budget) for n in range(1, budget + 1)})
    return [(T2, J) for T2 in sizes for J in sizes if J <= T2]


def response_shapes(budget: int) -> list[int]:
    """Every padded length of a tool response that leaves a token of the budget."""
    return sorted({response_bucket(n) for n in range(1, budget)})


def pad_rows(rows: Sequence[Any], width: int, dtype: DTypeLike = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows as [n, width], filled with zeros, and where they are real."""
    out = np.zeros((len(rows), width), dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows]).reshape(-1, 1)
    return out, np.arange(width)[None] < lengths


def preamble_level(tree: Tree) -> Level:
    """What all prompts share, [1, T0]."""
    tokens, valid = pad_rows([tree.preamble], tree.T0)
    return Level(tokens, np.arange(tree.T0, dtype=np.int32)[None], valid, shared=True)


def prompts_level(tree: Tree, prompts: Sequence[Sequence[int]]) -> Level:
    """Each prompt's own tokens except its last, [P, T1]."""
    tokens, valid = pad_rows([tree.rest(p) for p in prompts], tree.T1)
    positions = len(tree.preamble) + np.arange(tree.T1, dtype=np.int32)[None].repeat(len(prompts), 0)
    return Level(tokens, positions, valid, shared=True)


@struct.dataclass
class Completions:
    """What an update learns from: one row per completion.

    A row of `level` holds the prompt's last token and the completion without its last token, so that its
    position t predicts token t of the completion, which is target t.

    Args:
        level: [b, T2] tokens.
        targets: [b, T2] the token ids that follow those of `level`.
        trained: [b, T2] True where the target was sampled and is in the loss.
        sampler_logprobs: [b, T2] nats, the sampler's; 0 where not sampled.
        advantages: [b]; [b, T2] where tokens have advantages of their own, as `targets` lie.
        old_logprobs: [b, T2] nats of the policy before this batch's first update; None means the current
            ones (one update per batch).
        ref_logprobs: [b, T2] nats of the frozen reference; None when beta is 0.
    """

    level: Level
    targets: Int[AnyArray, "b T2"]
    trained: Bool[AnyArray, "b T2"]
    sampler_logprobs: Float[AnyArray, "b T2"]
    advantages: Float[AnyArray, " b"] | Float[AnyArray, "b T2"]
    old_logprobs: Float[AnyArray, "b T2"] | None = None
    ref_logprobs: Float[AnyArray, "b T2"] | None = None


@struct.dataclass
class Batch:
    """What one update sees: the three levels of the prefix tree, and what its loss divides by.

    Args:
        preamble: [1, T0].
        prompts: [P, T1].
        completions: B rows.
        tokens: trained tokens of the whole batch; groups without an advantage may be left out of
            `completions` and still count here.
        rows: the whole batch's completions.
        J: loss positions per row, a bucket that no row's count of trained tokens exceeds.
    """

    preamble: Level
    prompts: Level
    completions: Completions
    tokens: Int[AnyArray, ""]
    rows: Int[AnyArray, ""]
    J: int = struct.field(pytree_node=False)

    @property
    def trunk(self) -> tuple[Level, ...]:
        """The levels above the completions; one without tokens is left out."""
        return tuple(level for level in (self.preamble, self.prompts) if level.tokens.shape[1])

    def with_logprobs(self, **logprobs: AnyArray) -> Batch:
        """The batch with `old_logprobs` or `ref_logprobs`."""
        return dataclasses.replace(self, completions=dataclasses.replace(self.completions, **logprobs))


def make_batch(
    tree: Tree,
    trajectories: Sequence[Trajectory],
    generations: int,
    *,
    mask_truncated: bool = False,
    sizes: Sequence[int] = (),
) -> Batch:
    """One update's batch (numpy arrays) from trajectories with their advantages.

    Args:
        trajectories: B = P·G, a group's completions next to each other.
        generations: G.
        mask_truncated: leave completions that the token budget ended out of the loss
            (`mask_truncated_completions`); they keep their place.
        sizes: numbers of prompts below P that the batch may shrink to, leaving out groups that
            `groups_to_keep` does not name; the loss still divides by the tokens and rows of all.
    """
    in_loss = [not (mask_truncated and t.status.truncated) for t in trajectories]
    tokens = sum(t.sampled_tokens for t, kept in zip(trajectories, in_loss, strict=True) if kept)
    chosen = range(len(trajectories))
    if sizes:
        useful = [t.has_advantage and kept for t, kept in zip(trajectories, in_loss, strict=True)]
        groups = groups_to_keep(np.any(np.reshape(useful, (-1, generations)), axis=1), sizes)
        chosen = [g * generations + i for g in groups for i in range(generations)]
    rows = [trajectories[i] for i in chosen]
    masks = [[m and in_loss[i] for m in trajectories[i].sampled_mask] for i in chosen]
    T2 = completion_bucket(max(len(t.completion_ids) for t in rows), tree.budget)
    inputs, valid = pad_rows([[t.prompt.ids[-1], *t.completion_ids][:-1] for t in rows], T2)
    start = np.array([[len(t.prompt.ids) - 1] for t in rows], np.int32)
    advantages = np.array([t.advantage for t in rows], np.float32)
    if rows[0].token_advantages is not None:  # all have them, or none
        advantages = pad_rows([t.token_advantages for t in rows], T2, np.float32)[0]
    return Batch(
        preamble=preamble_level(tree),
        prompts=prompts_level(tree, [t.prompt.ids for t in rows[::generations]]),
        completions=Completions(
            level=Level(inputs, start + np.arange(T2, dtype=np.int32), valid),
            targets=pad_rows([t.completion_ids for t in rows], T2)[0],
            trained=pad_rows(masks, T2, bool)[0],
            sampler_logprobs=pad_rows([t.logprobs for t in rows], T2, np.float32)[0],
            advantages=advantages,
        ),
        tokens=np.array(tokens, np.int32),
        rows=np.array(len(trajectories), np.int32),
        J=completion_bucket(max(map(sum, masks)), tree.budget),
    )


def groups_to_keep(useful: Sequence[bool] | np.ndarray, sizes: Sequence[int]) -> list[int]:
    """The groups to keep in an update: those with an advantage, filled up to the next size.

    Where the loss is made of advantages alone (no KL), the gradient of the others is exactly 0: groups
    whose rewards are all equal, which late in a run are most of them.

    Args:
        useful: [P] whether a group has a completion in the loss whose advantage is not 0.
        sizes: numbers of groups allowed in addition to all of them.

    Returns:
        Their indices, rising.
    """
    useful = np.asarray(useful, bool)
    size = min((n for n in sizes if n >= useful.sum()), default=len(useful))
    return choose_groups(useful, size).tolist()
