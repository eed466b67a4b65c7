"""A reward for every turn: did it make the gold call of its place?

The k-th turn of the model gets 1.0 when one of its calls is the k-th gold call, 0.0 when none is. A turn behind
the last gold call, such as the final text, gets no number. Such a reward says which turn was wrong; combine it with
one that scores the outcome: `--reward_fn rewards/multi_step_reward.py rewards/turn_reward.py`.
"""

from .multi_step_reward import same_call


def turn_reward(completions: list[list[dict]], answer: list[str], **kwargs) -> list[list[float | None]]:
    """Score every turn of each conversation.

    Args:
        completions: the messages after the prompt, one list a row.
        answer: not used.
        **kwargs: data set columns; `tool_call` holds the list of gold calls.

    Returns:
        One list a row, with one number or None per assistant message.

    Raises:
        ValueError: the data set has no column `tool_call`.
    """
    if "tool_call" not in kwargs:
        raise ValueError("turn_reward needs the list of gold calls in a column tool_call")
    return [score(*row) for row in zip(completions, kwargs["tool_call"], strict=True)]


def score(completion: list[dict], gold: dict | list[dict] | None) -> list[float | None]:
    """The numbers of one conversation."""
    gold = [gold] if isinstance(gold, dict) else gold or []
    turns = [m.get("tool_calls") or [] for m in completion if m["role"] == "assistant"]
    made = [
        float(any(same_call(call["function"], one) for call in calls))
        for calls, one in zip(turns, gold, strict=False)
    ]
    return made + [None] * (len(turns) - len(made))


reward_func = turn_reward
