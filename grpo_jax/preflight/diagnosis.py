"""What would keep a job from learning, told from its rows, their gold calls and its rewards.

Pure functions from what was measured to hints; `check` measures and prints.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from grpo_jax.data.gold import failed_call
from grpo_jax.scoring.rewards import same_answer
from grpo_jax.types import Example, Outcome, ToolCall, ToolResult, Trajectory

SHOWN_CHARACTERS = 200  # of a text that a hint quotes
NO_CALL, WRONG, GOLD = range(3)  # columns of the rewards of conversations written by hand

BY_CASE = "only by case, or by outer or repeated blanks"
BY_FORMAT = "only by number format or blanks"
BY_TEXT = "by more than number format and blanks"


@dataclasses.dataclass(frozen=True)
class Hint:
    """Something that was found in a job.

    Args:
        text: where, what, and the mend.
        fatal: because of it no right answer would be rewarded.
    """

    text: str
    fatal: bool = False


@dataclasses.dataclass(frozen=True)
class Gold:
    """A row with its gold conversation, whose calls have run."""

    example: Example
    trajectory: Trajectory

    @property
    def tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.trajectory.completion_ids)

    @property
    def tokens_of_calls(self) -> int:
        """Tokens up to the end of the last call; its result and the answer follow."""
        spans = [len([*span]) for _, span in itertools.groupby(self.trajectory.sampled_mask)]
        return sum(spans[:-2])

    @property
    def turns(self) -> int:
        """Tool turns: a gold call has one of its own."""
        return len(self.trajectory.calls)

    @property
    def result(self) -> str:
        """What the last call returned."""
        return self.trajectory.calls[-1][1].text

    @property
    def answers(self) -> bool:
        """The last call returned the answer, as the `accuracy` reward compares them."""
        return same_answer(self.result, self.example.answer)

    @property
    def failed(self) -> tuple[ToolCall, ToolResult] | None:
        """The first call that did not run, unless its error is the answer."""
        return failed_call(self.trajectory.calls, self.answers)


# Gold calls


def gold_hints(gold: Sequence[Gold]) -> list[Hint]:
    """Gold calls that do not run, and results that are not the answer."""
    hints = []
    if failed := [row for row in gold if row.failed]:
        outcomes = [result.outcome for row in gold for _, result in row.trajectory.calls]
        hints.append(_failed_hint(failed, len(gold), none_runs=Outcome.OK not in outcomes))
    differing: dict[str, list[Gold]] = {}
    for row in gold:
        if not row.failed and (kind := difference(row.result, row.example.answer)):
            differing.setdefault(kind, []).append(row)
    return hints + [_difference_hint(kind, rows, len(gold)) for kind, rows in differing.items()]


def difference(result: str, answer: str) -> str | None:
    """How a tool's result differs from the answer: BY_CASE, BY_FORMAT or BY_TEXT; None where it does not."""
    if result == answer:
        return None
    if same_answer(result, answer):
        return BY_CASE
    return BY_FORMAT if normalised(result) == normalised(answer) else BY_TEXT


def normalised(text: str) -> str:
    """The text without blanks, case and currency signs, each number in one form: $1,000.0 is 1000."""
    text = re.sub(r"[\s$€£]", "", text.casefold())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\d+(\.\d+)?", lambda number: f"{Decimal(number[0]).normalize():f}", text)


def _failed_hint(failed: Sequence[Gold], rows: int, *, none_runs: bool) -> Hint:
    call, result = failed[0].failed
    arguments = shown(", ".join(f"{name}={value!r}" for name, value in call.arguments.items()))
    return Hint(
        f"{failed[0].example.source}: "
        + ("no gold call runs" if none_runs else f"the gold calls of {len(failed)} of {rows} rows do not run")
        + f"; the first, {call.name}({arguments}), returns {quoted(result.text)}; correct the call or the tool",
        fatal=none_runs,
    )


def _difference_hint(kind: str, rows: Sequence[Gold], of: int) -> Hint:
    first = rows[0]
    text = (
        f"{first.example.source}: {len(rows)} of {of} answers differ from what their gold calls return {kind}; "
        f"here the answer is {quoted(first.example.answer)}, the tool returns {quoted(first.result)}; write "
        "answers as the tools return them"
    )
    return Hint(text + (", or compare them without these, as accuracy does" if kind == BY_CASE else ""))


# Tokens


def preamble_hints(examples: Sequence[Example], prompt_tokens: Sequence[int], preamble: int) -> list[Hint]:
    """A preamble that is under half of a prompt, and what varies in it.

    Args:
        examples: the rows.
        prompt_tokens: of each whole prompt.
        preamble: tokens that all prompts share.
    """
    mean = sum(prompt_tokens) / len(prompt_tokens)
    if 2 * preamble >= mean:
        return []
    causes = _varying(examples) or [
        "the messages after the system message are longer than it and the tool schemas; nothing to mend"
    ]
    text = f"the preamble that prompts share, and that is computed once, is under half of a prompt ({preamble} of "
    return [Hint(text + f"{mean:.1f} tokens): " + "; ".join(causes))]


