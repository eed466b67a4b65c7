"""Loading, calling and checking reward functions."""

import asyncio
import dataclasses
import datetime
import functools
import logging
import os
import re
import signal
import sys
import threading
from decimal import Decimal
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.scoring.rewards import (
    RewardError,
    RewardFunction,
    RewardOutcome,
    TrainerState,
    accuracy,
    call_rewards,
    joined,
    load_rewards,
    rewards_of,
    same_answer,
)

NAN = float("nan")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def said(text):
    return {"role": "assistant", "content": text}


TURNS = [[said("a"), {"role": "tool", "name": "add", "content": "1"}, said("b")], [said("c")]]


def tool(text, name="add"):
    return {"role": "tool", "name": name, "content": text}


def reward(function, name="mine"):
    return RewardFunction(name, function, "mine.py")


def call(*functions, rows=4, **more):
    """Call rewards on `rows` completions, the i-th of which says i and expects `answer i`."""
    given_ = {
        "completions": [[said(str(i))] for i in range(rows)],
        "answer": [f"answer {i}" for i in range(rows)],
        "prompts": [[{"role": "user", "content": "?"}]] * rows,
        "completion_ids": [[i] for i in range(rows)],
        "trainer_state": "state",
        "columns": {},
    }
    rewards = [reward(f, f"mine{k}" if k else "mine") for k, f in enumerate(functions)]
    return call_rewards(rewards, **(given_ | more))


# The built-in


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([said("The answer is Sum: 3")], 0.0),
        ([said("<tool_call>{broken")], 0.0),
        ([said("<tool_call>{broken"), tool("Error: not JSON", "tool_call_parser"), said("3")], 0.0),
        ([], 0.0),
        ([CALLS], 0.1),  # its budget ended before the response
        ([CALLS, tool("Sum: 4"), said("Sum: 3")], 0.1),
        ([CALLS, tool("Sum: 3"), CALLS, tool("Sum: 4")], 0.1),
        ([CALLS, tool("Sum: 4"), CALLS, tool("Sum: 3")], 1.0),
        ([CALLS, tool(" sum:  3\n")], 1.0),
        ([said("no calls listed"), tool("Sum: 3")], 1.0),
    ],
)
def test_accuracy_follows_its_table(messages, expected):
    assert accuracy([messages, [said("none")]], ["Sum: 3", "x"], level=[1, 2]) == [expected, 0.0]


@given(st.text(), st.sampled_from(["", " ", "\n", " \t "]), st.sampled_from([str.upper, str.lower, str]))
def test_same_answer_ignores_case_and_outer_whitespace(text, space, case):
    assert same_answer(f"{space}{case(text)}{space}", text) or case(text).casefold() != text.casefold()


def test_same_answer_ignores_repeated_spaces_but_not_missing_ones():
    assert same_answer("Total:  5\n", "total: 5")
    assert not same_answer("Total:5", "total: 5")


# Loading


