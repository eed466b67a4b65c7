"""Several processes: what they tell each other, and runs of the command in two that give what one gives."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import jax
import launch
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import multihost_utils
from safetensors.numpy import load_file

from grpo_jax import hosts
from grpo_jax.data.batches import Cursor, next_batch
from grpo_jax.models import sharding

# A process's part of a batch


def test_a_process_takes_its_contiguous_part():
    draws = [(5, 10), (0, 11), (6, 12), (1, 13), (7, 14), (2, 15)]
    assert hosts.part_of(draws, 0, 3) == [(5, 10), (0, 11)]
    assert hosts.part_of(draws, 2, 3) == [(7, 14), (2, 15)]
    assert hosts.part_of(draws, 0, 1) == draws


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_the_parts_of_all_processes_are_the_whole_batch(count, size, seed):
    """Each draws the whole batch for itself, as a process of a run does."""
    parts = [
        hosts.part_of(next_batch(40, count * size, Cursor(), seed)[0], index, count) for index in range(count)
    ]
    assert {len(part) for part in parts} == {size}
    assert [draw for part in parts for draw in part] == next_batch(40, count * size, Cursor(), seed)[0]


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (0, 4, "must divide by the number of processes, 4, got 6; change per_device"),
        (3, 3, r"process_index must be in \[0, process_count = 3\), got 3"),
        (-1, 3, r"process_index must be in \[0, process_count = 3\), got -1"),
        (0, 0, r"process_index must be in \[0, process_count = 0\), got 0"),
    ],
)
def test_a_batch_that_has_no_such_part_is_an_error(index, count, message):
    with pytest.raises(ValueError, match=message):
        hosts.part_of([(i, i) for i in range(6)], index, count)


# What processes tell each other


class Threads:
    """Threads in the place of processes: an all-gather is a list that each fills at its place."""

    def __init__(self, count):
        self.count, self.own = count, threading.local()
        self.barrier, self.given = threading.Barrier(count, timeout=10), [None] * count

    def allgather(self, x, tiled):
        self.given[self.own.index] = x
        self.barrier.wait()
        everything = np.stack(self.given)
        self.barrier.wait()
        return everything

    def run(self, function):
        """What the function returned or raised in each thread."""
        results = [None] * self.count

        def one(index):
            self.own.index = index
            try:
                results[index] = function(index)
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(i,)) for i in range(self.count)]
        with (
            mock.patch.object(hosts, "alone", lambda: False),
            mock.patch.object(multihost_utils, "process_allgather", self.allgather),
            mock.patch.object(jax, "process_index", lambda: self.own.index),
        ):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return results


def test_all_processes_get_what_each_made_in_order():
    """Messages of unlike lengths, longer than the smallest buffer."""
    made = [{"text": "x" * 3000}, None, [1.5, "é"]]
    assert Threads(3).run(lambda i: hosts.gather(lambda: made[i])) == [made] * 3


def test_the_first_process_makes_for_all():
    calls = []

    def make():
        calls.append("made")
        return len(calls)

    assert Threads(3).run(lambda i: hosts.of_first(make)) == [1, 1, 1]


def test_an_error_in_one_process_is_raised_in_all_with_its_message():
    def make(index):
        if index == 1:
            raise KeyError("tool")
        return index

    errors = Threads(2).run(lambda i: hosts.gather(lambda: make(i)))
    assert [str(error) for error in errors] == ["process 1 failed: KeyError: 'tool'"] * 2
    assert [type(error.__cause__) for error in errors] == [type(None), KeyError]


def test_a_failure_waits_until_all_know_of_it():
    def turn(index):
        failure = hosts.Failure()
        for number in range(2):
            with failure:
                if index == 1:
                    raise RuntimeError(f"call {number}")
        if hosts.agree([failure.error is not None]).any():
            failure.raise_everywhere()

    errors = Threads(2).run(turn)
    assert [str(error) for error in errors] == ["process 1 failed: RuntimeError: call 0"] * 2


def test_processes_that_hold_different_values_all_say_so():
    values = [{"seed": 1}, {"seed": 1}, {"seed": 2}]
    assert Threads(2).run(lambda i: hosts.check_alike("the seed", values[i])) == [None, None]
    errors = Threads(3).run(lambda i: hosts.check_alike("the seed", values[i]))
    assert [type(error) for error in errors] == [ValueError] * 3
    assert "the seed must be the same in every process, got something else in process 2" in str(errors[0])


def test_alone_errors_keep_their_own_path_and_nothing_is_sent():
    with mock.patch.object(multihost_utils, "process_allgather", side_effect=AssertionError):
        with pytest.raises(KeyError), hosts.Failure():
            raise KeyError
        with pytest.raises(KeyError):
            hosts.gather({}.popitem)
        assert hosts.of_first(lambda: 7) == 7
        assert hosts.agree([3, 4]).tolist() == [[3, 4]]
        assert hosts.share(range(3)) == [0, 1, 2]


# Start-up


@pytest.mark.parametrize(
    ("environ", "initialised"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "4", "SLURM_STEP_NUM_TASKS": "4"}, {}),
        (
            {"SLURM_JOB_ID": "4", "SLURM_STEP_NUM_TASKS": "1"},
            None,
        ),  # one task, as in a job's interactive shell
        ({"SLURM_JOB_ID": "4", "SLURM_NTASKS": "4"}, None),  # without srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "t-0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "GRPO_JAX_DISTRIBUTED": "0"}, None),
        ({"GRPO_JAX_DISTRIBUTED": "1"}, {}),
        ({"GRPO_JAX_DISTRIBUTED": ""}, None),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {"coordinator_address": "h:1"}),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0},
        ),
    ],
)
def test_processes_are_joined_where_there_are_several(environ, initialised):
    with (
        mock.patch.object(jax.distributed, "initialize") as initialize,
        mock.patch.object(jax.config, "update"),
    ):
        hosts.join_processes(environ)
    heartbeat = {"heartbeat_timeout_seconds": 50}
    assert initialize.call_args == (None if initialised is None else mock.call(**initialised, **heartbeat))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set and JAX_COORDINATOR_ADDRESS is not"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "one"},
            "JAX_PROCESS_ID must be a whole number, got 'one'",
        ),
        ({"GRPO_JAX_DISTRIBUTED": "yes"}, "GRPO_JAX_DISTRIBUTED must be 1 .* got 'yes'"),
    ],
)
def test_variables_that_name_no_process_are_an_error(environ, message):
    with pytest.raises(ValueError, match=message):
        hosts.join_processes(environ)


JOINING = """
from grpo_jax import hosts
try:
    hosts.join_processes()
