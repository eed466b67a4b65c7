"""A dense reward for the call itself: how much of the gold call was written.

| part                                                                   | weight |
|------------------------------------------------------------------------|--------|
| the tool's name                                                        | 0.2    |
| parameter names: those in both calls / those in either                 | 0.2    |
| parameter values: share of the gold values that were reproduced        | 0.6    |

A call to another tool scores 0. With several calls each gold call is paired with at most
one of the model's, best pairs first, and the sum of their scores is divided by the larger
number of calls, so a missing or needless call costs its share. Where the gold list is
empty or null (no tool should be called), trying no call scores 1 and any call 0.

Values: numbers count as equal when they agree to a millionth, texts when they differ only in
case and outer whitespace, lists and objects in proportion to their equal entries. The gold
calls are a row's `tool_call`, or where that is null its `ground_truth`, in which every null is
padding and is ignored. It needs no tool run: `answer` is not read.
"""

import math

NAME, PARAMETERS, VALUES = 0.2, 0.2, 0.6


def tool_call_reward(completions: list[list[dict]], **kwargs) -> list[float]:
    """Score the calls of each conversation by the table above.

    Args:
        completions: the messages after the prompt, one list a row.
        **kwargs: data set columns; `tool_call` or `ground_truth` holds the gold call or calls.

    Returns:
        One reward from 0 to 1 a row.

    Raises:
        ValueError: the data set has neither column.
    """
    if kwargs.get("tool_call") is None and kwargs.get("ground_truth") is None:
        raise ValueError("tool_call_reward needs the gold calls in a column tool_call or ground_truth")
    absent = [None] * len(completions)
    columns = [kwargs.get(name) or absent for name in ("tool_call", "ground_truth")]
    return [_row_score(*row) for row in zip(completions, *columns, strict=True)]


def _row_score(completion: list[dict], tool_call, ground_truth) -> float:
    padded = tool_call is None
    gold = (ground_truth if padded else tool_call) or []
    if not gold and any("<tool_call>" in (message.get("content") or "") for message in completion):
        return 0.0  # a call that does not parse was tried
    return score(_calls(completion), [gold] if isinstance(gold, dict) else gold, padded)


def score(calls: list[dict], gold: list[dict], padded: bool = False) -> float:
    """Greedy best match of calls with gold calls; see the module's text.

    Args:
        calls: the model's calls, each with `name` and `arguments`.
        gold: the gold calls.
        padded: nulls in the gold arguments are padding.

    Returns:
        The score from 0 to 1.
    """
    if not calls or not gold:
        return 1.0 if not calls and not gold else 0.0
    pairs = [
        (call_score(call, one, padded), i, j) for i, call in enumerate(calls) for j, one in enumerate(gold)
    ]
    total, used_calls, used_gold = 0.0, set(), set()
    # Best first; equal scores in the order of the calls.
    for value, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if i not in used_calls and j not in used_gold:
            total += value
            used_calls.add(i)
            used_gold.add(j)
    return total / max(len(calls), len(gold))


def call_score(call: dict, gold: dict, padded: bool = False) -> float:
    """The score of one call against one gold call: 0.2 name + 0.2 parameters + 0.6 values."""
    if call["name"] != gold["name"]:
        return 0.0
    given = call["arguments"] if isinstance(call["arguments"], dict) else {}
    wanted = gold["arguments"]
    if padded:
        given, wanted = _without_nulls(given), _without_nulls(wanted)
    either = given.keys() | wanted.keys()
    if not either:
        return 1.0
    names = len(given.keys() & wanted.keys()) / len(either)
    values = [likeness(given[key], wanted[key]) if key in given else 0.0 for key in wanted]
    # A gold call without arguments has no value to miss.
    return NAME + PARAMETERS * names + VALUES * (sum(values) / len(values) if values else 1.0)


def likeness(given, wanted) -> float:
    """1 for equal values, 0 for different ones, the share of equal entries for lists and objects."""
    if isinstance(given, dict) and isinstance(wanted, dict):
        given, wanted = _without_nulls(given), _without_nulls(wanted)
        keys = given.keys() | wanted.keys()
        shared = given.keys() & wanted.keys()
        return sum(likeness(given[key], wanted[key]) for key in shared) / len(keys) if keys else 1.0
    if isinstance(given, list) and isinstance(wanted, list):
        longest = max(len(given), len(wanted))
        return sum(map(likeness, given, wanted)) / longest if longest else 1.0
    # True equals 1 in Python, but not for a tool.
    if isinstance(given, bool) or isinstance(wanted, bool):
        return float(given is wanted)
    if isinstance(given, int | float) and isinstance(wanted, int | float):
        return float(_close(given, wanted))
    if isinstance(given, str) and isinstance(wanted, str):
        return float(given.strip().lower() == wanted.strip().lower())
    return float(given is None and wanted is None)


def _close(given: float, wanted: float) -> bool:
    try:
        return math.isclose(given, wanted, rel_tol=1e-6, abs_tol=1e-9)
    except OverflowError:  # a whole number beyond the range of floats
        return given == wanted


def _calls(completion: list[dict]) -> list[dict]:
    return [call["function"] for message in completion for call in message.get("tool_calls") or []]


def _without_nulls(arguments: dict) -> dict:
    return {key: value for key, value in arguments.items() if value is not None}


reward_func = tool_call_reward
