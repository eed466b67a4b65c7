"""What a run does when something around it fails: damaged checkpoints, full disks, a full device, SIGTERM at bad moments."""

import itertools
import re
import shutil
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import launch
import pytest
from test_train import assert_equals_the_whole_run, timeless

from grpo_jax import sft, trainer
from grpo_jax.run import cold_start, evaluation


def test_damaged_checkpoints_are_set_aside_and_a_model_that_cannot_be_written_costs_no_update(tmp_path):
    """The newest has truncated weights and the one before no meta, so that the run continues after update 2."""
    folder = shutil.copytree(launch.whole().folder, tmp_path / "run")
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    for file in (folder / "checkpoints/4/params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:8])
    shutil.rmtree(folder / "checkpoints/3/meta")
    (folder / ".model.tmp").write_text("in the way")
    ran = launch.small_run(folder)
    for step, before in ((4, 3), (3, 2)):
        assert (
            f"Warning: the checkpoint of update {step} is damaged and was renamed to {folder}/checkpoints/"
            f".damaged-{step}; the one of update {before} is used instead"
        ) in ran.out
    assert "Continuing from the checkpoint of update 2" in ran.out
    assert (ran.status, ran.err.count("\n")) == (1, 1)
    assert ran.err.startswith(f"Error: cannot write {folder}/model: File exists")
    (folder / ".model.tmp").unlink()
    again = launch.small_run(folder)
    assert "Continuing from the checkpoint of update 4" in again.out
    assert "update 4/4" not in again.out
    assert_equals_the_whole_run(again)


def test_training_goes_on_where_a_checkpoint_and_a_rollout_file_cannot_be_written(tmp_path):
    """From update 2 to 3 a limit on the size of files stands for a full disk; a folder is in one file's place."""
    folder = tmp_path / "run"
    reward = launch.write(
        tmp_path / "spread.py",
        "import resource\nfrom pathlib import Path\n\n\n"
        "def reward_func(completions, completion_ids, trainer_state, **kwargs):\n"
        "    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "    if trainer_state['global_step'] == 1:\n"
        f"        Path({str(folder)!r}, 'rollouts', 'step_000002.jsonl').mkdir()\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))\n"
        "    if trainer_state['global_step'] == 3:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        f"    return {launch.SPREAD_VALUE}\n",
    )
    ran = launch.small_run(folder, reward_fn=reward)
    assert ran.status == 0, ran.err
    assert f"Warning: cannot write {folder}/checkpoints/2: File too large" in ran.out
    assert "Training continues, and the next save tries again" in ran.out
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"1", "4"}
    (folder / "rollouts/step_000002.jsonl").rmdir()
    assert not [path for path in (folder / "rollouts").iterdir() if path.suffix == ".tmp"]
    assert ran.weights() == launch.whole().weights()
    assert timeless(ran.jsonl("metrics.jsonl")) == timeless(launch.whole().jsonl("metrics.jsonl"))


def of_a_computation_that_waits_for_one_too_large(*_, **__):
    """XLA calls it INTERNAL on a CPU, as where an update waits for the one before."""
    wide = jax.jit(
        lambda x: jax.lax.fori_loop(0, 2, lambda i, y: jnp.sort(y) + i, jnp.broadcast_to(x, 1 << 46)).sum()
    )
    jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y + 1, x))(
        wide(jnp.float32(1))
    ).block_until_ready()


@pytest.mark.parametrize(
    "overflow",
    [
        lambda *_, **__: jnp.zeros(1 << 46).block_until_ready(),
        of_a_computation_that_waits_for_one_too_large,
    ],
)
def test_a_device_without_memory_is_one_line_that_says_what_fills_it_and_what_to_lower(tmp_path, overflow):
    """The errors are XLA's own."""
    with mock.patch.object(trainer, "make_batch", overflow):
        ran = launch.small_run(tmp_path / "run", max_steps=1)
    assert (ran.status, ran.err.count("\n")) == (1, 1)
    assert re.match(
        "Error: the device has no memory left in update: Out of memory allocating [0-9]{15} bytes", ran.err
    )
    assert "by shape: float32[" in ran.err
    assert "To fit: raise micro_batches, set gradient_checkpointing" in ran.err


# SIGTERM


