"""A sampler that writes what a script says: its own decode program runs, and each drawn token is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.rollout import sampler as sampler_module
from grpo_jax.rollout.sampling import Sampling, row_keys
from grpo_jax.types import Prompt


def forced(prompts: Sequence[Prompt], script: Sequence[Sequence[int]], seed: int = 0) -> Callable[..., Any]:
    """`sample`, to be put in its place while decode is traced.

    A row is known by its key, and the token by its position.

    Args:
        prompts: P of them, with draws 0 … P - 1.
        script: what follows each prompt, responses included, for each of its completions: P·G lists of tokens.
        seed: of the rollout.
    """
    P, G = len(prompts), len(script) // len(prompts)
    keys = jnp.asarray(row_keys(seed, np.repeat(np.arange(P), G), np.tile(np.arange(G), P)))
    table = np.zeros((P * G, max(map(len, script))), np.int32)
    for row, ids in enumerate(script):
        table[row, : len(ids)] = ids
    starts = jnp.asarray(np.repeat([len(prompt.ids) for prompt in prompts], G))
    sample = sampler_module.sample

    def draw(logits: Any, of: Any, positions: Any, sampling: Sampling, constrain: Any) -> Any:
        token, logprob = sample(logits, of, positions, sampling, constrain)
        row = (of[:, None] == keys[None]).all(-1).argmax(1)
        at = jnp.clip(positions - starts[row], 0, table.shape[1] - 1)
        return jnp.asarray(table)[row, at] + 0 * token, logprob

    return draw