@pytest.fixture
def reward_file(tmp_path, monkeypatch):
    """Writes a reward file and gives its path."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text, name="my_reward.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_accuracy_is_the_default():
    assert load_rewards(None, None) == [RewardFunction("accuracy", accuracy, "built-in")]
    assert load_rewards([], ["accuracy"]) == [RewardFunction("accuracy", accuracy, "built-in")]


def test_files_are_named_after_themselves_and_beat_names(reward_file):
    first = reward_file("reward_func = lambda completions, **kwargs: [0.5] * len(completions)", "first.py")
    second = reward_file(
        "class Score:\n    def __call__(self, answer): return [1]\nreward_func = Score()", "b.py"
    )
    loaded = load_rewards([first, second], ["no such name"])
    assert [(one.name, one.source) for one in loaded] == [("first", first), ("b", second)]
    outcome = call_rewards(
        loaded,
        completions=[[]],
        answer=["x"],
        prompts=[[]],
        completion_ids=[[]],
        trainer_state=None,
        columns={},
    )
    assert outcome.values.tolist() == [[0.5, 1.0]]


def test_a_reward_may_import_the_file_beside_it_and_define_dataclasses(reward_file):
    reward_file("POINTS = 3", "points_beside.py")
    path = reward_file(
        "from __future__ import annotations\nimport dataclasses\nfrom points_beside import POINTS\n"
        "@dataclasses.dataclass\nclass Score:\n    points: int = POINTS\n"
        "def reward_func(completions, **kwargs):\n    return [Score().points]\n"
    )
    (loaded,) = load_rewards([path], None)
    assert loaded.function([[]]) == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"No reward_func found in .*my_reward\.py; end it with reward_func = your_function"),
        ("reward_func = 1.0", r"reward_func must be callable, got 1\.0 in .*my_reward\.py"),
        ("a = 1\nb = a / 0", r"my_reward\.py failed: ZeroDivisionError: .*\n  .*my_reward\.py:2: b = a / 0$"),
        ("def f(:\n", r"my_reward\.py failed: SyntaxError: .*\n  .*my_reward\.py:1: def f\(:$"),
        ("import sys\nsys.exit(3)", r"my_reward\.py failed: SystemExit: 3\n  .*:2: sys.exit\(3\)$"),
    ],
)
def test_a_file_without_a_usable_reward_is_an_error(reward_file, text, message):
    with pytest.raises(ValueError, match=message):
        load_rewards([reward_file(text)], None)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("no_such.py", r"reward_fn must be a Python file, and /.*no_such\.py does not exist"),
        ("pyproject.toml", r"reward_fn must be a Python file \(\.py\), got /.*pyproject\.toml"),
        (".", r"reward_fn must be a Python file \(\.py\), got /"),
    ],
)
def test_what_is_no_python_file_is_an_error(file, message):
    with pytest.raises(ValueError, match=message):
        load_rewards([file], None)


def test_an_unknown_built_in_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"Unknown reward function: acuracy\. Available: accuracy, grounded\. .*reward_fn"
    ):
        load_rewards(None, ["acuracy"])


def test_what_a_partial_binds_is_not_for_a_column_to_change():
    def by_level(completions, level, **kwargs):
        return [float(level)] * len(completions)

    (reward,) = rewards_of(functools.partial(by_level, level=3))
    outcome = call_rewards(
        [reward],
        completions=[[]] * 2,
        answer=["", ""],
        prompts=[[]] * 2,
        completion_ids=[[]] * 2,
        trainer_state=None,
        columns={"level": [1, 2]},
    )
    assert outcome.means.tolist() == [[3.0], [3.0]]


def test_two_rewards_of_one_name_are_an_error():
    with pytest.raises(
        ValueError, match=r"two reward functions are named 'accuracy' \(built-in and built-in\)"
    ):
        load_rewards(None, ["accuracy", "accuracy"])


# Calling


def test_every_keyword_of_the_contract_arrives():
    seen = {}

    def keep(completions, **kwargs):
        seen.update(kwargs, completions=completions)
        return [0.0] * len(completions)

    call(keep, rows=2, columns={"level": [1, None]})
    assert callable(seen.pop("log_metric"))
    assert callable(seen.pop("log_extra"))
    assert seen == {
        "completions": [[said("0")], [said("1")]],
        "answer": ["answer 0", "answer 1"],
        "prompts": [[{"role": "user", "content": "?"}]] * 2,
        "completion_ids": [[0], [1]],
        "trainer_state": "state",
        "level": [1, None],
    }


def test_the_state_of_the_run_has_attributes_and_items():
    state = TrainerState(global_step=3, max_steps=12, epoch=0.75, num_train_epochs=3.0)

    def curriculum(completions, trainer_state):
        assert trainer_state.get("no such field", 7) == 7
        assert "epoch" in trainer_state and "mood" not in trainer_state
        assert dict(trainer_state) == dataclasses.asdict(trainer_state)
        left = 1 - trainer_state.global_step / trainer_state["max_steps"]
        return [left, trainer_state.epoch, trainer_state.get("num_train_epochs")]

    assert call(curriculum, rows=3, trainer_state=state).values[:, 0].tolist() == [0.75, 0.75, 3.0]
    with pytest.raises(KeyError):
        state["mood"]


def test_a_function_without_free_keywords_gets_only_its_own():
    def narrow(completions, level, absent="default"):
        assert absent == "default"
        return level

    assert call(narrow, rows=2, columns={"level": [3, 4], "other": [0, 0]}).values.tolist() == [[3.0], [4.0]]


def test_a_keyword_that_does_not_exist_is_named():
    def needs(completions, expected_tool, **kwargs):
        return [0.0]

    with pytest.raises(
        RewardError, match=r"'mine' \(mine\.py\) needs 'expected_tool', .*; available: level,"
    ):
        call(needs, columns={"level": [0] * 4})


def test_numbers_of_every_kind_and_none_are_accepted():
    def mixed(completions):
        return [True, np.float32(0.25), np.int64(3), None]

    def array(completions):
        return np.array([1, 2, 3, 4], np.int32)

    def booleans(completions):
        return (np.bool_(True), np.bool_(False), 0, -1.5)

    outcome = call(mixed, array, booleans)
    assert outcome.values.dtype == np.float64
    np.testing.assert_array_equal(outcome.values, [[1, 1, 1], [0.25, 2, 0], [3, 3, 0], [np.nan, 4, -1.5]])


class Tensor:
    """What jax, torch and TensorFlow have in common, and no more."""

    def __init__(self, value):
        self.value = np.asarray(value)

    def __array__(self, dtype=None, copy=None):
        return self.value

    def __float__(self):
        return float(self.value)


@pytest.mark.parametrize(
    "values",
    [
        [np.asarray(0.5), np.array([2.0]), np.array([[3]]), np.asarray(True)],
        [jnp.mean(jnp.array([0.0, 1.0])), jnp.asarray([2.0], jnp.bfloat16), jnp.int32(3), jnp.asarray(True)],
        [Decimal("0.5"), Fraction(2), Fraction(6, 2), Decimal(1)],
        [Tensor(0.5), Tensor(2), Tensor([3.0][0]), Tensor(True)],
        np.array([[0.5], [2.0], [3.0], [1.0]]),
        jnp.array([0.5, 2.0, 3.0, 1.0]),
        jnp.array([[[0.5]], [[2.0]], [[3.0]], [[1.0]]]),
        Tensor([0.5, 2.0, 3.0, 1.0]),
        Tensor([[0.5], [2.0], [3.0], [1.0]]),
        np.array([0.5, 2, 3, True], object),
    ],
    ids=lambda values: (
        f"{type(values).__name__} of {type(values[0] if isinstance(values, list) else 0).__name__}"
    ),
)
def test_whatever_has_one_element_a_row_and_is_a_number_is_a_reward(values):
    assert call(lambda completions: values).values[:, 0].tolist() == [0.5, 2.0, 3.0, 1.0]


@pytest.mark.torch
def test_tensors_of_torch_are_rewards():
    torch = pytest.importorskip("torch")
    weights = torch.tensor([[0.5], [2.0], [3.0], [1.0]], requires_grad=True)
    for values in (
        weights,
        list(weights),
        [w.sum().to(torch.bfloat16) for w in weights],
        weights.detach()[:, 0],
    ):
        assert call(lambda completions, values=values: values).values[:, 0].tolist() == [0.5, 2.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.0, 1.0, "0.5", 0.0], "row 2 got '0.5'"),
        ([0.0, float("nan"), 0.0, 0.0], "row 1 got nan"),
        ([0.0, 0.0, 0.0, float("-inf")], "row 3 got -inf"),
        ([10**400, 0, 0, 0], "row 0 got 1000"),
        ([1j, 0, 0, 0], "row 0 got 1j"),
        ([[0.0, 1.0]] * 4, "row 0 has 1 turns, got 2 numbers"),
        (np.zeros((4, 2)), r"row 0 got \[0\.0, 0\.0\]"),
        (np.zeros((1, 4)), "one value for each of the 4 completions, got 1 values"),
        ([np.zeros(2), 0, 0, 0], r"row 0 got array\(\[0\., 0\.\]\)"),
        ([0, "True", 0, 0], "row 1 got 'True'"),
        ([0, np.str_("0.5"), 0, 0], "row 1 got np.str_"),
        ([0, np.asarray("0.5"), 0, 0], "row 1 got array"),
        ([0, b"1", 0, 0], "row 1 got b'1'"),
        (np.array(["1", "0", "1", "0"]), "row 0 got '1'"),
        ([0, Decimal("NaN"), 0, 0], "row 1 got Decimal"),
        ([0, Decimal("sNaN"), 0, 0], "row 1 got Decimal"),
        ([0, np.asarray(np.inf), 0, 0], "row 1 got array"),
        ([0, np.complex64(1), 0, 0], "row 1 got np.complex64"),
        ([0, object(), 0, 0], "row 1 got <object"),
        ([0.0] * 3, "one value for each of the 4 completions, got 3 values"),
        ([], "one value for each of the 4 completions, got 0 values"),
        (1.0, "a list with one number or None for each of the 4 completions, got float: 1.0"),
        (np.float64(1.0), "a list .* got float64: "),
        (None, "a list .* got NoneType: None"),
        ("1010", "a list .* got str: '1010'"),
        ({0, 1, 2, 3}, "a list .* got set"),
    ],
)
def test_an_unusable_return_is_named_with_function_and_row(value, message):
    def second(completions):
        return value

    with pytest.raises(RewardError, match=rf"'mine1' \(mine\.py\) must return .*{message}"):
        call(accuracy, second)


def test_a_function_that_raises_is_named_with_the_row_and_the_users_line():
    def fragile(completions, answer, **kwargs):
        return [1.0 / (int(c[0]["content"]) - 2) for c in completions]

    with pytest.raises(RewardError) as raised:
        call(fragile)
    assert str(raised.value).startswith(
        "reward function 'mine' (mine.py) raised on row 2 (answer 'answer 2'): ZeroDivisionError: "
    )
    assert "test_rewards.py:" in str(raised.value)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_function_that_only_fails_on_the_whole_batch_says_so():
    def jointly(completions):
        if len(completions) > 1:
            raise KeyError("group")
        return [1.0 / 0]

    with pytest.raises(
        RewardError, match="raised only on the whole batch, on no single row: KeyError: 'group'"
    ):
        call(jointly)


def test_sys_exit_in_a_reward_does_not_end_the_run_silently():
    def leaves(completions):
        sys.exit(0)

    async def leaves_later(completions):
        sys.exit(0)

    for function in (leaves, leaves_later):
        with pytest.raises(RewardError, match=r"raised on row 0 .*: SystemExit: 0"):
            call(function)


def test_async_rewards_run_together():
    """One alone would wait for the other's event for ever."""
    here, there = [], []

    async def first(completions):
        here.append(asyncio.Event())
        there.append(asyncio.Event())
        here[0].set()
        await asyncio.wait_for(there[0].wait(), timeout=5)
        return [1.0] * len(completions)

    async def second(completions):
        await asyncio.wait_for(here[0].wait(), timeout=5)
        there[0].set()
        return [2.0] * len(completions)

    def plain(completions):
        return [3.0] * len(completions)

    assert call(first, plain, second, rows=2).values.tolist() == [[1.0, 3.0, 2.0]] * 2


