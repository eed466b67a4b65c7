"""Tool call validation: right tool and right result.

| the last call                                            | reward |
|----------------------------------------------------------|--------|
| is absent, does not parse, or is to another tool         | 0.0    |
| is to the expected tool, with another result             | 0.5    |
| is to the expected tool, and its result is the answer    | 1.0    |

The expected tool is the data set's column `expected_tool`, or the name in its column
`tool_call` (the last one's, where there are several). Outer blanks and case are ignored.
"""


def validated_reward(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """Score each conversation by the table above.

    Args:
        completions: the messages after the prompt, one list a row.
        answer: the expected tool result, one text a row.
        **kwargs: data set columns; `expected_tool` or `tool_call` names the expected tool.

    Returns:
        One reward, 0, 0.5 or 1, a row.

    Raises:
        ValueError: the data set has neither column.
    """
    rewards = []
    for completion, expected, expected_tool in zip(completions, answer, _expected_tools(kwargs), strict=True):
        tool_name = None
        tool_response = None
        for message in completion:
            if message["role"] == "assistant":
                for call in message.get("tool_calls") or []:
                    tool_name = call["function"]["name"]
                    # An answer belongs to the call before it, not to an earlier one.
                    tool_response = None
            if message["role"] == "tool":
                tool_response = message["content"]
        if tool_name != expected_tool:
            rewards.append(0.0)
        elif tool_response is not None and tool_response.strip().lower() == expected.strip().lower():
            rewards.append(1.0)
        else:
            rewards.append(0.5)
    return rewards


def _expected_tools(columns: dict) -> list[str]:
    if columns.get("expected_tool") is not None:
        return columns["expected_tool"]
    if columns.get("tool_call") is not None:
        gold = columns["tool_call"]
        return [(calls[-1] if isinstance(calls, list) else calls)["name"] for calls in gold]
    raise ValueError("validated_reward needs a column expected_tool or tool_call that names the tool")


reward_func = validated_reward
