"""Whether the final text states the results of the tools; docs/evaluation.md has examples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from grpo_jax.data.rows import parsed_text
from grpo_jax.types import PARSER_NAME, Message, Trajectory

_NUMBER = re.compile(
    r"(?:(?<!\w)[-−][$€£]?)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:e[-+]?[0-9]{1,3}(?!\w))?"
)
# What is quoted, and whether it is the key of an object, which an answer need not repeat. An escaped quote outside of
# quotes, as in a text that was cut, begins none: each would be looked for an end anew.
_QUOTED = re.compile(r'\\.|(?:"((?:[^"\\]|\\.)*+)"|(?<!\w)\'([^\'\n]*)\'(?!\w))(\s*:)?', re.S)


def is_grounded(messages: Sequence[Message], must_state: Any = None) -> bool | None:
    """Whether the last assistant message states the values of the tool results.

    The values of a result are its numbers and what it quotes, or where it has neither all of its text. Numbers
    are compared by value, so that `1,234.50` states `1234.5`; text as the `accuracy` reward compares it, by
    whole words without regard to case and whitespace.

    Args:
        messages: those after the prompt.
        must_state: the row's column of this name: tools whose results (all that are no errors) must be
            stated; None for the last result of any tool.

    Returns:
        None where no tool has answered.
    """
    results = [(m.get("name"), m["content"]) for m in messages if m["role"] == "tool"]
    results = [(name, text) for name, text in results if name != PARSER_NAME]
    if not results:
        return None
    named, stated = parsed_text(must_state), results[-1:]
    if named is not None:
        stated = [(n, text) for n, text in results if n in named and not text.startswith("Error:")]
        if set(named) - {name for name, _ in stated}:
            return False  # one of them has not answered
    final = next((m.get("content") or "" for m in reversed(messages) if m["role"] == "assistant"), "")
    return _states(final, [text for _, text in stated])


def trajectory_grounded(trajectory: Trajectory) -> bool:
    """The figure `answer_grounded` of one completion; False where no tool has answered."""
    return bool(is_grounded(trajectory.messages, trajectory.prompt.example.extra.get("must_state")))


def _states(final: str, results: Iterable[str]) -> bool:
    final = _plain(final)
    numbers = _numbers(final)
    for text in map(_plain, results):
        values = _QUOTED.sub(lambda found: " " if found[3] else found[0], text)
        wanted = _numbers(values)
        quoted = [a or b for a, b, key in _QUOTED.findall(text) if (a or b) and not key]
        if text and not wanted and not quoted:
            quoted = [text]
        if not wanted <= numbers or not all(_occurs(one, final) for one in quoted):
            return False
    return True


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _numbers(text: str) -> set[Decimal]:
    return {Decimal(re.sub("[,$€£]", "", n).replace("−", "-")) for n in _NUMBER.findall(text)}


def _occurs(words: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words.strip())}(?!\w)", text) is not None
