"""One living run per folder: the lock ends with its process and is seen by others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.run import lock
from grpo_jax.run.lock import LOCK, check_writable, run_lock, start_over

ROOT = Path(__file__).parents[1]
HOLD = """
import os, sys, time
from grpo_jax.run.lock import run_lock
with run_lock(sys.argv[1], "grpo_jax.train"):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder, how="alone"):
    """A process that holds the lock until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_first_ones_host_and_number(tmp_path):
    first = hold(tmp_path / "run")
    with (
        pytest.raises(
            ValueError, match=rf"run is in use by grpo_jax.train \(process {first.pid} on host \S+, since 20"
        ),
        run_lock(tmp_path / "run", "grpo_jax.sft"),
    ):
        pass
    first.communicate("")
    with run_lock(tmp_path / "run", "grpo_jax.sft"):
        assert (tmp_path / "run" / LOCK).exists()
    assert [*(tmp_path / "run").iterdir()] == []


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_the_lock_of_a_killed_process_locks_nothing(tmp_path, how):
    """Nor do the children that it forked, which may live on."""
    first = hold(tmp_path, how)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK).exists()
    with run_lock(tmp_path, "grpo_jax.train"):
        pass
    os.killpg(first.pid, signal.SIGKILL) if how == "fork" else None


def test_a_process_does_not_lock_twice(tmp_path):
    with run_lock(tmp_path, "grpo_jax.train"):
        with pytest.raises(ValueError, match="in use by this process"), run_lock(tmp_path, "grpo_jax.train"):
            pass
        assert (tmp_path / LOCK).exists()
    with run_lock(tmp_path, "grpo_jax.train"):
        pass


def test_only_the_first_host_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.hosts, "of_first", lambda make: None)
    with run_lock(tmp_path / "run", "grpo_jax.train"):
        assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir .*/file/run: .*/file is a file; choose a folder"):
        check_writable(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_left_of_the_trial(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert [*(tmp_path / "a" / "b").iterdir()] == []


def test_starting_over_removes_links_and_not_what_they_point_to(tmp_path):
    out, disk = tmp_path / "run", tmp_path / "disk"
    for folder in (out / "rollouts", disk / "7"):
        folder.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoints").symlink_to(disk)
    start_over(out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"] and (disk / "7").exists()
