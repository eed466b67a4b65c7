"""Trajectories for the tests of scoring and of what a run records."""

from grpo_jax.types import Example, Prompt, Status, ToolCall, ToolResult, Trajectory


def trajectory(sampled=3, status=Status.ANSWERED, outcomes=(), rewards=(1.0,), messages=()):
    """A completion of `sampled` sampled tokens, then two tokens of a tool response."""
    ids = list(range(sampled + 2))
    mask = [True] * sampled + [False] * 2
    calls = [(ToolCall("add", {"a": 1}), ToolResult("Sum: 1", outcome, 0.1)) for outcome in outcomes]
    return Trajectory(
        prompt=Prompt(Example([{"role": "user", "content": "?"}], "Sum: 42"), [1, 2], []),
        completion_ids=ids,
        sampled_mask=mask,
        logprobs=[0.0] * len(ids),
        messages=list(messages),
        calls=calls,
        status=status,
        rewards=rewards,
    )
