"""The financial job's reward for the whole conversation: 0.8 for the call, 0.2 for what the user reads.

The call is scored as in financial_tools_reward.py. The 0.2 are for a conversation that the model ended
with a text that holds every number of the last tool result, or where no tool should be called, for no call.
"""

from .financial_tools_reward import PARSER_NAME, financial_tools_reward
from .math_answer_reward import CLOSED, numbers

OF_CALL, OF_TEXT = 0.8, 0.2


def financial_answer_reward(
    completions: list[list[dict]], answer: list[str], statuses: list[str], **kwargs
) -> list[float]:
    """Score each conversation as above.

    Args:
        completions: the messages after the prompt, one list a row.
        answer: what the gold call returns, one text a row.
        statuses: how each conversation ended.
        **kwargs: data set columns; `tool_call` or `ground_truth` holds the gold call.

    Returns:
        One reward from 0 to 1 a row.

    Raises:
        ValueError: the data set has neither column.
    """
    of_calls = financial_tools_reward(completions, answer, **kwargs)
    told = [
        status in CLOSED and _told(messages) for messages, status in zip(completions, statuses, strict=True)
    ]
    return [
        OF_CALL * call + OF_TEXT * (call == 1.0 if states is None else states)
        for call, states in zip(of_calls, told, strict=True)
    ]


def _told(messages: list[dict]) -> bool | None:
    """Whether the final text holds the numbers of the last result; None without any result."""
    results = [m["content"] for m in messages if m["role"] == "tool" and m.get("name") != PARSER_NAME]
    text = next((m.get("content") or "" for m in reversed(messages) if m["role"] == "assistant"), "")
    return numbers(results[-1]) <= numbers(text) if results else None


reward_func = financial_answer_reward
