"""The Flax port as properties: the prefix tree, causality, positions, names, configs.

Numbers of the published models: `test_qwen_golden.py` and `test_qwen_torch.py`.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_weights
from parity import QWEN2, QWEN3

from grpo_jax.models.qwen import (
    Level,
    ModelConfig,
    abstract_params,
    check_params,
    extend,
    head_weights,
    init_params,
    rms_norm,
    rope_tables,
    rotate,
)
from grpo_jax.prefix_tree import pad_rows

SHRUNK = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40}
MODELS = {
    "qwen2": ModelConfig.from_hf(QWEN2 | SHRUNK),
    "qwen3": ModelConfig.from_hf(QWEN3 | SHRUNK | {"tie_word_embeddings": True}),
}
QWEN = MODELS["qwen3"]

# real lengths of the one preamble, the two prompts and the six completions; 0 leaves the level out
TREES = {
    "three levels": (11, (5, 3), (9, 4, 7, 1, 6, 9)),
    "no preamble": (0, (5, 3), (9, 4, 7, 1, 6, 9)),
    "no prompts": (11, (0, 0), (9, 4, 7, 1, 6, 9)),
}
PADDING = 3  # slots that no row uses, on every level


@functools.cache
def weights(model):
    return random_weights(MODELS[model], seed=0)


def as_list(params):
    """The rollout's form: layers one by one."""
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(QWEN.L)]
    return params | {"layers": layers}


def level(rows, starts, shared=False, gap=0):
    """Ragged rows, padded, at positions that start where the level above ends."""
    width = max(map(len, rows)) + PADDING
    tokens, valid = pad_rows(rows, width)
    positions = np.asarray(starts, np.int32)[:, None] + gap + np.arange(width, dtype=np.int32)
    return Level(*map(jnp.asarray, (tokens, positions, valid)), shared=shared)


def tree_levels(tree):
    """(levels of the tree, one level of flat rows, [(level, row, first place in its flat rows)])."""
    T0, T1, T2 = TREES[tree]
    rng = np.random.default_rng(1)
    preamble, *rest = [rng.integers(0, 50, n).tolist() for n in (T0, *T1, *T2)]
    prompts, completions = rest[: len(T1)], rest[len(T1) :]
    share = len(T2) // len(T1)
    flat = [preamble + prompts[b // share] + c for b, c in enumerate(completions)]
    starts = [T0 + len(prompts[b // share]) for b in range(len(T2))]
    levels = [level([preamble], [0], shared=True)] if T0 else []
    levels += [level(prompts, [T0] * len(T1), shared=True)] if any(T1) else []
    return (*levels, level(completions, starts)), level(flat, [0] * len(flat)), starts


def flat_hidden(hidden, levels):
    """Hidden states of a tree's levels, every row written out: [B, positions, D]."""
    B = levels[-1].tokens.shape[0]
    out = np.zeros((B, 64, hidden[0].shape[-1]), np.float32)
    for h, lv in zip(hidden, levels, strict=True):
        n = lv.tokens.shape[0]
        for b in range(B):
            real = np.asarray(lv.valid[b * n // B])
            out[b, np.asarray(lv.positions[b * n // B])[real]] = np.asarray(h[b * n // B])[real]
    return out


@functools.partial(jax.jit, static_argnames=("model", "remat"))
def hidden_and_gradient(params, levels, model, remat=False):
    """Hidden states of all levels; the gradient of what the completions' tokens at their positions score.

    The score is Σ hidden · direction(row, position) over real tokens of the last level's
    rows, with positions counted in whole rows, so that trees and flat rows can be compared.
    """
    cfg = MODELS[model]

    def score(params):
        hidden, _ = extend(params, levels, cfg=cfg, remat=remat, keep_kv=False)
        last = levels[-1]
        rows = jnp.arange(last.tokens.shape[0])[:, None]
        place = (rows * 64 + last.positions)[..., None] * cfg.D + jnp.arange(cfg.D)
        return (hidden[-1] * jnp.sin(place) * (last.valid & learned(last))[..., None]).sum(), hidden

    return jax.grad(score, has_aux=True)(params)


def learned(last):
    """Flat rows hold the trunk too, which teaches nothing by itself: only positions from 16 on do."""
    return last.positions >= FIRST_LEARNED


FIRST_LEARNED = 0