def test_an_async_reward_that_raises_is_named_with_the_row():
    async def fragile(completions, answer):
        await asyncio.sleep(0)
        return [{"answer 0": 1.0, "answer 1": 1.0}[a] for a in answer]

    async def fine(completions):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'mine1' \(mine\.py\) raised on row 2 .*KeyError: 'answer 2'"):
        call(fine, fragile)


def test_what_one_update_leaves_in_the_event_loop_works_at_the_next():
    """A lock that was waited for, and a task that answers a queue: both belong to the loop of the first update."""
    lock, kept = asyncio.Lock(), {}

    async def answer(queue):
        while True:
            number, future = await queue.get()
            future.set_result(number / 2)

    async def judge(i):
        async with lock:
            await asyncio.sleep(0)
            future = asyncio.get_running_loop().create_future()
            await kept["queue"].put((i, future))
            return await asyncio.wait_for(future, timeout=5)

    async def reward_func(completions):
        if not kept:
            kept["queue"] = asyncio.Queue()
            kept["task"] = asyncio.create_task(answer(kept["queue"]))
        return await asyncio.gather(*map(judge, range(len(completions))))

    for _ in range(3):
        assert call(reward_func, rows=3).values[:, 0].tolist() == [0.0, 0.5, 1.0]
    assert not kept["task"].done()
    kept["task"].get_loop().call_soon_threadsafe(kept["task"].cancel)