def signalled(function, nth):
    """The function, which at its n-th call first sends SIGTERM to this process."""
    calls = []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == nth:
            signal.raise_signal(signal.SIGTERM)
        return function(*args, **kwargs)

    return call


class Lost(BaseException):
    """The process ends here."""


def failing(function, nth):
    """The function, which at its n-th call ends the process instead."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == nth:
            raise Lost
        return function(*args, **kwargs)

    return call


def test_sigterm_in_a_rollout_saves_the_update_before_at_once(tmp_path):
    with mock.patch.object(trainer, "roll_out", signalled(trainer.roll_out, 3)):
        stopped = launch.small_run(tmp_path / "run", save_steps=100)
    assert stopped.status == 130
    assert "Stopped after update 2, which is saved. The same command continues." in stopped.out
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
    assert not (tmp_path / "run/report.html").exists()  # drawing it takes seconds
    again = launch.small_run(tmp_path / "run", save_steps=100)
    assert "Continuing from the checkpoint of update 2" in again.out
    assert_equals_the_whole_run(again)


def test_sigterm_before_there_is_anything_to_save_has_the_status_of_an_interruption(tmp_path):
    with mock.patch.object(trainer, "load_data", signalled(trainer.load_data, 1)):
        stopped = launch.small_run(tmp_path / "run")
    assert (stopped.status, stopped.err) == (130, "Interrupted.\n")


@pytest.mark.slow
def test_sigterm_in_an_evaluation_saves_its_update_and_is_evaluated_later(tmp_path):
    """Six rows in batches of four: the third batch is the first of the evaluation after update 2."""
    options = {"eval_dataset_id_or_path": launch.evaluation_rows(), "eval_steps": 2, "save_steps": 100}
    whole = launch.small_run(tmp_path / "whole", **options)
    for folder, nth, where in (
        ("during", 3, "after update 2, which is saved"),
        ("last", 5, "in Evaluation after"),
    ):
        with mock.patch.object(evaluation, "roll_out", signalled(evaluation.roll_out, nth)):
            stopped = launch.small_run(tmp_path / folder, **options)
        assert stopped.status == 130, stopped.err
        assert f"Stopped {where}. The same command continues." in stopped.out
        again = launch.small_run(tmp_path / folder, **options)
        assert again.status == 0, again.err
        assert again.weights() == whole.weights()
        assert timeless(again.jsonl("metrics.jsonl")) == timeless(whole.jsonl("metrics.jsonl"))
        assert again.json("summary.json")["after"] == whole.json("summary.json")["after"]


@pytest.mark.slow
def test_sigterm_in_a_cold_start_saves_it_and_the_same_command_ends_it_bit_for_bit(tmp_path):
    """After update 3 of 4; another learning rate would begin anew."""
    options = {"sft_max_steps": 4, "sft_eval_steps": 2, "max_grpo_completion_length": 120}
    whole = launch.call(sft.main, launch.options(tmp_path / "whole", **options), tmp_path / "whole")
    assert whole.status == 0, whole.err
    folder = tmp_path / "run"
    argv = launch.options(folder, **options)
    with mock.patch.object(cold_start, "next_batch", signalled(cold_start.next_batch, 3)):
        stopped = launch.call(sft.main, argv, folder)
    assert stopped.status == 130, stopped.err
    assert (
        "Stopped in the cold start, after its update 3, which is saved. The same command continues."
        in stopped.out
    )
    assert not (folder / "model").exists()
    other = shutil.copytree(folder, tmp_path / "other")
    lost, of_lost = (
        tmp_path / "lost",
        {"save_steps": 2} | options,
    )  # without a signal only what was saved before is left
    with mock.patch.object(cold_start, "make_batch", failing(cold_start.make_batch, 4)), pytest.raises(Lost):
        launch.call(sft.main, launch.options(lost, **of_lost), lost)
    for run, given, done in ((folder, options, 3), (lost, of_lost, 2)):
        again = launch.call(sft.main, launch.options(run, **given), run)
        assert again.status == 0, again.err
        assert f"Continuing the cold start after its update {done}" in again.out
        assert again.weights() == whole.weights()
        assert again.json("sft.json")["validation"] == whole.json("sft.json")["validation"]
        assert not (run / "model_checkpoint").exists()
    changed = launch.call(sft.main, launch.options(other, **options, sft_learning_rate=1e-4), other)
    assert changed.status == 0, changed.err
    assert "Continuing" not in changed.out
