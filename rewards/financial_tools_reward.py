"""The default job's reward: partial credit with a check of the tool selection.

| the completion                                        | reward |
|-------------------------------------------------------|--------|
| makes no tool call                                    | 0.0    |
| tries a call that does not parse                      | 0.05   |
| calls another tool than the gold call's               | 0.1    |
| calls the right tool, which answers `Error: …`        | 0.2    |
| calls the right tool and gets another result          | 0.4    |
| its last result equals the answer                     | 1.0    |

With several calls the last one counts. Case and whitespace are ignored when results are
compared. The right tool is named by a row's `tool_call`, or where that is null by its
`ground_truth`. Where neither names one (no tool should be called), trying no call scores 1
and any call 0.
"""

PARSER_NAME = "tool_call_parser"  # answers a call that does not parse: no tool has run
NO_CALL, UNPARSABLE, WRONG_TOOL, ERROR, WRONG_RESULT, EXACT = 0.0, 0.05, 0.1, 0.2, 0.4, 1.0


def financial_tools_reward(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """Score each conversation by the table above.

    Args:
        completions: the messages after the prompt, one list a row.
        answer: what the gold call returns, one text a row.
        **kwargs: data set columns; `tool_call` or `ground_truth` holds the gold call.

    Returns:
        One reward from 0 to 1 a row.

    Raises:
        ValueError: the data set has neither column.
    """
    if kwargs.get("tool_call") is None and kwargs.get("ground_truth") is None:
        raise ValueError(
            "financial_tools_reward needs the gold call in a column tool_call or ground_truth; "
            "add it, or use --reward_function_name accuracy"
        )
    absent = [None] * len(completions)
    columns = [kwargs.get(name) or absent for name in ("tool_call", "ground_truth")]
    gold = [own if own is not None else padded for own, padded in zip(*columns, strict=True)]
    return [score(*row) for row in zip(completions, answer, gold, strict=True)]


def score(completion: list[dict], answer: str, gold: dict | list[dict] | None) -> float:
    """The reward of one conversation."""
    calls = [call["function"]["name"] for message in completion for call in message.get("tool_calls") or []]
    results = [m["content"] for m in completion if m["role"] == "tool" and m.get("name") != PARSER_NAME]
    tried = calls or any(
        "<tool_call>" in (message.get("content") or "")
        for message in completion
        if message["role"] == "assistant"
    )
    if not gold:
        return NO_CALL if tried else EXACT
    if not calls:
        return UNPARSABLE if tried else NO_CALL
    # A row may end before its call was answered: an empty result is a wrong one.
    result = _plain(results[-1]) if results else ""
    if result == _plain(answer):
        return EXACT
    if calls[-1] != _last_name(gold):
        return WRONG_TOOL
    return ERROR if result.startswith("error:") else WRONG_RESULT


def _plain(text: str) -> str:
    return " ".join(str(text).lower().split())


def _last_name(gold: dict | list[dict]) -> str:
    return (gold[-1] if isinstance(gold, list) else gold)["name"]


reward_func = financial_tools_reward