def test_background_tasks_continue_between_updates():
    ticked = threading.Event()
    started = []

    async def tick():
        while True:
            await asyncio.sleep(0.001)
            if started:
                ticked.set()

    async def reward_func(completions):
        reward_func.task = asyncio.create_task(tick())
        return [0.0] * len(completions)

    call(reward_func)
    started.append(True)
    assert ticked.wait(timeout=5)
    reward_func.task.get_loop().call_soon_threadsafe(reward_func.task.cancel)


def test_plain_rewards_find_one_usable_loop_at_every_update():
    """Also after code that uses asyncio.run, which leaves none, closes the loop, or sets another."""
    lock, seen = asyncio.Lock(), []

    async def locked(i):
        async with lock:
            await asyncio.sleep(0)
            return float(i)

    def own_loop(completions):
        loop = asyncio.get_event_loop()
        seen.append(loop)
        return loop.run_until_complete(all_of(completions))

    async def all_of(completions):
        return await asyncio.gather(*map(locked, range(len(completions))))

    def runs(completions):
        return asyncio.run(one(len(completions)))

    async def one(n):
        return [1.0] * n

    others = []

    def sets_another(completions):
        others.append(asyncio.new_event_loop())
        asyncio.set_event_loop(others[-1])
        return others[-1].run_until_complete(one(len(completions)))

    for functions in ([own_loop], [runs, own_loop], [own_loop, runs], [sets_another, own_loop, one_async]):
        outcome = call(*functions, rows=3)
        assert outcome.values[:, functions.index(own_loop)].tolist() == [0.0, 1.0, 2.0]
    assert len(set(map(id, seen))) == 1
    for loop in others:
        loop.close()


