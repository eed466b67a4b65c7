"""What a job makes of the rows: prompts that show each row its own tools."""

import dataclasses
import io

import launch
import pytest

from grpo_jax.rollout.loop import Rollout, Work
from grpo_jax.run import evaluation
from grpo_jax.run.config import parse_config
from grpo_jax.run.console import Console
from grpo_jax.run.job import load_data, open_job, read_inputs
from grpo_jax.run.log import PhaseTimer
from grpo_jax.types import Status, Trajectory


@pytest.fixture
def opened(tmp_path):
    """Opens the job of a small run with other options."""
    jobs = []

    def open_one(source=None, **changes):
        argv = launch.options(tmp_path / "run", compilation_cache_dir="none", **changes)
        config = parse_config(argv, prog="test").config
        inputs = read_inputs(config, source or config.dataset_id_or_path)
        jobs.append(open_job(config, Console(io.StringIO()), PhaseTimer(), inputs))
        return jobs[-1]

    yield open_one
    for job in jobs:
        job.runner.close()


TOOLS = [["add"], None, ["multiply", "add"], ["multiply"]]


@pytest.fixture
def mixed(opened, tmp_path):
    """A job and the prompts of four rows with tools of their own, read under other column names."""
    rows = [row | {"tools": tools} for row, tools in zip(launch.rows(10, 4), TOOLS, strict=True)]
    del rows[3]["tool_call"]
    theirs = [{"question": row.pop("prompt"), **row} for row in rows]
    path = launch.write_rows(tmp_path / "rows.jsonl", theirs)
    job = opened(str(path), dataset_columns={"prompt": "question"})
    return job, load_data(job, read_inputs(job.config, str(path)).train)


def test_a_prompt_shows_the_tools_of_its_row_in_the_loaded_order(mixed):
    job, data = mixed
    add, multiply = job.toolbox.schemas
    for prompt, shown in zip(
        data.prompts, [[add], [add, multiply], [add, multiply], [multiply]], strict=True
    ):
        assert prompt.schemas == shown
        assert prompt.ids == job.conversation.prompt_ids(prompt.example.messages, shown)
    assert [p.example.extra["tools"] for p in data.prompts] == TOOLS


def test_the_preamble_ends_where_the_rows_tools_differ(mixed):
    job, data = mixed
    text = job.conversation.decode(list(data.tree.preamble))
    assert text.endswith('{"type": "function", "function": {"name": "')


def test_evaluation_rolls_out_every_prompt_and_fills_up_the_last_batch(mixed, monkeypatch):
    job, data = mixed
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, eval_batch_size=3))
    given = []

    def roll_out(loop, policy, prompts, *, generations, seed, **_):
        given.append([p and ([s["function"]["name"] for s in p.schemas], p.draw) for p in prompts])
        rows = [Trajectory(p, status=Status.OVERLONG) for p in prompts if p for _ in range(generations)]
        return Rollout(rows, Work())

    monkeypatch.setattr(evaluation, "roll_out", roll_out)
    monkeypatch.setattr(evaluation, "make_policy", lambda loop, params: None)
    evaluation.evaluate(job, None, data, "Evaluation")
    both = ["add", "multiply"]
    assert given == [[(["add"], 0), (both, 1), (both, 2)], [(["multiply"], 3), None, None]]
    given.clear()
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, eval_batch_size=4, eval_samples=2))
    evaluation.evaluate(job, None, data, "Evaluation")
    # two samples each of two rows at once, after the four greedy ones
    assert [[p[1] for p in prompts] for prompts in given] == [[0, 1, 2, 3], [0, 1], [2, 3]]
