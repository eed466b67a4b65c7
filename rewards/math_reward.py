"""Reward of the quickstart: did the last tool response give the answer?

| completion | reward |
|---|---|
| no tool call | 0.0 |
| a tool call, and the last tool response is not the answer | 0.3 |
| the last tool response is the answer (case and outer whitespace ignored) | 1.0 |
"""


def math_reward(completions, answer, **kwargs):
    """Score each completion by the table above.

    Args:
        completions: the messages after each prompt.
        answer: what the tool should return, one per completion.

    Returns:
        One reward per completion.
    """
    return [score(messages, expected) for messages, expected in zip(completions, answer, strict=True)]


def score(messages, expected):
    """Score one completion."""
    called, response = False, None
    for message in messages:
        if message.get("tool_calls"):
            called = True
        # "tool_call_parser" answers a call that does not parse: no tool has run.
        if message["role"] == "tool" and message.get("name") != "tool_call_parser":
            called, response = True, message["content"]
    if response is not None and response.strip().lower() == expected.strip().lower():
        return 1.0
    return 0.3 if called else 0.0


reward_func = math_reward
