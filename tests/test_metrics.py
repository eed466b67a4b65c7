"""Figures of a batch, and the hint that no call was written."""

import math

import pytest
from trajectories import trajectory

from grpo_jax.scoring.metrics import FirstCalls, is_run_metric, trajectory_metrics
from grpo_jax.types import Outcome, Status

GROUNDED = [{"role": "tool", "name": "add", "content": "Sum: 1"}, {"role": "assistant", "content": "1"}]


def test_trajectory_metrics_by_hand():
    """Two groups of two: rewards 1, 0 and 0.5, 0.5; the second function applies to one row."""
    rows = [
        trajectory(3, [Outcome.OK], messages=GROUNDED, rewards=(1.0, 4.0)),
        trajectory(5, status=Status.OVERLONG, rewards=(0.0, math.nan)),
        trajectory(2, [Outcome.OK, Outcome.TIMEOUT], status=Status.TOOL_TIMEOUT, rewards=(0.5, math.nan)),
        trajectory(
            6, [Outcome.CRASH, Outcome.ERROR], status=Status.OVERLONG_TOOL_RESPONSE, rewards=(0.5, math.nan)
        ),
    ]
    metrics = trajectory_metrics(rows, [1.0, 0.0, 0.5, 0.5], [math.sqrt(0.5), 0.0], ["accuracy", "style"])
    assert metrics == pytest.approx(
        {
            "reward": 0.5,
            "reward_std": math.sqrt(0.5 / 3),  # squares 0.25 + 0.25 over n - 1 = 3
            "rewards/accuracy/mean": 0.5,
            "rewards/accuracy/std": math.sqrt(0.5 / 3),
            "rewards/style/mean": 4.0,
            "rewards/style/std": 0.0,
            "frac_reward_zero_std": 0.5,
            "completions/mean_length": 4.0,
            "completions/min_length": 2,
            "completions/max_length": 6,
            "completions/clipped_ratio": 0.5,
            "completions/turn_closed": 0.5,  # answered, and the last call ran out of time
            "completions/answer_grounded": 0.25,
            "tools/call_frequency": 1.25,
            "tools/failure_frequency": 0.6,
            "status/answered": 0.25,
            "status/tool_limit": 0.0,
            "status/overlong": 0.25,
            "status/overlong_tool_response": 0.25,
            "status/malformed_call": 0.0,
            "status/tool_error": 0.0,
            "status/tool_timeout": 0.25,
            "status/tools_done": 0.0,
        }
    )


def test_rows_without_a_reward_are_left_out_of_the_mean():
    rows = [trajectory(rewards=(math.nan,)), trajectory(rewards=(2.0,))]
    assert trajectory_metrics(rows, [math.nan, 2.0], [0.0], ["r"])["reward"] == 2.0
    nothing = trajectory_metrics(rows[:1], [math.nan], [0.0], ["r"])
    assert math.isnan(nothing["reward"])
    assert math.isnan(nothing["rewards/r/mean"])
    assert nothing["tools/failure_frequency"] == 0.0


def test_metrics_of_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one trajectory"):
        trajectory_metrics([], [], [], [])


# --- no call in the first batches ---

BARE = '{"name": "add", "arguments": {"a": 15, "b": 27}}'


def said(*texts, status=Status.ANSWERED):
    """Completions of one turn each."""
    return [trajectory(messages=[{"role": "assistant", "content": text}], status=status) for text in texts]


def called():
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    return [trajectory(messages=[message, {"role": "tool", "content": "Sum: 42"}])]


def test_a_run_whose_first_batches_hold_no_call_is_reported_once():
    watch = FirstCalls(batches=2)
    assert watch.hint(said("42", "It is 42.")) is None
    hint = watch.hint(said("Sorry"))
    assert hint.startswith(
        "Hint: none of the 3 turns of the first updates held a <tool_call>: rollouts/ shows"
    )
    assert watch.hint(said("42")) is None


@pytest.mark.parametrize("batch", [called(), said("42", "<tool_call>{broken")])
def test_one_call_in_any_of_them_is_enough(batch):
    for position in range(3):
        watch = FirstCalls(batches=3)
        batches = [said("42"), said("43"), said("44"), said("45")]
        batches[position] = batch
        assert [watch.hint(one) for one in batches] == [None] * 4


@pytest.mark.parametrize(
    "text",
    [
        BARE,
        f"```json\n{BARE}\n```",
        f"I will add them.\n[{BARE}]",
        '{\n  "function": "add",\n  "parameters": {"a": 1}\n}',
        '{"arguments": {"a": 1}, "name": "add"}',
    ],
)
def test_calls_as_bare_json_are_shown(text):
    hint = FirstCalls(batches=1).hint(said("none here", text))
    assert "1 held a call as bare or fenced JSON, which is not run, the first" in hint
    assert "system_prompt" in hint and "cold_start" in hint


@pytest.mark.parametrize("text", ['{"name": "Ann", "age": 3}', "arguments: none", ""])
def test_other_json_is_no_call(text):
    assert "bare" not in FirstCalls(batches=1).hint(said(text))


def test_turns_that_the_budget_ended_are_the_likelier_cause():
    rows = said("Let me think", "First", status=Status.OVERLONG) + said("42")
    assert "max_grpo_completion_length ended 2 of 3 completions; raise it" in FirstCalls(1).hint(rows)


def test_every_metric_of_a_run_is_known_as_its_own():
    """Otherwise a reward's log_metric could overwrite it."""
    own = trajectory_metrics([trajectory()], [1.0], [0.0], ["accuracy"])
    assert all(map(is_run_metric, own))
    assert not any(map(is_run_metric, ("length", "format", "reward_length", "my/reward", "evaluation")))
