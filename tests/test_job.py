"""What a session makes of the rows: prompts that show each row its own tools."""

import io

import launch
import pytest

from grpo_jax import evaluate as evaluate_module
from grpo_jax.evaluate import evaluate
from grpo_jax.rollout.loop import Rollout
from grpo_jax.run.config import parse_config
from grpo_jax.run.console import Console
from grpo_jax.run.job import load_prompts, open_session
from grpo_jax.run.log import PhaseTimer
from grpo_jax.types import Status, Trajectory


@pytest.fixture
def opened(tmp_path):
    """Opens the session of a small run with other options."""
    sessions = []

    def open_one(**changes):
        argv = launch.options(tmp_path / "run", compilation_cache_dir="none", **changes)
        config = parse_config(argv, prog="test").config
        sessions.append(open_session(config, Console(io.StringIO()), PhaseTimer()))
        return sessions[-1]

    yield open_one
    for session in sessions:
        session.runner.close()


TOOLS = [["add"], None, ["multiply", "add"], ["multiply"]]


@pytest.fixture
def mixed(opened, tmp_path):
    """A session and the prompts of four rows with tools of their own, read under other column names."""
    rows = [row | {"tools": tools} for row, tools in zip(launch.rows(10, 4), TOOLS, strict=True)]
    del rows[3]["tool_call"]
    theirs = [{"question": row.pop("prompt"), **row} for row in rows]
    path = launch.write_rows(tmp_path / "rows.jsonl", theirs)
    session = opened(dataset_columns={"prompt": "question"})
    return session, load_prompts(session, str(path))


def test_a_prompt_shows_the_tools_of_its_row_in_the_loaded_order(mixed):
    session, prompts = mixed
    add, multiply = session.toolbox.schemas
    for example, ids, shown in zip(
        prompts.examples, prompts.ids, [[add], [add, multiply], [add, multiply], [multiply]], strict=True
    ):
        assert ids == session.conversation.prompt_ids(example.messages, shown)
    assert [e.extra["tools"] for e in prompts.examples] == TOOLS


def test_the_preamble_ends_where_the_rows_tools_differ(mixed):
    session, prompts = mixed
    text = session.conversation.decode(list(prompts.tree.preamble))
    assert text.endswith('{"type": "function", "function": {"name": "')


def test_evaluation_gives_each_row_its_own_tools(mixed, monkeypatch):
    """One batch of four rows."""
    session, prompts = mixed
    given = []

    def run_rollout(loop, params, preamble, ids, draws, *, schemas, live):
        given.extend([s["function"]["name"] for s in shown] for shown in schemas)
        return Rollout([Trajectory(one, [], [], [], [], [], Status.ANSWERED) for one in ids], row_steps=0)

    monkeypatch.setattr(evaluate_module, "run_rollout", run_rollout)
    monkeypatch.setattr(evaluate_module, "prefill_preamble", lambda loop, params: ())
    evaluate(session, None, None, prompts, "Evaluation")
    assert given == [["add"], ["add", "multiply"], ["add", "multiply"], ["multiply"]]
