"""Metrics, files, timers, intervals, and what the console prints."""

import contextlib
import io
import json
import logging
import math
import time

import numpy as np
import pytest

from grpo_jax.run.console import Console, printable, setup_logging
from grpo_jax.run.log import (
    MetricsWriter,
    PhaseTimer,
    RolloutLog,
    bootstrap_interval,
    plain,
    trajectory_metrics,
    wilson_interval,
    write_json_atomic,
)
from grpo_jax.types import Example, Outcome, Prompt, Status, ToolCall, ToolResult, Trajectory


def trajectory(sampled=3, status=Status.ANSWERED, outcomes=(), rewards=(1.0,), messages=()):
    """A completion of `sampled` sampled tokens, then two tokens of a tool response."""
    ids = list(range(sampled + 2))
    mask = [True] * sampled + [False] * 2
    calls = [(ToolCall("add", {"a": 1}), ToolResult("Sum: 1", outcome, 0.1)) for outcome in outcomes]
    return Trajectory(
        prompt=Prompt(Example([], ""), [1, 2], []),
        completion_ids=ids,
        sampled_mask=mask,
        logprobs=[0.0] * len(ids),
        messages=list(messages),
        calls=calls,
        status=status,
        rewards=rewards,
    )


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


class Clock:
    """A clock that the test turns."""

    now = 100.0

    def __call__(self):
        return self.now


# --- metrics.jsonl ---


def test_each_step_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"reward": np.float32(0.5), "n": np.int64(3)})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "reward": 0.5, "n": 3}
    writer.write(2, {"reward": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[1] == '{"step": 2, "reward": null}'
    writer.close()


def test_resume_drops_later_steps_and_a_torn_line_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1.50}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    writer = MetricsWriter(tmp_path, resume_step=2)
    assert path.read_text() == '{"step": 1, "x": 1.50}\n{"step": 2}\n'
    writer.write(3, {})
    writer.close()
    assert steps_of(path) == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_with_an_empty_file_and_resume_without_one_works(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsWriter(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    MetricsWriter(tmp_path / "new", resume_step=5).close()
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == ""


def test_tensorboard_files_are_written_only_when_asked(tmp_path):
    MetricsWriter(tmp_path / "a", "none").close()
    assert not (tmp_path / "a" / "tensorboard").exists()
    writer = MetricsWriter(tmp_path / "b", "tensorboard")
    writer.write(1, {"reward": 0.5, "note": "text is no scalar", "bad": math.nan})
    writer.close()
    (events,) = (tmp_path / "b" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"reward" in content
    assert b"note" not in content
    assert b"bad" not in content


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "summary.json"
    write_json_atomic(path, {"before": {"n": np.int32(2), "share": math.inf}, "name": "é"})
    assert json.loads(path.read_text()) == {"before": {"n": 2, "share": None}, "name": "é"}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"bad": object()})
    assert json.loads(path.read_text())["name"] == "é"
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_plain_takes_numbers_out_of_arrays():
    assert plain({1: (np.array([1.0, np.nan]), np.bool_(True), None, "x")}) == {
        "1": [[1.0, None], True, None, "x"]
    }


# --- rollouts ---


def test_rollout_log_holds_one_object_a_row(tmp_path):
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "What is 15 + 27?"},
    ]
    said = [{"role": "assistant", "content": "42"}]
    row = trajectory(rewards=(0.5, None), messages=said, status=Status.OVERLONG)
    path = RolloutLog(tmp_path).write(
        12, [Example(chat, "Sum: 42")], [row], np.array([-0.25]), ["accuracy", "style"]
    )
    assert path == tmp_path / "rollouts" / "step_000012.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "prompt": "What is 15 + 27?",
            "messages": said,
            "answer": "Sum: 42",
            "rewards": {"accuracy": 0.5, "style": None},
            "status": "overlong",
            "advantage": -0.25,
        }
    ]


def test_rollout_log_refuses_lists_of_different_lengths(tmp_path):
    with pytest.raises(ValueError):
        RolloutLog(tmp_path).write(1, [Example([], "a")], [trajectory(), trajectory()], [0.0], ["accuracy"])


# --- metrics of a batch ---