except ValueError as error:
    print(error)
"""


def test_a_cluster_that_jax_does_not_know_is_an_error_that_names_the_variables():
    environ = os.environ | {"GRPO_JAX_DISTRIBUTED": "1", "PYTHONPATH": str(launch.ROOT)}
    ran = subprocess.run([sys.executable, "-c", JOINING], env=environ, capture_output=True, text=True)
    assert "jax cannot join the processes of a run here" in ran.stdout, ran.stderr
    assert "Set JAX_COORDINATOR_ADDRESS=HOST:PORT" in ran.stdout


def test_hosts_that_did_not_join_are_an_error():
    with (
        mock.patch.object(jax, "process_count", lambda: 2),
        pytest.raises(ValueError, match="2 processes that were not joined; set GRPO_JAX_DISTRIBUTED=1"),
    ):
        sharding.make_mesh()


def test_tensor_stays_inside_a_host():
    with (
        mock.patch.object(hosts, "alone", lambda: False),
        mock.patch.object(jax, "device_count", lambda: 8),
        mock.patch.object(jax, "local_device_count", lambda: 2),
        pytest.raises(ValueError, match="mesh_tensor must divide the number of devices of a host, 2, got 4"),
    ):
        sharding.make_mesh(1, 2, 4)


# Runs in several processes

UPDATES = 4
# Every turn that ends is read as a call, whose arguments depend on its tokens.
TOOLS = """\
from grpo_jax.rollout.conversation import Conversation
from grpo_jax.types import ParsedTurn, ToolCall
from tools_funcs.math_tools import TOOL_FUNCTIONS


def parse(self, ids, schemas):
    return ParsedTurn("", None, (ToolCall("add", {"a": len(ids), "b": sum(ids) % 97}),), None)


