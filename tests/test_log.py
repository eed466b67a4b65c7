"""Files of a run and its timers."""

import json
import math
import os

import numpy as np
import pytest
from trajectories import trajectory

from grpo_jax.files import OutputError
from grpo_jax.run.log import PhaseTimer, Records, interval_text, write_json_atomic, write_rollouts
from grpo_jax.run.options import GRPOConfig
from grpo_jax.scoring.rewards import ROW_COLUMNS
from grpo_jax.types import Example, Status


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def records(folder, resume_step=None, report_to="none"):
    return Records(GRPOConfig(output_dir=str(folder), report_to=report_to), resume_step)


class Clock:
    """A clock that the test turns."""

    now = 100.0

    def __call__(self):
        return self.now


# --- metrics.jsonl ---


def test_each_step_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with records(tmp_path) as run:
        run.write_metrics(1, {"reward": np.float32(0.5), "n": np.int64(3)})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "reward": 0.5, "n": 3}
        run.write_metrics(2, {"reward": math.nan})
        assert (tmp_path / "metrics.jsonl").read_text().splitlines()[1] == '{"step": 2, "reward": null}'


def test_resume_drops_later_steps_and_a_torn_line_and_continues(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1.50}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    with records(tmp_path, resume_step=2) as run:
        assert path.read_text() == '{"step": 1, "x": 1.50}\n{"step": 2}\n'
        run.write_metrics(3, {})
    assert steps_of(path) == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_with_an_empty_file_and_resume_without_one_works(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with records(tmp_path), records(tmp_path / "new", resume_step=5):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == ""


def test_tensorboard_files_are_written_only_when_asked(tmp_path):
    with records(tmp_path / "a"), records(tmp_path / "b", report_to="tensorboard") as run:
        run.write_metrics(1, {"reward": 0.5, "note": "text is no scalar", "bad": math.nan})
    assert not (tmp_path / "a" / "tensorboard").exists()
    (events,) = (tmp_path / "b" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"reward" in content
    assert b"note" not in content
    assert b"bad" not in content


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "summary.json"
    write_json_atomic(path, {"before": {"n": np.int32(2), "share": math.inf}, "name": "é"})
    assert json.loads(path.read_text()) == {"before": {"n": 2, "share": None}, "name": "é"}

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="no space"):
        write_json_atomic(path, {"name": "new"})
    assert json.loads(path.read_text())["name"] == "é"


# --- rollouts ---


def test_rollouts_hold_one_object_a_row(tmp_path):
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "What is 15 + 27?"},
    ]
    said = [{"role": "assistant", "content": "42"}]
    row = trajectory(
        example=Example(chat, "Sum: 42"),
        rewards=(0.5, math.nan),
        messages=said,
        status=Status.OVERLONG,
        advantage=-0.25,
    )
    path = write_rollouts(tmp_path, 12, [row], ["accuracy", "style"])
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


def test_the_columns_of_a_row_are_those_that_rewards_cannot_take(tmp_path):
    """ROW_COLUMNS keeps what rewards log away from a row's own columns, so it must name all of these."""
    path = write_rollouts(tmp_path, 1, [trajectory()], ["accuracy"])
    assert set(json.loads(path.read_text())) == ROW_COLUMNS


def test_what_rewards_log_stands_next_to_a_rows_own_columns(tmp_path):
    extras = {"logged/status": ["scored"], "words": ["{1, 2}"]}
    path = write_rollouts(tmp_path, 1, [trajectory()], ["accuracy"], extras)
    row = json.loads(path.read_text())
    assert (row["status"], row["logged/status"], row["words"]) == ("answered", "scored", "{1, 2}")


def test_rollouts_refuse_rewards_without_a_name(tmp_path):
    with pytest.raises(ValueError):
        write_rollouts(tmp_path, 1, [trajectory(rewards=(1.0, 0.5))], ["accuracy"])


# --- time ---


def test_a_phase_inside_another_is_charged_only_to_itself():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer("rollout"):
        clock.now += 1
        with timer("compile"):
            clock.now += 10
        clock.now += 2
    clock.now += 100  # between phases: charged to none
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


# --- figures of an evaluation ---


def test_a_figure_that_could_not_be_computed_is_a_dash():
    summary = {"a": 0.5, "b": None, "c": 0.25, "intervals": {"a": (0.4, 0.6), "b": (0.0, 1.0), "c": None}}
    assert [interval_text(summary, name) for name in "abc"] == ["0.500 (0.400 to 0.600)", "–", "0.250 (–)"]