async def one_async(completions):
    return [3.0] * len(completions)


def test_a_loop_that_a_reward_closes_is_replaced():
    def closes(completions):
        loop = asyncio.get_event_loop()
        values = loop.run_until_complete(one_async(completions))
        loop.close()
        return values

    for _ in range(2):
        assert call(closes, one_async, rows=2).values.tolist() == [[3.0, 3.0]] * 2


def test_rewards_work_where_a_loop_is_running_already():
    """As in a notebook, whose own loop and task are there again afterwards."""

    def plain(completions):
        first = asyncio.run(one_async(completions))
        return [
            a + b
            for a, b in zip(
                first, asyncio.get_event_loop().run_until_complete(one_async(completions)), strict=True
            )
        ]

    async def cell():
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        values = call(one_async, plain, rows=2).values.tolist()
        assert (asyncio.get_running_loop(), asyncio.current_task()) == (loop, task)
        await asyncio.sleep(0)
        return values

    assert asyncio.run(cell()) == [[3.0, 6.0]] * 2


def test_the_callers_current_loop_stays_current():
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        call(one_async)
        assert asyncio.get_event_loop() is loop
    finally:
        loop.close()
        asyncio.set_event_loop(None)


def test_rewards_run_in_the_callers_thread():
    """Python lets only the main thread set signal handlers, with which time limits are written."""

    def limited(completions):
        assert threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(5)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        return [1.0] * len(completions)

    async def limited_too(completions):
        return limited(completions)

    assert call(limited, limited_too, rows=1).values.tolist() == [[1.0, 1.0]]


def test_sys_exit_in_a_task_of_an_async_reward_is_its_own():
    async def leaves():
        sys.exit(3)

    async def reward_func(completions):
        return [await asyncio.gather(leaves())]

    with pytest.raises(RewardError, match=r"'mine1' .* raised on row 0 .*: SystemExit: 3"):
        call(one_async, reward_func, rows=1)
    assert call(one_async, rows=1).values.tolist() == [[3.0]]


def test_what_a_reward_does_to_the_process_is_undone(tmp_path):
    def restless(completions):
        os.chdir(tmp_path)
        os.environ["XLA_FLAGS"] = "--no_such_flag"
        sys.path.insert(0, "/nowhere")
        return [0.0] * len(completions)

    async def restless_too(completions):
        return restless(completions)

    before = os.getcwd(), os.environ.get("XLA_FLAGS"), list(sys.path)
    call(restless, restless_too)
    assert (os.getcwd(), os.environ.get("XLA_FLAGS"), sys.path) == before


def test_a_log_handler_made_in_the_first_call_keeps_working(caplog):
    """Libraries make theirs at first use, for what is standard error then."""
    theirs = logging.getLogger("some_library")

    def logs(completions):
        if not theirs.handlers:
            theirs.addHandler(logging.StreamHandler())
            theirs.propagate = False
        theirs.warning("call %d", len(completions))
        return [0.0] * len(completions)

    with caplog.at_level(logging.INFO, logger="grpo_jax.scoring.rewards"):
        for rows in (1, 2):
            call(logs, rows=rows)
    assert [r.getMessage() for r in caplog.records] == [
        "reward function prints: call 1",
        "reward function prints: call 2",
    ]


