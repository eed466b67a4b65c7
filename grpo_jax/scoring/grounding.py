"""Whether the final text states the results of the tools; docs/evaluation.md has examples."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from grpo_jax.data.rows import parsed_text
from grpo_jax.types import Message, Trajectory, tool_results

# A letter or digit of a script that separates words. Thai, Lao, Burmese, Khmer, Chinese and Japanese do not: there a
# word has no end that could be seen.
_IN_WORD = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
_NUMBER = re.compile(
    rf"(?:(?<!{_IN_WORD})[-−][$€£¥₹₩]?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)(?:e[-+]?[0-9]{1,3}(?!\w))?"
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
    results = tool_results(messages)
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
    for text in results:
        quoted: list[str] = []

        def read(found: re.Match[str], quoted: list[str] = quoted) -> str:
            value = found[1] or found[2]
            if found[1]:
                with contextlib.suppress(ValueError):  # what is not JSON is taken as it is
                    value = json.loads(f'"{value}"', strict=False)
            if found[3]:
                return " "
            if value:
                quoted.append(_plain(value))
            return found[0] if value is None else f'"{value}"'

        wanted = _numbers(_plain(_QUOTED.sub(read, text)))
        if text.strip() and not wanted and not quoted:
            quoted.append(_plain(text))
        whole_words = (rf"(?<!{_IN_WORD}){re.escape(one)}(?!{_IN_WORD})" for one in quoted)
        if not wanted <= numbers or not all(re.search(words, final) for words in whole_words):
            return False
    return True


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _numbers(text: str) -> set[Decimal]:
    return {Decimal(re.sub("[,$€£¥₹₩]", "", n).replace("−", "-")) for n in _NUMBER.findall(text)}
