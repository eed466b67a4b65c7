"""Trajectories for the tests of scoring and of what a run records."""

from grpo_jax.types import Example, Prompt, Status, ToolCall, ToolResult, Trajectory


def trajectory(sampled=3, outcomes=(), example=None, **fields):
    """A completion of `sampled` sampled tokens, then two tokens of a tool response."""
    ids = list(range(sampled + 2))
    calls = [(ToolCall("add", {"a": 1}), ToolResult("Sum: 1", outcome, 0.1)) for outcome in outcomes]
    return Trajectory(
        prompt=Prompt(example or Example([], ""), [1, 2], []),
        completion_ids=ids,
        sampled_mask=[True] * sampled + [False] * 2,
        logprobs=[0.0] * len(ids),
        calls=calls,
        **{"status": Status.ANSWERED, "rewards": (1.0,)} | fields,
    )