def test_prints_go_to_the_log_even_when_the_reward_raises(caplog, capsys):
    def chatty(completions):
        print("mean", 0.5)
        print("careful", file=sys.stderr)
        raise ValueError("no")

    with caplog.at_level(logging.INFO, logger="grpo_jax.scoring.rewards"), pytest.raises(RewardError):
        call(chatty)
    assert capsys.readouterr() == ("", "")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "reward function prints: mean 0.5"),
        ("INFO", "reward function prints: careful"),
    ]


def test_log_metric_is_averaged_and_log_extra_collected():
    def logs(completions, log_metric, log_extra):
        for i in range(len(completions)):
            log_metric("length", i)
        log_metric("exact", np.float32(0.5))
        log_metric("share", jnp.asarray([0.25]))
        log_extra("reason", [f"r{i}" for i in range(len(completions))])
        for i in range(len(completions)):
            log_extra("one at a time", [i])
        return [0.0] * len(completions)

    def logs_too(completions, log_metric, **kwargs):
        log_metric("length", 10)
        return [0.0] * len(completions)

    outcome = call(logs, logs_too, rows=3)
    assert outcome.metrics == {"length": 3.25, "exact": 0.5, "share": 0.25}
    assert outcome.extras == {"reason": ["r0", "r1", "r2"], "one at a time": [0, 1, 2]}


def test_what_a_reward_logs_never_takes_a_name_of_the_runs_own(caplog):
    def logs(completions, log_metric, log_extra):
        for name in ("reward", "step", "kl", "rewards/mine/mean", "eval/exact_answer_match", "format"):
            log_metric(name, 99.0)
        for column in ("prompt", "messages", "answer", "rewards", "status", "advantage", "reason"):
            log_extra(column, [1, 2])
        return [0.0] * len(completions)

    with caplog.at_level(logging.WARNING, logger="grpo_jax.scoring.rewards"):
        for _ in range(2):
            outcome = call(logs, rows=2)
    assert list(outcome.metrics) == [
        "logged/reward",
        "logged/step",
        "logged/kl",
        "logged/rewards/mine/mean",
        "logged/eval/exact_answer_match",
        "format",
    ]
    assert list(outcome.extras) == [
        *(f"logged/{c}" for c in ("prompt", "messages", "answer", "rewards", "status", "advantage")),
        "reason",
    ]
    said_once = [r.getMessage() for r in caplog.records if "'status'" in r.getMessage()]
    assert said_once == [
        "log_extra('status', …): the run itself writes 'status'; the reward's value is logged as 'logged/status'"
    ]


def test_a_column_that_several_rewards_log_is_named_after_each():
    def logs(completions, log_extra):
        log_extra("reason", ["a", "b"])
        log_extra("status", ["c", "d"])
        return [0.0] * 2

    def logs_too(completions, log_extra):
        log_extra("reason", ["e", "f"])
        log_extra("own", [1, 2])
        return [0.0] * 2

    assert call(logs, logs_too, rows=2).extras == {
        "mine/reason": ["a", "b"],
        "logged/status": ["c", "d"],
        "mine1/reason": ["e", "f"],
        "own": [1, 2],
    }


def test_what_json_has_no_type_for_is_logged_as_text():
    def logs(completions, log_extra):
        log_extra("words", ({"a"}, None))
        log_extra("day", [datetime.date(2024, 2, 3), Decimal("0.5")])
        log_extra("array", np.array([[1, 2], [3, 4]]))
        return [0.0] * 2

    assert call(logs, rows=2).extras == {
        "words": ["{'a'}", None],
        "day": ["2024-02-03", "0.5"],
        "array": [[1, 2], [3, 4]],
    }


def test_a_text_is_no_column():
    def logs(completions, log_extra):
        log_extra("reason", "four")
        return [0.0] * 4

    with pytest.raises(
        RewardError, match=r"log_extra\('reason', …\) takes a list with one value per row, got 'four'"
    ):
        call(logs)


@pytest.mark.parametrize("value", ["0.5", float("nan"), None])
def test_a_metric_that_is_no_number_is_an_error(value):
    def logs(completions, log_metric):
        log_metric("length", value)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"log_metric\('length', …\) takes a finite number, got"):
        call(logs)