Conversation.parse = parse
"""


def options(folder, devices, **changes):
    """Four updates of four prompts × two generations, tool calls and evaluations included."""
    settings = {
        "model_name_or_path": launch.smoke().folder / "cold_start",
        "dataset_id_or_path": launch.train_rows(),
        "eval_dataset_id_or_path": launch.evaluation_rows(),
        "tools_script": launch.write(launch.FOLDER / "calling.py", TOOLS),
        "tool_functions_module": None,
        "per_device_train_batch_size": 8 // devices,
        "num_generations": 2,
        "max_steps": UPDATES,
        "max_grpo_completion_length": 127,
        "max_tool_calling_iterations": 2,
        "adam_epsilon": 1e-2,  # the sign of a tiny gradient must not decide
        "save_steps": 100,
    }
    return launch.options(folder, **(settings | changes))


def environment(devices):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "NPROC": "32"}


def run_on_one(devices, folder, **changes):
    """One process with several devices."""
    argv = options(folder, devices, **changes)
    return launch.finish(launch.start("train", argv, environment(devices)), folder)


def run_on(count, folder, **changes):
    """Several processes with one device each; they end by themselves, or the test fails.

    Not with two each, which now and then hang in gloo's collectives (docs/log.md).
    """
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    own = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    argv = options(folder, count, **changes)
    processes = [
        launch.start("train", argv, environment(1) | own | {"JAX_PROCESS_ID": str(index)})
        for index in range(count)
    ]
    try:
        return [launch.finish(process, folder) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    ran = run_on_one(2, tmp_path_factory.mktemp("one") / "run")
    assert ran.status == 0, ran.err
    assert sum(line["tools/call_frequency"] for line in ran.jsonl("metrics.jsonl")) > 1
    return ran


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ran, other = run_on(2, tmp_path_factory.mktemp("two") / "run")
    assert (ran.status, other.status) == (0, 0), ran.err + other.err
    return ran


def assert_same_run(ran, one, updates=UPDATES, evaluations=("before", "after")):
    """The same tokens (the reward is a sum of them), tool calls and figures; weights up to rounding."""
    for step in range(1, updates + 1):
        rows, want = (r.jsonl(f"rollouts/step_{step:06d}.jsonl") for r in (ran, one))
        for name in ("prompt", "messages", "rewards", "status"):
            assert [row[name] for row in rows] == [row[name] for row in want]
        np.testing.assert_allclose([r["advantage"] for r in rows], [r["advantage"] for r in want], rtol=1e-6)
    clock = {"step_time"}
    for got, want in zip(ran.jsonl("metrics.jsonl"), one.jsonl("metrics.jsonl"), strict=True):
        assert got.keys() == want.keys()
        for name in got.keys() - clock:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-5, err_msg=name)
        assert abs(got["loss"] - want["loss"]) < 1e-4
    for part in evaluations:
        assert ran.json("summary.json")[part] == one.json("summary.json")[part]
    weights, before = load_file(one.folder / "model/model.safetensors"), launch.smoke().folder / "cold_start"
    start = load_file(before / "model.safetensors")
    assert max(np.abs(weights[name] - start[name]).max() for name in weights) > 1e-3
    for name, x in load_file(ran.folder / "model/model.safetensors").items():
        np.testing.assert_allclose(x, weights[name], atol=2e-5, err_msg=name)


def assert_equal_run(ran, whole):
    """The same bits, but for the clock."""
    got, want = (
        [{k: v for k, v in line.items() if k != "step_time"} for line in r.jsonl("metrics.jsonl")]
        for r in (ran, whole)
    )
    assert got == want
    for step in range(1, UPDATES + 1):
        assert ran.jsonl(f"rollouts/step_{step:06d}.jsonl") == whole.jsonl(f"rollouts/step_{step:06d}.jsonl")
    assert ran.weights() == whole.weights()


@pytest.mark.slow
def test_two_processes_sample_and_learn_as_one(one, two):
    assert_same_run(two, one)
    assert {path.name for path in two.folder.iterdir()} == {path.name for path in one.folder.iterdir()}


@pytest.mark.slow
def test_with_weights_sharded_over_both_processes_they_learn_as_one(tmp_path, one):
    """Each then holds all rows of the rollout on its device, but speaks for its own alone."""
    ran, other = run_on(2, tmp_path / "run", mesh_data=1, mesh_fsdp=2)
    assert (ran.status, other.status) == (0, 0), ran.err + other.err
    assert_same_run(ran, one)


@pytest.mark.slow
def test_four_processes_sample_and_learn_as_one(tmp_path):
    changes = {"max_steps": 2, "eval_dataset_id_or_path": None}
    one = run_on_one(4, tmp_path / "one", **changes)
    first, *others = run_on(4, tmp_path / "four", **changes)
    assert [ran.status for ran in (one, first, *others)] == [0] * 5, one.err + first.err
    assert_same_run(first, one, updates=2, evaluations=())


@pytest.mark.slow
def test_two_processes_replace_the_same_groups_as_one(tmp_path):
    """Only groups of odd first numbers differ in themselves, so that batches take several rollouts."""
    value = "[sum(ids) % 11 / 10 if int(a[5:]) % 4 == 3 else 0.5 for ids, a in zip(completion_ids, kwargs['answer'])]"
    reward = launch.write(tmp_path / "odd.py", launch.SPREAD.format(value=value))
    changes = {"dynamic_sampling": True, "difficulty_sampling": True, "reward_fn": reward, "max_steps": 2}
    changes |= {"eval_dataset_id_or_path": None}
    one = run_on_one(2, tmp_path / "one", **changes)
    two, other = run_on(2, tmp_path / "two", **changes)
    assert (one.status, two.status, other.status) == (0, 0, 0), one.err + two.err + other.err
    rounds = [[line["rollout/rounds"] for line in ran.jsonl("metrics.jsonl")] for ran in (one, two)]
    assert rounds[0] == rounds[1] and max(rounds[0]) > 1
    for step in (1, 2):
        rows, want = (ran.jsonl(f"rollouts/step_{step:06d}.jsonl") for ran in (two, one))
        for name in ("prompt", "messages", "rewards"):
            assert [row[name] for row in rows] == [row[name] for row in want]
        np.testing.assert_allclose([r["advantage"] for r in rows], [r["advantage"] for r in want], rtol=1e-6)


def reward_in_process_one(folder, body, after=1):
    """The small run's reward, which in process 1 does something after an update, once."""
    return launch.reward_that(folder, f"os.environ['JAX_PROCESS_ID'] == '1' and step == {after}", body)


