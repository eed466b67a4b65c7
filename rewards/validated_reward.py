"""Tool call validation: right tool and right result.

| the last call                                            | reward |
|----------------------------------------------------------|--------|
| is absent, does not parse, or is to another tool         | 0.0    |
| is to the expected tool, with another result             | 0.5    |
| is to the expected tool, and its result is the answer    | 1.0    |

The expected tool is the data set's column `expected_tool`, or the name in its column
`tool_call` (the last one's, where there are several). Outer whitespace and case are ignored.
Where that is null or an empty list (no tool should be called), no call scores 1 and any call 0.
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
            # "tool_call_parser" answers a call that does not parse: no tool has run.
            if message["role"] == "tool" and message.get("name") != "tool_call_parser":
                tool_response = message["content"]
        if tool_name != expected_tool:
            rewards.append(0.0)
        elif expected_tool is None:
            rewards.append(0.0 if _tried_in_vain(completion) else 1.0)
        elif tool_response is not None and tool_response.strip().lower() == expected.strip().lower():
            rewards.append(1.0)
        else:
            rewards.append(0.5)
    return rewards


def _tried_in_vain(completion: list[dict]) -> bool:
    return any("<tool_call>" in (message.get("content") or "") for message in completion)


def _expected_tools(columns: dict) -> list[str | None]:
    if columns.get("expected_tool") is not None:
        return columns["expected_tool"]
    if columns.get("tool_call") is not None:
        return [_last_name(gold) for gold in columns["tool_call"]]
    raise ValueError("validated_reward needs a column expected_tool or tool_call that names the tool")


def _last_name(gold: dict | list[dict] | None) -> str | None:
    if isinstance(gold, list):
        gold = gold[-1] if gold else None
    return gold and gold["name"]


reward_func = validated_reward
