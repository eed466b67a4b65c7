"""Which tools count as slow, and how many steps later their results are fed."""

import io
import json
from types import SimpleNamespace
from unittest import mock

import launch
import pytest

from grpo_jax import trainer
from grpo_jax.rollout.delays import CALLS, ToolDelays
from grpo_jax.rollout.loop import Rollout, ToolLoop
from grpo_jax.run import evaluation
from grpo_jax.run.console import Console
from grpo_jax.run.job import DataSet
from grpo_jax.types import Example, Outcome, Prompt, ToolCall, ToolResult, Trajectory


def rollout(step_seconds=0.01, **seconds):
    """A rollout of one completion that called tools, each call with its seconds."""
    calls = [
        (ToolCall(name, {}), ToolResult("", Outcome.OK, each)) for name, of in seconds.items() for each in of
    ]
    return Rollout([Trajectory(Prompt(Example([], ""), [0], []), calls=calls)], step_seconds=step_seconds)


@pytest.mark.parametrize(
    ("median", "step_seconds", "steps"),
    [(0.001, 0.01, 0), (0.05, 0.01, 0), (0.051, 0.01, 8), (0.2, 0.01, 32), (0.2, 0.5, 1), (0.32, 0.01, 32)],
)
def test_the_delay_is_the_power_of_two_that_covers_the_median(median, step_seconds, steps):
    seconds = [0.0] * (CALLS // 2 - 1) + [median] * 2 + [9.0] * (CALLS // 2 - 1)
    assert ToolDelays().after(rollout(step_seconds, tool=seconds)).steps == {"tool": steps}


def test_a_tool_is_judged_once_by_its_first_calls():
    """Calls add up over rollouts; one that is judged stays as it is, and a resumed run knows what this one knew."""
    delays = ToolDelays().after(rollout(slow=[0.2] * 10, quick=[0.0] * CALLS))
    assert delays.steps == {"quick": 0} and list(delays.seconds) == ["slow"]
    delays = ToolDelays.from_json(json.loads(json.dumps(delays.to_json())))
    delays = delays.after(rollout(slow=[0.2] * 6, quick=[0.2] * CALLS))
    assert delays == ToolDelays({"quick": 0, "slow": 32}, {})
    assert delays.after(rollout(slow=[0.0] * CALLS)) == delays


def test_without_a_step_nothing_is_judged():
    """A rollout that was stopped at once has no decode speed."""
    assert ToolDelays().after(rollout(0.0, slow=[0.2] * CALLS)).steps == {}


def test_a_resumed_run_keeps_the_delays_and_they_apply_from_the_next_rollout_on(tmp_path):
    known = ToolDelays({"add": 8}, {"multiply": [0.25]})
    after = mock.patch.object(ToolDelays, "after", lambda self, rollout: known)
    with after, mock.patch.object(trainer, "roll_out", wraps=trainer.roll_out) as rollouts:
        ran = launch.small_run(tmp_path / "run", max_steps=2, save_steps=2)
    assert ran.status == 0, ran.err
    assert [call.args[0].delays for call in rollouts.call_args_list] == [{}, known.steps]
    with mock.patch.object(trainer, "roll_out", wraps=trainer.roll_out) as rollouts:
        ran = launch.small_run(tmp_path / "run", max_steps=3, save_steps=2)
    assert ran.status == 0, ran.err
    assert [call.args[0].delays for call in rollouts.call_args_list] == [known.steps]


def test_the_seed_fixes_an_evaluation_whatever_time_its_tools_take():
    """Each batch waits for all results; measuring delays would change the shapes of the second one."""
    rows = [Prompt(Example([], ""), [0], []) for _ in range(4)]
    config = SimpleNamespace(eval_batch_size=2, seed=0)
    job = SimpleNamespace(config=config, console=Console(io.StringIO()))
    loop = ToolLoop(None, None, None, None)
    slow = mock.Mock(return_value=rollout(slow=[0.2] * CALLS))
    with mock.patch.object(evaluation, "roll_out", slow):
        evaluation.completions(job, loop, None, DataSet(rows, None), "Validation", 1, lambda: False)
    assert [call.args[0].delays for call in slow.call_args_list] == [{}, {}]
