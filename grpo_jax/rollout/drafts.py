"""Drafts that cost no model: what a row is likely to write next, copied from texts that it knows.

`decode` feeds a row's pending token and its draft in one pass, draws the token of every position as it would have been
drawn there anyway, and keeps the draft as far as it equals what was drawn. Drafts therefore decide how many passes a
turn takes, never its tokens. A tool call is mostly copied: names and braces from the schemas, numbers from the
question, the final answer from the result.

Source: prompt lookup decoding (Saxena, 2023) and Yang et al., arXiv:2304.04487, with several texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from grpo_jax.models import target
from grpo_jax.rollout.conversation import Conversation
from grpo_jax.types import Prompt, Schema, ToolCall
from grpo_jax.update.batch import response_bucket

# Tokens of a draft. In gold conversations a pass keeps 2.5 tokens with 3 and 3.2 with 7, and takes a CPU 1.7 times and 2.4 to
# 3.4 times as long as one without (docs/log.md). Fixed: every other number would be one more program.
DRAFTED = 3
COMPARED = 4  # tokens at a row's end that are looked up
NEAR = 16  # a match so few tokens after the place where a row copied last is taken before any other
COPIED = 3  # right tokens of a draft that make its text the one where a row copied last
NONE = -1  # in place of a token
# What a CPU's pass costs whatever it feeds, in tokens (docs/log.md).
FIXED = 16
EXPECTED = 2.5  # tokens that a pass adds to a row before a rollout knows better


def propose(
    recent: Int[Array, "B W"], texts: Int[Array, "B C"], at: Int[Array, " B"]
) -> tuple[Int[Array, "B k"], Int[Array, " B"]]:
    """The tokens that follow a match of a row's last tokens in its texts.

    A match `NEAR` the place where the row copied last is taken first, so that a text is copied in its order (after the
    first parameter of a call comes its second, whatever the value); then the longest match, then the next one.

    Args:
        recent: a row's last tokens, the newest first; `NONE` before its first.
        texts: `NONE` where there is no token.
        at: where in its texts a row copied last.

    Returns:
        (the draft, `NONE` where nothing is drafted; where in `texts` the match ends, at `at` where there is none).
    """
    (B, C), index = texts.shape, jnp.arange(texts.shape[1])
    run, same = jnp.zeros((B, C), jnp.int32), jnp.ones((B, C), bool)
    for i in range(min(recent.shape[1], C)):
        before = jnp.pad(texts[:, : C - i], ((0, 0), (i, 0)), constant_values=NONE)
        same &= (before >= 0) & (before == recent[:, i : i + 1])
        run += same
    ends = jnp.pad(texts[:, 1:] < 0, ((0, 0), (0, 1)), constant_values=True)
    distance = (index[None] - at[:, None]) % C
    rank = jnp.where(ends | (run == 0), 0, run + COMPARED * (distance < NEAR))
    score = rank * C + C - 1 - distance
    best = score.argmax(1)
    places = best[:, None] + 1 + jnp.arange(DRAFTED)[None]
    draft = jnp.take_along_axis(texts, places, 1, mode="fill", fill_value=NONE)
    return jnp.where(score.max(1)[:, None] >= C, draft, NONE), best


def known_texts(conversation: Conversation, prompts: Sequence[Prompt], width: int) -> np.ndarray:
    """What the rows of each prompt know before they write: a call of every tool, then the prompt, [P, C].

    Args:
        width: tokens of the longest prompt.
    """
    schemas = {id(schema): schema for prompt in prompts for schema in prompt.schemas}  # rows share them
    calls = {key: _call(conversation, schema) for key, schema in schemas.items()}
    written = [[token for schema in prompt.schemas for token in calls[id(schema)]] for prompt in prompts]
    room = response_bucket(max(map(len, written)))
    known = np.full((len(prompts), room + width), NONE, np.int32)
    for row, ids, prompt in zip(known, written, prompts, strict=True):
        row[: len(ids)] = ids
        row[room : room + len(prompt.ids)] = prompt.ids
    return known


def _call(conversation: Conversation, schema: Schema) -> list[int]:
    """A call of the tool with all its parameters, in order, as the template writes it; [] where it writes no such turn."""
    function = schema["function"]
    arguments = {name: _value(of) for name, of in function["parameters"].get("properties", {}).items()}
    with contextlib.suppress(ValueError):  # a template that opens with thinking
        return [*conversation.assistant_ids("", [ToolCall(function["name"], arguments)]), NONE]
    return []


def _value(schema: Schema) -> object:
    """Some value of a parameter, as short as its type has."""
    if schema.get("enum"):
        return schema["enum"][0]
    kinds = schema.get("type", "string")
    kind = kinds[0] if isinstance(kinds, list) else kinds
    return {"integer": 0, "number": 0, "boolean": True, "array": [], "object": {}}.get(kind, "")


def pays(rows: int, tokens_per_pass: float | None) -> bool:
    """Whether rows that keep so many tokens of a pass gain by drafts; None: not known yet.

    Only for a CPU, whose cost of a pass is known; no accelerator has measured it. It follows from numbers that are the
    same on every machine, because how rows are fed decides the last bits of their log-probabilities.
    """
    cost = (FIXED + rows * (1 + DRAFTED)) / (FIXED + rows)
    expected = EXPECTED if tokens_per_pass is None else tokens_per_pass
    return target.on_cpu() and target.device_count() == 1 and expected > cost