def test_trajectory_metrics_by_hand():
    """Two groups of two: rewards 1, 0 and 0.5, 0.5; the second function applies to one row."""
    rows = [
        trajectory(3, Status.ANSWERED, [Outcome.OK], (1.0, 4.0)),
        trajectory(5, Status.OVERLONG, [], (0.0, None)),
        trajectory(2, Status.TOOL_TIMEOUT, [Outcome.OK, Outcome.TIMEOUT], (0.5, None)),
        trajectory(6, Status.OVERLONG_TOOL_RESPONSE, [Outcome.CRASH, Outcome.ERROR], (0.5, None)),
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
            "tools/call_frequency": 1.25,
            "tools/failure_frequency": 0.6,
            "status/answered": 0.25,
            "status/tool_limit": 0.0,
            "status/overlong": 0.25,
            "status/overlong_tool_response": 0.25,
            "status/malformed_call": 0.0,
            "status/tool_error": 0.0,
            "status/tool_timeout": 0.25,
        }
    )


def test_rows_without_a_reward_are_left_out_of_the_mean():
    rows = [trajectory(rewards=(None,)), trajectory(rewards=(2.0,))]
    assert trajectory_metrics(rows, [math.nan, 2.0], [0.0], ["r"])["reward"] == 2.0
    nothing = trajectory_metrics(rows[:1], [math.nan], [0.0], ["r"])
    assert math.isnan(nothing["reward"])
    assert math.isnan(nothing["rewards/r/mean"])
    assert nothing["tools/failure_frequency"] == 0.0


def test_metrics_of_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one trajectory"):
        trajectory_metrics([], [], [], [])


# --- time ---


def test_a_phase_inside_another_is_charged_only_to_itself():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer("rollout"):
        clock.now += 1
        with timer("compile"):
            clock.now += 10
        clock.now += 2
    clock.now += 100  # between phases: nobody's
    with timer("rollout"):
        clock.now += 4
    assert timer.seconds["rollout"] == 7
    assert timer.seconds["compile"] == 10
    assert sum(timer.seconds.values()) == 17


def test_a_phase_that_raises_is_charged_and_ended():
    clock = Clock()
    timer = PhaseTimer(clock)
    with pytest.raises(KeyError), timer("update"):
        clock.now += 3
        raise KeyError
    with timer("save"):
        clock.now += 1
    assert (timer.seconds["update"], timer.seconds["save"]) == (3, 1)


def test_restored_seconds_are_added_to():
    clock = Clock()
    timer = PhaseTimer(clock)
    timer.restore({"update": 5, "compile": 2})
    with timer("update"):
        clock.now += 1
    assert timer.seconds == {
        "compile": 2,
        "cold_start": 0,
        "rollout": 0,
        "reward": 0,
        "update": 6,
        "evaluate": 0,
        "save": 0,
    }


def test_unknown_phase_is_named():
    with (
        pytest.raises(ValueError, match=r"phase must be one of compile, .*, got 'rolout'"),
        PhaseTimer()("rolout"),
    ):
        pass


