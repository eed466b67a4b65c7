"""What would keep a job from learning, seen from its rows, their gold calls and its rewards.

Pure functions from what was measured to hints; `check` measures and prints.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from grpo_jax.data.gold import failed_call, show_call
from grpo_jax.scoring.rewards import same_answer
from grpo_jax.text import shorten
from grpo_jax.types import Example, Outcome, Status, ToolCall, ToolResult, Trajectory

SHOWN_CHARACTERS = 200  # of a text that a hint quotes
NO_CALL, WRONG, GOLD = range(3)  # columns of the rewards of conversations written by hand

BY_CASE = "only by case, or by outer or repeated whitespace"
BY_FORMAT = "only by number format or whitespace"
BY_TEXT = "by more than number format and whitespace"


@dataclasses.dataclass(frozen=True)
class Hint:
    """Something that was found in a job.

    Args:
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
        return sum(spans if self.trajectory.status is Status.TOOLS_DONE else spans[:-2])

    @property
    def turns(self) -> int:
        """Tool turns: one per gold call."""
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
        none_runs = all(
            result.outcome is not Outcome.OK for row in gold for _, result in row.trajectory.calls
        )
        of_rows = f"the gold calls of {len(failed)} of {len(gold)} rows do not run"
        first = next(pair for row in failed if (pair := row.failed))
        hints.append(
            Hint(
                f"{failed[0].example.source}: {'no gold call runs' if none_runs else of_rows}; the first: "
                f"{show_call(*first)}; correct the call or the tool",
                fatal=none_runs,
            )
        )
    differing: dict[str, list[Gold]] = {}
    for row in gold:
        if not row.failed and (kind := difference(row.result, row.example.answer)):
            differing.setdefault(kind, []).append(row)
    for kind, rows in differing.items():
        example, result = rows[0].example, rows[0].result
        text = (
            f"{example.source}: {len(rows)} of {len(gold)} answers differ from what their gold calls return {kind}; "
            f"here the answer is {quoted(example.answer)}, the tool returns {quoted(result)}; write answers as the "
            "tools return them"
        )
        hints.append(Hint(text + ", or compare them without these, as accuracy does" * (kind == BY_CASE)))
    return hints


def difference(result: str, answer: str) -> str | None:
    """How a tool's result differs from the answer: BY_CASE, BY_FORMAT or BY_TEXT; None where it does not."""
    if result == answer:
        return None
    if same_answer(result, answer):
        return BY_CASE
    return BY_FORMAT if normalised(result) == normalised(answer) else BY_TEXT


def normalised(text: str) -> str:
    """The text without whitespace, case and currency signs, each number in one form: $1,000.0 is 1000."""
    text = re.sub(r"[\s$€£]", "", text.casefold())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\d+(\.\d+)?", lambda number: f"{Decimal(number[0]).normalize():f}", text)


def evaluation_hints(examples: Sequence[Example]) -> list[Hint]:
    """Evaluation rows that have no figures, because their answers are all errors."""
    if not all(example.wants_error for example in examples):
        return []
    return [
        Hint(
            f"{examples[0].source}: the answers of all {len(examples)} evaluation rows begin with 'Error:'; such rows "
            "are counted separately, so the three figures of an evaluation will be empty; add rows with other answers"
        )
    ]


# Answers without gold calls


def form_hints(
    examples: Sequence[Example], results: Mapping[str, Sequence[str]], *, none: bool
) -> list[Hint]:
    """Answers that cannot be checked, and answers in another form than the tools' results.

    A result's form is the words that all known results of a tool share, as labels are. Numbers, and words
    that change with the arguments, are no part of it.

    Args:
        results: tool → what it returned in some calls; empty where no call is known that it accepts.
        none: no row of the data has a gold call.
    """
    hints = []
    if none:
        hints.append(
            Hint(
                f"{examples[0].source}: no row has a gold call (column tool_call or ground_truth), so it could not be "
                "checked whether the tools return the answers; add gold calls, to a few rows at least"
            )
        )
    answers = [e for e in examples if not e.wants_error]
    called = {name: texts for name, texts in results.items() if texts}
    if not answers or not called:
        return hints
    other = [e for e in answers if not any(_has_form(e.answer, texts) for texts in called.values())]
    if 2 * len(other) > len(answers):
        name, texts = next(iter(called.items()))
        hints.append(
            Hint(
                f"{other[0].source}: {len(other)} of {len(answers)} answers of rows without gold calls look like nothing "
                f"that the tools return ({len(called)} of {len(results)} tools could be called): here the answer is "
                f"{quoted(other[0].answer)}, {name} returns {quoted(texts[0])}; load the tools that the data was made "
                "with (tools_script, tool_functions_module), or write answers as the tools return them"
            )
        )
    return hints