def _varying(examples: Sequence[Example]) -> list[str]:
    """What precedes the questions and differs between rows."""
    first, causes = examples[0], []
    if other := _first_other(examples, _system_message):
        a, b = _around_difference(_system_message(first), _system_message(other))
        causes.append(
            f"the system message varies, first between {first.source} ({a}) and {other.source} ({b}); "
            "move what varies into the user's message"
        )
    if other := _first_other(examples, _tools):
        causes.append(
            f"the column 'tools' varies, first between {first.source} ({quoted(_tools(first))}) and "
            f"{other.source} ({quoted(_tools(other))}); show all rows the same tools"
        )
    return causes


def _first_other(examples: Sequence[Example], part: Callable[[Example], Any]) -> Example | None:
    return next((e for e in examples if part(e) != part(examples[0])), None)


def _system_message(example: Example) -> str:
    first = example.messages[0]
    return first["content"] if first["role"] == "system" else ""


def _tools(example: Example) -> list[str] | None:
    return example.extra.get("tools")


def _around_difference(a: str, b: str) -> tuple[str, str]:
    """Both texts, quoted from a little before they part."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - 20)
    return tuple("… " * (start > 0) + quoted(text[start : same + 40]) for text in (a, b))


def limit_hints(gold: Sequence[Gold], budget: int, max_turns: int | None) -> list[Hint]:
    """Gold conversations that are cut off by the token budget or by the limit of tool turns.

    A result still counts where the budget ends after its call, so only calls that do not fit are fatal.

    Args:
        gold: the rows; those whose calls do not run are not looked at.
        budget: max_grpo_completion_length, tokens after the prompt.
        max_turns: max_tool_calling_iterations; None for no limit.
    """
    hints, rows = [], [row for row in gold if not row.failed]
    if over := [row for row in rows if row.tokens > budget]:
        found = _over(over[0], f"{len(over)} of {len(rows)}", "tokens", over[0].tokens, budget)
        most, fatal = max(row.tokens for row in over), all(row.tokens_of_calls > budget for row in rows)
        hints.append(Hint(f"{found}; raise max_grpo_completion_length to {most}", fatal))
    if max_turns is not None and (over := [row for row in rows if row.turns > max_turns]):
        found = _over(over[0], f"{len(over)} of {len(rows)}", "tool turns", over[0].turns, max_turns)
        most, fatal = max(row.turns for row in over), len(over) == len(rows)
        hints.append(Hint(f"{found}; raise max_tool_calling_iterations to {most}", fatal))
    return hints


def _over(first: Gold, share: str, unit: str, count: int, limit: int) -> str:
    return f"{first.example.source}: {share} gold conversations exceed {limit} {unit}, this one has {count}"


# Rewards


def reward_hints(rows: Sequence[Gold], rewards: np.ndarray) -> list[Hint]:
    """Gold conversations that earn too little.

    Args:
        rows: n of them.
        rewards: [n, 3] of each row's NO_CALL, WRONG and GOLD conversation; NaN where none applies.
    """
    better = earns_more(rewards)
    if np.isnan(rewards).all():
        return [Hint(f"{rows[0].example.source}: no reward applies to any conversation", fatal=True)]
    top = np.nanmax(rewards)
    if not (better & (rewards[:, GOLD] == top)).any():
        found = f"no gold conversation earns the top reward; the most that anything earns is {figure(top)}"
        return [_reward_hint(rows[0], rewards[0], found, fatal=True)]
    if better.all():
        return []
    found = f"{np.sum(~better)} of {len(rows)} gold conversations earn no more than a wrong call, or none"
    first = int(np.argmin(better))
    return [_reward_hint(rows[first], rewards[first], found, fatal=False)]


def earns_more(rewards: np.ndarray) -> np.ndarray:
    """[n] whether each row's GOLD conversation earns more than its other two; False where it has no reward."""
    return rewards[:, GOLD] > np.fmax(np.fmax(rewards[:, NO_CALL], rewards[:, WRONG]), -np.inf)


def made_up_hints(rows: Sequence[Gold], rewards: np.ndarray) -> list[Hint]:
    """The same for rows without gold calls, whose GOLD call is made up: nothing is certain then."""
    if earns_more(rewards).any():
        return []
    no_call, wrong, gold = map(figure, rewards[0])
    return [
        Hint(
            f"{rows[0].example.source}: a call whose result is the answer earns {gold}, one that fails {wrong}, no "
            f"call {no_call}; unless the reward looks for the right call, which this is not, {_WHERE}"
        )
    ]


_WHERE = "correct the reward function: the result is the content of the last message with role tool"


def _reward_hint(row: Gold, rewards: np.ndarray, found: str, *, fatal: bool) -> Hint:
    no_call, wrong, gold = map(figure, rewards)
    earned = f"here it earns {gold}, a wrong call {wrong}, no call {no_call}"
    differs = (
        f"the answer is {quoted(row.example.answer)}, the tool returns {quoted(row.result)}: make them equal"
    )
    mend = f"the tool returns the answer, so {_WHERE}" if row.result == row.example.answer else differs
    return Hint(f"{row.example.source}: {found}; {earned}; {mend}", fatal)


# Text


def quoted(value: Any) -> str:
    """A value as JSON, shortened."""
    return shown(json.dumps(value, ensure_ascii=False))


def shown(text: str) -> str:
    """A text, shortened."""
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def figure(value: float) -> str:
    """A reward in three digits; NaN means that none applies."""
    return "none" if np.isnan(value) else f"{value:.3g}"