# --- intervals ---


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # 81 of 263: Newcombe 1998, table I, method 3; none or all: the formula gives z² / (n + z²)
        (81, 263, 0.2553, 0.3662),
        (0, 10, 0.0, 3.8415 / 13.8415),
        (10, 10, 10 / 13.8415, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_refuses_more_successes_than_rows():
    with pytest.raises(ValueError, match=r"in \[0, n = 3\], got 4"):
        wilson_interval(4, 3)


def test_bootstrap_interval_is_about_two_standard_errors_and_repeats():
    values = np.random.default_rng(0).normal(0.5, 0.2, 400)
    low, high = bootstrap_interval(values, seed=1)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval(values, seed=2) != (low, high)


def test_bootstrap_interval_of_equal_values_is_a_point_and_of_none_an_error():
    assert bootstrap_interval([0.7] * 5, seed=0) == pytest.approx((0.7, 0.7))
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([], seed=0)


# --- console ---


def printed(console_file):
    return console_file.getvalue().splitlines()


def test_without_a_terminal_a_long_phase_prints_a_line_every_few_seconds():
    clock, file = Clock(), io.StringIO()
    console = Console(file, clock=clock)
    with console.progress("rollout", 20) as bar:
        bar.advance(0)
        for _ in range(10):
            clock.now += 2
            bar.advance(2, reward=0.25)
    assert printed(file) == [
        "rollout 6/20, 14 s left, reward 0.25",
        "rollout 12/20, 8 s left, reward 0.25",
        "rollout 18/20, 2 s left, reward 0.25",
        "rollout 20/20, done in 20 s, reward 0.25",
    ]


def test_without_a_terminal_a_short_phase_prints_nothing():
    file = io.StringIO()
    with Console(file, clock=Clock()).progress("save", 1) as bar:
        bar.advance()
    assert file.getvalue() == ""


def test_on_a_terminal_nested_bars_and_lines_share_the_screen():
    file = io.StringIO()
    console = Console(file, terminal=True)
    with console.progress("train", 2) as outer, console.progress("rollout [1]", 4) as inner:
        inner.advance(4, reward=0.5)
        time.sleep(0.25)  # bars are drawn ten times a second
        console.line("a line [bold]with[/bold] brackets")
        outer.advance()
    text = file.getvalue()
    assert "rollout [1]" in text
    assert "reward 0.5" in text
    assert "a line [bold]with[/bold] brackets" in text
    with console.progress("again", 1) as bar:
        bar.advance()


def test_a_long_line_is_not_broken():
    file = io.StringIO()
    Console(file).line("x " * 200)
    assert printed(file) == ["x " * 200]


def test_samples_show_conversation_answer_rewards_and_status():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 15, "b": 27}}}
    messages = [
        {"role": "assistant", "content": "Let me [see]", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "Sum: 42\x1b[2J" + "y" * 500},
    ]
    rows = [trajectory(messages=messages, rewards=(1.0, None)), trajectory(), trajectory(), trajectory()]
    for terminal in (False, True):
        file = io.StringIO()
        Console(file, terminal=terminal).samples(rows, ["Sum: 42", "b", "c", "d"], n=2)
        text = file.getvalue()
        assert "assistant: Let me [see] add(a=15, b=27)" in " ".join(text.replace("│", " ").split())
        assert "\x1b[2J" not in text
        assert "y" * 500 not in text
        assert "1, none" in text
        assert "answered" in text
    file = io.StringIO()
    Console(file).samples(rows, ["row 0", "row 1", "row 2", "row 3"], n=2)
    assert [name for name in ("row 0", "row 1", "row 2", "row 3") if name in file.getvalue()] == [
        "row 0",
        "row 2",
    ]


def test_tools_and_tables_are_plain_lines_without_a_terminal():
    file = io.StringIO()
    console = Console(file)
    console.tools(["add(a: float, b: float) -> str"])
    console.table("Evaluation", ["metric", "before"], [["n", 500]])
    assert printed(file) == [
        "Loaded 1 tool functions:",
        "  add(a: float, b: float) -> str",
        "Evaluation",
        "  metric: n  before: 500",
    ]


def test_printable_keeps_text_and_drops_control_characters():
    assert printable("é 漢\n\tx\x1b[1m\x07\x7f") == "é 漢\n\tx�[1m��"


@contextlib.contextmanager
def bare_root():
    """The root logger without pytest's handlers; everything is put back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("grpo_jax")
    kept = root.handlers[:], root.level, ours.handlers[:], ours.level, ours.propagate
    root.handlers[:] = []
    try:
        yield root
    finally:
        root.handlers[:], ours.handlers[:], ours.propagate = kept[0], kept[2], kept[4]
        root.setLevel(kept[1])
        ours.setLevel(kept[3])


def test_log_records_become_lines_of_the_console():
    file = io.StringIO()
    with bare_root() as root:
        setup_logging(Console(io.StringIO()), "info")
        setup_logging(Console(file), "info")
        log = logging.getLogger("grpo_jax.x")
        log.debug("hidden")
        log.info("step %d", 3)
        log.warning("careful")
        root.addHandler(logging.StreamHandler(file))  # as a library may, later: no line comes twice
        log.info("once")
    assert printed(file) == ["step 3", "WARNING: careful", "once"]


def test_a_root_logger_that_the_user_configured_is_honoured():
    theirs, ours = io.StringIO(), io.StringIO()
    with bare_root() as root:
        root.addHandler(logging.StreamHandler(theirs))
        root.setLevel(logging.DEBUG)
        setup_logging(Console(ours), "info")
        logging.getLogger("grpo_jax.x").debug("schema")
        setup_logging(Console(ours), "warning")
        logging.getLogger("grpo_jax.x").info("hidden")
    assert (printed(theirs), ours.getvalue()) == (["schema"], "")