def test_an_extra_column_of_another_length_is_an_error():
    def logs(completions, log_extra):
        log_extra("reason", ["only one"])
        return [0.0] * len(completions)

    with pytest.raises(
        RewardError, match=r"log_extra\('reason', …\) of .*'mine'.* got 1 values for 4 completions"
    ):
        call(logs)


@given(
    st.lists(
        st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9) | st.booleans()
    )
)
def test_values_arrive_unchanged(values):
    outcome = call(lambda completions: values, rows=len(values))
    np.testing.assert_array_equal(
        outcome.values[:, 0], [np.nan if value is None else float(value) for value in values]
    )


def test_outcomes_of_parts_are_joined_in_order():
    """A metric is the mean of the parts' means; a column that one part lacks is None there."""
    first = RewardOutcome(np.array([[1.0], [np.nan]]), {"seen": 2.0, "once": 5.0}, {"why": ["a", "b"]})
    second = RewardOutcome(np.array([[0.5]]), {"seen": 4.0}, {})
    whole = joined([first, second])
    np.testing.assert_array_equal(whole.values, [[1.0], [np.nan], [0.5]])
    assert whole.metrics == {"seen": 3.0, "once": 5.0}
    assert whole.extras == {"why": ["a", "b", None]}


# --- rewards of turns ---


def scored(*results, **more):
    functions = [lambda completions, result=result, **_: result for result in results]
    return call(*functions, rows=2, completions=TURNS, **more)


def test_a_function_may_score_each_turn():
    """Its column is NaN for the outcome, its rows' means for the logs; None is NaN at each turn."""
    outcome = scored([1.0, 0.5], [[0.2, 0.6], None], [(None, 3), [1]])
    np.testing.assert_array_equal(np.concatenate(outcome.turns[1]), [0.2, 0.6, NAN])
    np.testing.assert_array_equal(outcome.values, [[1.0, NAN, NAN], [0.5, NAN, NAN]])
    np.testing.assert_allclose(outcome.means, [[1.0, 0.4, 3.0], [0.5, NAN, 1.0]])
    first, second = outcome.turn_rewards([9.0, 2.0, 10.0])
    assert first == pytest.approx([0.4, 31.2]) and second == [10.0]
    assert outcome.extras == {"mine1/turns": [[0.2, 0.6], None], "mine2/turns": [[None, 3], [1]]}
    assert scored([1.0, 0.5]).turn_rewards([1.0]) is None


def test_turns_of_several_hosts_are_joined():
    """A host whose rows are all None cannot know that the function scores turns."""
    outcome = joined([scored([[1.0, 2.0], [3.0]]), scored([None, None])])
    first, second, *rest = outcome.turn_rewards([1.0])
    assert (first, second, rest) == ([1.0, 2.0], [3.0], [[], []])
    assert np.isnan(outcome.values).all()


@pytest.mark.parametrize(
    ("result", "error"),
    [
        ([[1.0], [1.0]], "one number per turn of the model; row 0 has 2 turns, got 1 numbers"),
        ([[1.0, 2.0], [1.0, 2.0]], "row 1 has 1 turns, got 2 numbers"),
        (
            [[1.0, 2.0], 1.0],
            "for every row a list with one number per turn, since it does for some; row 1 got 1.0",
        ),
        ([[1.0, 2.0]], "one list for each of the 2 completions, got 1"),
        ([[1.0, "2"], [1.0]], "row 0, turn 1 got '2'"),
        ([[1.0, NAN], [1.0]], "row 0, turn 1 got nan"),
    ],
)
def test_rewards_that_do_not_fit_the_turns_are_errors_with_the_row(result, error):
    with pytest.raises(RewardError, match=re.escape(error)):
        scored(result)


def test_what_a_reward_changes_reaches_no_other_row_reward_or_update():
    shared, messages = ["add"], [[said("a")] for _ in range(3)]

    def greedy(completions, expected, **_):
        for conversation, todo in zip(completions, expected, strict=True):
            conversation[-1]["content"] = "CLEANED"
            todo.remove("add")
        return [1.0] * len(completions)

    def second(completions, expected, **_):
        return [
            float(c[-1]["content"] == "a" and e == ["add"])
            for c, e in zip(completions, expected, strict=True)
        ]

    outcome = call(greedy, second, rows=3, completions=messages, columns={"expected": [shared] * 3})
    assert outcome.values.tolist() == [[1.0, 1.0]] * 3
    assert shared == ["add"] and messages == [[said("a")]] * 3
