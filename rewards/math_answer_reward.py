"""The maths job's reward for the whole conversation: the right result, told to the user.

| completion                                                                | reward |
|---------------------------------------------------------------------------|--------|
| no tool call                                                              | 0.0    |
| a tool call, and the last tool response is not the answer                 | 0.3    |
| the last tool response is the answer, but the user is not told            | 0.7    |
| the same, and the model ends with a text that holds its numbers           | 1.0    |
"""

import re

from .math_reward import score

# how a conversation ends when the model closes its turn without a call
CLOSED = ("answered", "tool_error", "tool_timeout")


def math_answer_reward(completions, answer, statuses, **kwargs):
    """Score each completion by the table above.

    Args:
        completions: the messages after each prompt.
        answer: what the tool should return, one per completion.
        statuses: how each completion ended.

    Returns:
        One reward per completion.
    """
    rewards = []
    for messages, expected, status in zip(completions, answer, statuses, strict=True):
        reward = score(messages, expected)
        text = next((m.get("content") or "" for m in reversed(messages) if m["role"] == "assistant"), "")
        if reward == 1.0 and not (status in CLOSED and numbers(expected) <= numbers(text)):
            reward = 0.7
        rewards.append(reward)
    return rewards


def numbers(text):
    """The numbers in a text, with their signs; a thousands separator is a comma."""
    found = re.findall(r"(?:(?<![\w.])[-−])?\d[\d,]*(?:\.\d+)?", text.replace(", ", " "))
    return {float(number.replace(",", "").replace("−", "-")) for number in found}


reward_func = math_answer_reward
