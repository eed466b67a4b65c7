"""Checks a row's prompt and brings it into the one form that the chat templates read."""

from __future__ import annotations

import json
from typing import Any

from grpo_jax.types import Message

ROLES = ("system", "user", "assistant", "tool")


def read_prompt(prompt: Any) -> list[Message]:
    """A prompt as chat messages.

    A tool call may be recorded with its arguments as JSON text; Qwen2.5's template would quote that
    text once more, so it becomes the object that it spells.

    Args:
        prompt: text, which becomes one message of the user, or a list of messages.

    Raises:
        ValueError: it is neither, a message or one of its tool calls is not usable, or no turn of the
            assistant can follow.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise ValueError(f"'prompt' must be text or a list of chat messages, got {show_json(prompt)}")
    if not prompt:
        raise ValueError("'prompt' is empty; it needs at least one message from the user")
    messages = [_message(message, f"'prompt' message {i}") for i, message in enumerate(prompt, start=1)]
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        raise ValueError(
            f"the last message of 'prompt' must be a user's or a tool's, got role {last['role']!r}"
        )
    if last["role"] == "user" and not last["content"].strip():
        raise ValueError("'prompt' is empty: the user's last message holds no text")
    return messages


def show_json(value: Any) -> str:
    """A value in a message to the user: as JSON, and short."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:79] + "…"


def _message(message: Any, which: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f'{which} must be {{"role": …, "content": …}}, got {show_json(message)}')
    if message.get("role") not in ROLES:
        raise ValueError(
            f"{which}: role must be one of {', '.join(ROLES)}, got {show_json(message.get('role'))}"
        )
    content, calls = message.get("content"), message.get("tool_calls")
    is_call = message["role"] == "assistant" and calls
    if not isinstance(content, str) and not (is_call and content is None):
        raise ValueError(f"{which}: content must be text, got {show_json(content)}")
    if not is_call:
        return message
    if not isinstance(calls, list):
        raise ValueError(f"{which}: tool_calls must be a list, got {show_json(calls)}")
    return {**message, "tool_calls": [_tool_call(call, which) for call in calls]}


def _tool_call(call: Any, which: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'{which}: a tool call must be {{"function": {{"name": text, "arguments": object}}}}, '
            f"got {show_json(call)}"
        )
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
