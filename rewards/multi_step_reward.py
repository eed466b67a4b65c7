"""Reward for questions that need several calls, each using the one before.

| the conversation                                                             | reward      |
|------------------------------------------------------------------------------|-------------|
| makes no call that parses                                                    | 0.0         |
| makes calls, but not the first gold call                                     | 0.1         |
| makes the first k of n gold calls, in order                                  | 0.1 + 0.5·k/n |
| the same, and every further gold call is to the right tool                   | + 0.1       |
| its last result is the answer, but a gold call was left out                  | 0.8         |
| makes all gold calls in order, and its last result is the answer             | 1.0         |

Other calls in between do no harm. A call equals a gold call when its name and arguments
do; numbers may differ by a ten-thousandth of their value, as when cents are dropped
between the steps. The gold calls are the data set's column `tool_call`. Where they are null or
an empty list (no tool should be called), no call scores 1 and any call 0.
"""

import math


def multi_step_reward(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """Score each conversation by the table above.

    Args:
        completions: the messages after the prompt, one list a row.
        answer: what the last gold call returns, one text a row.
        **kwargs: data set columns; `tool_call` holds the list of gold calls.

    Returns:
        One reward from 0 to 1 a row.

    Raises:
        ValueError: the data set has no column `tool_call`.
    """
    gold = kwargs.get("tool_call")
    if gold is None:
        raise ValueError("multi_step_reward needs the list of gold calls in a column tool_call")
    return [score(*row) for row in zip(completions, answer, gold, strict=True)]


def score(completion: list[dict], answer: str, gold: dict | list[dict] | None) -> float:
    """The reward of one conversation."""
    gold = [gold] if isinstance(gold, dict) else gold
    calls = [call["function"] for message in completion for call in message.get("tool_calls") or []]
    # "tool_call_parser" answers a call that does not parse: no tool has run.
    results = [
        m["content"] for m in completion if m["role"] == "tool" and m.get("name") != "tool_call_parser"
    ]
    if not gold:
        tried = calls or any("<tool_call>" in (message.get("content") or "") for message in completion)
        return 0.0 if tried else 1.0
    if not calls:
        return 0.0
    made = steps_made(calls, gold, same_call)
    if results and results[-1].strip().lower() == answer.strip().lower():
        return 1.0 if made == len(gold) else 0.8
    reward = 0.1 + 0.5 * made / len(gold)
    named = steps_made(calls, gold, lambda call, one: call["name"] == one["name"])
    return reward + 0.1 if made and named == len(gold) else reward


def steps_made(calls: list[dict], gold: list[dict], same) -> int:
    """How many gold calls, from the first on, occur among the calls in their order."""
    made = 0
    for call in calls:
        if made < len(gold) and same(call, gold[made]):
            made += 1
    return made


def same_call(call: dict, gold: dict) -> bool:
    """Same tool, same parameters, same values."""
    return call["name"] == gold["name"] and same_value(call["arguments"], gold["arguments"])


def same_value(given, wanted) -> bool:
    """Equal, number by number to a ten-thousandth."""
    if isinstance(given, dict) and isinstance(wanted, dict):
        return given.keys() == wanted.keys() and all(same_value(given[key], wanted[key]) for key in wanted)
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(same_value, given, wanted))
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(given, int | float) and isinstance(wanted, int | float):
        try:
            return math.isclose(given, wanted, rel_tol=1e-4)
        except OverflowError:  # a whole number beyond the range of floats
            return given == wanted
    return given == wanted


reward_func = multi_step_reward