@pytest.mark.slow
def test_sigterm_in_one_process_saves_in_both_and_the_resume_is_exact(tmp_path, two):
    """It comes after the rollout of update 2, so that all stop in that of update 3."""
    reward = reward_in_process_one(tmp_path / "rewards", "os.kill(os.getpid(), signal.SIGTERM)")
    stopped = run_on(2, tmp_path / "run", reward_fn=reward)
    assert [ran.status for ran in stopped] == [130, 130], stopped[1].err
    assert "Stopped after update 2, which is saved." in stopped[0].out
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
    ran, other = run_on(2, tmp_path / "run", reward_fn=reward)
    assert (ran.status, other.status) == (0, 0), ran.err + other.err
    assert "Continuing from the checkpoint of update 2" in ran.out
    assert_equal_run(ran, two)


@pytest.mark.slow
def test_an_error_in_one_processs_reward_ends_both_with_its_message(tmp_path):
    reward = reward_in_process_one(tmp_path / "rewards", "raise ZeroDivisionError('no such row')")
    first, second = run_on(2, tmp_path / "run", reward_fn=reward)
    assert (first.status, second.status) == (1, 1)
    for ran in (first, second):
        assert "Error: process 1 failed: RewardError: reward function 'spread'" in ran.err
        assert "ZeroDivisionError: no such row" in ran.err
    assert "Traceback" in second.err and "Traceback" not in first.err


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_within_a_minute_and_the_restart_of_both_is_exact(tmp_path, two):
    body = (
        "Path(__file__).with_name('died').write_text(str(time.time())); os.kill(os.getpid(), signal.SIGKILL)"
    )
    reward = reward_in_process_one(tmp_path / "rewards", f"import time; {body}", after=2)
    first, second = run_on(2, tmp_path / "run", reward_fn=reward, save_steps=1)
    assert time.time() - float((tmp_path / "rewards/died").read_text()) < 60
    assert first.status != 0 and second.status == -9
    assert "continues from the newest checkpoint" in first.err or "distributed" in first.err
    ran, other = run_on(2, tmp_path / "run", reward_fn=reward, save_steps=1)
    assert (ran.status, other.status) == (0, 0), ran.err + other.err
    assert re.search("Continuing from the checkpoint of update [12]", ran.out)
    assert_equal_run(ran, two)


@pytest.mark.slow
def test_bad_input_ends_both_before_anything_compiles(tmp_path):
    """Whichever meets it first says so; the other may be ended before it can."""
    runs = run_on(2, tmp_path / "run", mesh_data=1, mesh_tensor=2)
    assert all(ran.status != 0 and "Compiling" not in ran.out for ran in runs)
    assert any("mesh_tensor must divide the number of devices of a host, 1, got 2" in ran.err for ran in runs)