def _has_form(answer: str, texts: Sequence[str]) -> bool:
    """Whether an answer could be a result of the tool that returned these texts."""
    words = [_words(text) for text in texts]
    common = set.intersection(*words)
    if not common:  # numbers alone, or nothing that could be held against the answer
        return any(words) or not _words(answer)
    return 2 * len(common & _words(answer)) >= len(common)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{2,}", text.casefold()))


def made_up_arguments(parameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments that fit the JSON schema of a tool's parameters; required ones alone, then all.

    Numbers of several sizes are tried, because a tool may refuse ages of 1000 or amounts of 1.
    """
    properties = parameters.get("properties", {})
    for names in (parameters.get("required", []), list(properties)):
        for number in (1, 20, 1000, 0.5):
            # different numbers for different parameters: a minimum is seldom above its maximum
            yield {name: _made_up(properties[name], number * (1 + i)) for i, name in enumerate(names)}


def corrected(arguments: Mapping[str, Any], error: str) -> dict[str, Any] | None:
    """Arguments with the one that an error asks for: "age must be from 18 to 80", "state must be one of AL, …".

    None where the error says neither of any argument, or the argument already complies.
    """
    number = r"(-?(?:\d+(?:\.\d+)?|\.\d+))"
    if found := re.search(
        rf"(\w+)(?:\[\d+\])* must be .*?(?:from|between) {number} (?:to|and) {number}", error
    ):
        low, high = float(found[2]), float(found[3])
        value = (low + high) / 2
        value = int(value) if value >= 2 else value
    elif found := re.search(r"(\w+)(?:\[\d+\])* must be one of ['\"]?([^,'\"]+)", error):
        value = found[2]
    else:
        return None
    new = _replaced(arguments, found[1], value)
    return None if new == arguments else new


def _replaced(part: Any, name: str, value: Any) -> Any:
    if isinstance(part, Mapping):
        return {
            key: value if key == name and not isinstance(one, dict | list) else _replaced(one, name, value)
            for key, one in part.items()
        }
    return [_replaced(one, name, value) for one in part] if isinstance(part, list) else part


def _made_up(schema: Mapping[str, Any], number: float) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    for options in (schema.get("anyOf"), schema.get("oneOf")):
        if options:
            return _made_up(options[0], number)
    kind = schema.get("type")
    kind = next((k for k in kind if k != "null"), None) if isinstance(kind, list) else kind
    match kind:
        case "integer":
            return max(1, int(number))
        case "number":
            return number
        case "boolean":
            return True
        case "array":
            return [_made_up(schema.get("items", {}), number)]
        case "object":
            properties = schema.get("properties", {})
            return {name: _made_up(one, number) for name, one in properties.items()} or {"a": number}
        case "null":
            return None
    return "example"


def second_call_hints(results: Mapping[str, Sequence[ToolResult]]) -> list[Hint]:
    """Tools that answer an equal call differently than before.

    Args:
        results: tool → results of one call, in the order in which it was made again and again; the first
            time it ran.
    """
    hints = []
    for name, (first, *later) in results.items():
        other = next((one for one in later if one.text != first.text), None)
        if other is None:
            continue
        said = (
            f"{name} returns {quoted(first.text)}, and {quoted(other.text)} when the same call is made again in the "
            "same worker"
        )
        if other.outcome is Outcome.OK:
            fix = (
                "equal calls of a step run once (tool_cache), and a reward that compares results sees chance: make "
                "the tool depend on its arguments alone, or set tool_cache to false"
            )
        else:
            fix = "a worker serves many calls: keep nothing between them that one uses up, as a client that it closes"
        hints.append(Hint(f"{said}; {fix}", fatal=other.outcome is not Outcome.OK))
    return hints


# Tokens


def preamble_hints(examples: Sequence[Example], prompt_tokens: Sequence[int], preamble: int) -> list[Hint]:
    """A preamble that is under half of a prompt, and what varies in it.

    Args:
        prompt_tokens: number of tokens of each whole prompt.
        preamble: number of tokens that all prompts share.
    """
    mean = sum(prompt_tokens) / len(prompt_tokens)
    if 2 * preamble >= mean:
        return []
    # what precedes the questions and differs between rows
    first, causes = examples[0], []

    def first_other(part: Callable[[Example], Any]) -> Example | None:
        return next((e for e in examples if part(e) != part(first)), None)

    def system(example: Example) -> str:
        message = example.messages[0]
        return message["content"] if message["role"] == "system" else ""

    def tools(example: Example) -> list[str] | None:
        return example.extra.get("tools")

    if other := first_other(system):
        a, b = system(first), system(other)
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        start = max(0, same - 20)  # a little before they differ
        a, b = ("… " * (start > 0) + quoted(text[start : same + 40]) for text in (a, b))
        causes.append(
            f"the system message varies, first between {first.source} ({a}) and {other.source} ({b}); "
            "move what varies into the user's message"
        )
    if other := first_other(tools):
        causes.append(
            f"the column 'tools' varies, first between {first.source} ({quoted(tools(first))}) and "
            f"{other.source} ({quoted(tools(other))}); show all rows the same tools"
        )
    causes = causes or [
        "the messages after the system message are longer than it and the tool schemas; nothing to fix"
    ]
    text = f"the preamble that prompts share, and that is computed once, is under half of a prompt ({preamble} of "
    return [Hint(text + f"{mean:.1f} tokens): " + "; ".join(causes))]


def limit_hints(gold: Sequence[Gold], budget: int, max_turns: int | None) -> list[Hint]:
    """Gold conversations that are cut off by the token budget or by the limit of tool turns.

    A result still counts where the budget ends after its call, so only calls that do not fit are fatal.

    Args:
        gold: the rows; those whose calls do not run are not looked at.
        budget: max_grpo_completion_length, tokens after the prompt.
        max_turns: max_tool_calling_iterations; None for no limit.
    """
    hints, rows = [], [row for row in gold if not row.failed]
    turns, needed = [row.turns for row in rows], [row.tokens_of_calls for row in rows]
    for unit, limit, option, counts, least in (
        ("tokens", budget, "max_grpo_completion_length", [row.tokens for row in rows], needed),
        ("tool turns", max_turns, "max_tool_calling_iterations", turns, turns),
    ):
        if limit is not None and (over := [i for i, n in enumerate(counts) if n > limit]):
            text = (
                f"{rows[over[0]].example.source}: {len(over)} of {len(rows)} gold conversations exceed {limit} {unit}, "
                f"this one has {counts[over[0]]}; raise {option} to {max(counts)}"
            )
            hints.append(Hint(text, fatal=min(least) > limit))
    return hints


# Rewards


def reward_hints(rows: Sequence[Gold], rewards: np.ndarray) -> list[Hint]:
    """Gold conversations that earn too little.

    Args:
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


def second_score_hints(rows: Sequence[Gold], first: np.ndarray, second: np.ndarray) -> list[Hint]:
    """The same conversations that earn something else when they are scored again, after an update.

    Args:
        first: [n, 3], as `reward_hints` takes them.
        second: [n, 3] of the second time.
    """
    differ = ~np.isclose(first, second, equal_nan=True).all(1)
    if not differ.any():
        return []
    i = int(np.argmax(differ))
    before, after = (", ".join(map(figure, values[i])) for values in (first, second))
    return [
        Hint(
            f"{rows[i].example.source}: the conversations of {differ.sum()} of {len(rows)} rows earn something else when "
            f"they are scored again after an update (no call, wrong call, own: {before}, then {after}); that is right "
            "for a judge or a curriculum, else look for what the reward keeps between calls"
        )
    ]


_WHERE = "correct the reward function: the result is the content of the last message with role tool"


def _reward_hint(row: Gold, rewards: np.ndarray, found: str, *, fatal: bool) -> Hint:
    no_call, wrong, gold = map(figure, rewards)
    earned = f"here it earns {gold}, a wrong call {wrong}, no call {no_call}"
    differs = (
        f"the answer is {quoted(row.example.answer)}, the tool returns {quoted(row.result)}: make them equal"
    )
    fix = f"the tool returns the answer, so {_WHERE}" if row.result == row.example.answer else differs
    return Hint(f"{row.example.source}: {found}; {earned}; {fix}", fatal)


# Text


def quoted(value: Any) -> str:
    """A value as JSON, shortened."""
    return shorten(json.dumps(value, ensure_ascii=False), SHOWN_CHARACTERS)


def figure(value: float) -> str:
    """A reward in three digits; NaN means that none applies."""
    return "none" if np.isnan(value) else f"{value:.3g}"
