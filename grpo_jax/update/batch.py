"""From ragged token lists to the three padded levels of the prefix tree (host side, numpy).

A batch is a tree: one preamble, P prompts, B completions. Shapes come from
buckets, so that a run compiles few programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from grpo_jax.types import StepBatch, Trajectory

SMALLEST_COMPLETION = 64  # shorter completions are padded to it: a second program costs more


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
        """A prompt's own tokens: what follows the preamble, but for the last token."""
        return prompt[len(self.preamble) : -1]


def make_tree(prompts: Sequence[Sequence[int]], budget: int, devices: int = 1) -> Tree:
    """Find the shared preamble of a data set's prompts and choose the buckets.

    Args:
        prompts: token ids of every prompt, each of at least one token.
        budget: tokens that a completion may have.
        devices: along data and fsdp; shared levels are sharded over their tokens.
    """
    preamble = common_prefix(prompts)
    rest = max(len(p) - len(preamble) - 1 for p in prompts)
    return Tree(tuple(preamble), bucket(len(preamble), devices), bucket(rest, devices), budget)


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
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


def pad_rows(rows: Sequence[Sequence], width: int, dtype=np.int32) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows as [n, width], filled with zeros, and where they are real."""
    out = np.zeros((len(rows), width), dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows]).reshape(-1, 1)
    return out, np.arange(width)[None] < lengths


def trunk_arrays(tree: Tree, prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """The preamble's and the prompts' arrays, under their names in `StepBatch`."""
    preamble, preamble_valid = pad_rows([tree.preamble], tree.T0)
    tokens, valid = pad_rows([tree.rest(p) for p in prompts], tree.T1)
    positions = len(tree.preamble) + np.arange(tree.T1, dtype=np.int32)[None].repeat(len(prompts), 0)
    return {
        "preamble": preamble,
        "preamble_valid": preamble_valid,
        "prompts": tokens,
        "prompts_positions": positions,
        "prompts_valid": valid,
    }


def teaching_groups(
    advantages: Sequence[float], learned: Sequence[bool], generations: int, sizes: Sequence[int]
) -> list[int]:
    """The groups to keep: those with a learned row whose advantage is not 0, filled up to the next size.

    Where the loss is made of advantages alone (no KL), the others' gradient is exactly 0: groups whose
    rewards are all equal, which late in a run are most of them.

    Args:
        advantages: [B], a group's rows next to each other.
        learned: [B].
        generations: G.
        sizes: numbers of groups allowed besides all of them.

    Returns:
        Their indices, rising.
    """
    rows = (np.asarray(advantages) != 0) & np.asarray(learned)
    teaches = rows.reshape(-1, generations).any(1)
    size = min((n for n in sizes if n >= teaches.sum()), default=len(teaches))
    return sorted(np.argsort(~teaches, kind="stable")[:size].tolist())


def step_batch(
    tree: Tree,
    trajectories: Sequence[Trajectory],
    generations: int,
    advantages: Sequence[float],
    learned: Sequence[bool] | None = None,
    sizes: Sequence[int] = (),
) -> StepBatch:
    """One update's batch (numpy arrays) from a group-ordered list of trajectories.

    Args:
        tree: of the data set.
        trajectories: B = P·G, a group's rows next to each other.
        generations: G.
        advantages: [B].
        learned: [B], False rows keep their place and teach nothing (`mask_truncated_completions`).
        sizes: numbers of prompts below P that the batch may shrink to, leaving out groups that
            `teaching_groups` does not name; the loss still divides by the tokens and rows of all.
    """
    learned = [True] * len(trajectories) if learned is None else learned
    loss_tokens = sum(t.sampled_tokens for t, keep in zip(trajectories, learned, strict=True) if keep)
    loss_rows = len(trajectories)
    if sizes:
        groups = teaching_groups(advantages, learned, generations, sizes)
        chosen = [g * generations + i for g in groups for i in range(generations)]
        trajectories, advantages, learned = (
            [x[i] for i in chosen] for x in (trajectories, advantages, learned)
        )
    targets = [t.completion_ids for t in trajectories]
    masks = [[m and keep for m in t.sampled_mask] for t, keep in zip(trajectories, learned, strict=True)]
    T2 = completion_bucket(max(map(len, targets)), tree.budget)
    tokens, valid = pad_rows([[t.prompt_ids[-1], *t.completion_ids][:-1] for t in trajectories], T2)
    start = np.array([[len(t.prompt_ids) - 1] for t in trajectories], np.int32)
    return StepBatch(
        **trunk_arrays(tree, [t.prompt_ids for t in trajectories[::generations]]),
        completions=tokens,
        completions_positions=start + np.arange(T2, dtype=np.int32),
        completions_valid=valid,
        targets=pad_rows(targets, T2)[0],
        sampled_mask=pad_rows(masks, T2, bool)[0],
        sampler_logprobs=pad_rows([t.logprobs for t in trajectories], T2, np.float32)[0],
        old_logprobs=None,
        ref_logprobs=None,
        advantages=np.asarray(advantages, np.float32),
        loss_tokens=np.int32(loss_tokens),
        loss_rows=np.int32(loss_rows),
        loss_positions=completion_bucket(max(map(sum, masks)), tree.budget),
    )
