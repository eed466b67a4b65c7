"""The training command: what a run leaves, what it learns from, and that it can be interrupted anywhere."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import jax
import launch
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

from grpo_jax import export, sft, train, trainer
from grpo_jax.data.batches import Steps, epoch_order
from grpo_jax.models import hf
from grpo_jax.models.qwen import abstract_params
from grpo_jax.run import job
from grpo_jax.run.checkpoint import Checkpoints
from grpo_jax.run.config import parse_config
from grpo_jax.run.options import GRPOConfig
from grpo_jax.scoring import evaluation
from grpo_jax.tools import load_tools

LEAVINGS = {
    "resolved_config.yaml",
    "metrics.jsonl",
    "rollouts",
    "evaluation",
    "checkpoints",
    "model",
    "summary.json",
    "report.html",
    "base_model",
    "cold_start",
}
METRICS = {
    "reward",
    "reward_std",
    "rewards/math_reward/mean",
    "rewards/math_reward/std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/turn_closed",
    "completions/answer_grounded",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "tools/call_frequency",
    "tools/failure_frequency",
    "num_tokens",
    "step_time",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
}
PHASES = {"compile", "cold_start", "rollout", "reward", "update", "evaluate", "save"}
OPTIMISED = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # see conftest
FIGURES = {*evaluation.FIGURES, "n"}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with its time of change and bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def timeless(lines: list[dict]) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{name: value for name, value in line.items() if name != "step_time"} for line in lines]


# What a run leaves


def test_the_smoke_run_leaves_what_the_contract_names():
    ran = launch.smoke()
    assert ran.status == 0, ran.err
    assert {path.name for path in ran.folder.iterdir()} == LEAVINGS
    assert {path.name for path in (ran.folder / "checkpoints").iterdir()} == {"1", "2"}
    assert {path.name for path in (ran.folder / "rollouts").iterdir()} == {
        "step_000001.jsonl",
        "step_000002.jsonl",
    }


def test_the_smoke_run_says_what_it_does_in_plain_lines():
    out = launch.smoke().out
    for text in (
        "Loaded 2 tool functions:",
        "  add(a: int, b: int) -> str",
        f"Reward function: math_reward ({launch.ROOT}/rewards/math_reward.py)",
        "2 prompts of up to",
        "Compiling update …",
        "Cold start: 4 updates on gold calls",
        "Evaluation before: exact_answer_match",
        "update 2/2: reward",
        "Sample conversations",
        "Evaluation after: exact_answer_match",
        "Finished: 2 updates",
    ):
        assert text in out
    assert "\x1b" not in out  # no terminal, no escape sequences


def test_the_resolved_config_is_read_again_as_it_is():
    folder = launch.smoke().folder
    again = parse_config(["--config", str(folder / "resolved_config.yaml")], prog="test").config
    flags = ["--output_dir", str(folder), "--compilation_cache_dir", str(launch.XLA_CACHE)]
    smoke = str(launch.ROOT / "configs" / "smoke.yaml")
    assert again == parse_config(["--config", smoke, *flags], prog="test").config


def test_metrics_hold_one_line_an_update_under_trls_names():
    lines = launch.smoke().jsonl("metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line.keys() >= METRICS
        assert all(isinstance(value, int | float) for value in line.values())
        assert 0 < line["rollout/wasted_decode"] < 1
    assert lines[0]["learning_rate"] == pytest.approx(3e-4)  # linear decay over two updates
    assert lines[1]["learning_rate"] == pytest.approx(1.5e-4)
    assert lines[1]["epoch"] == pytest.approx(4 / 6000)
    assert lines[0]["num_tokens"] < lines[1]["num_tokens"]


def test_rollouts_hold_every_completion_with_the_advantage_that_its_group_gives():
    rows = launch.whole().jsonl("rollouts/step_000001.jsonl")
    assert len(rows) == 8
    for group in (rows[:4], rows[4:]):
        assert len({row["prompt"] for row in group}) == len({row["answer"] for row in group}) == 1
        rewards = np.array([row["rewards"]["spread"] for row in group])
        by_hand = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        np.testing.assert_allclose([row["advantage"] for row in group], by_hand, rtol=1e-5, atol=1e-6)
    assert len({row["advantage"] for row in rows}) > 2
    assert all(row["messages"][0]["role"] == "assistant" for row in rows)


def test_the_model_loads_in_transformers_and_is_that_of_the_last_checkpoint():
    ran = launch.whole()
    folder = ran.folder / "model"
    assert AutoConfig.from_pretrained(folder).model_type == "qwen3"
    assert AutoTokenizer.from_pretrained(folder).encode("<tool_call>") != []
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (launch.small_model() / name).read_bytes()
    cfg = hf.read_config(folder)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), abstract_params(cfg)
    )
    exported = hf.load_params(folder, cfg, jax.tree.map(lambda _: one, shapes))
    with Checkpoints(ran.folder / "checkpoints") as checkpoints:
        saved = checkpoints.restore_params(launch.UPDATES, shapes)
    jax.tree.map(np.testing.assert_array_equal, exported, saved)
    assert ran.weights() != (launch.small_model() / "model.safetensors").read_bytes()


def test_the_summary_holds_both_evaluations_and_the_seconds_of_every_phase():
    ran = launch.smoke()
    summary = ran.json("summary.json")
    for part in ("before", "after"):
        assert summary[part].keys() >= FIGURES
        assert summary[part]["n"] == 16
        assert all(0 <= summary[part][name] <= 1 for name in FIGURES - {"n"})
        rows = ran.jsonl(f"evaluation/{part}.jsonl")
        for name in FIGURES - {"n"}:
            assert sum(row[name] for row in rows) / 16 == pytest.approx(summary[part][name])
    row = launch.whole().jsonl("rollouts/step_000001.jsonl")[0]
    assert rows[0].keys() - set(evaluation.FIGURES) == row.keys() - {"rewards", "advantage"}
    assert summary["timings"].keys() == PHASES
    assert all(seconds > 0 for seconds in summary["timings"].values())
    assert sum(summary["timings"].values()) < ran.seconds


def test_a_finished_run_says_so_and_changes_nothing():
    ran = launch.whole()
    before = contents(ran.folder)
    again = launch.small_run(ran.folder)
    assert again.status == 0
    assert "is finished" in again.out
    assert "--overwrite_output_dir" in again.out
    assert again.compiles == 0
    assert contents(ran.folder) == before


def test_a_finished_run_asked_for_more_updates_continues_to_the_same_weights(tmp_path):
    """2 updates and then 4 are bit for bit the run of 4, which is a later start of it like any other."""
    half = launch.small_run(tmp_path / "run", max_steps=2)
    assert half.status == 0, half.err
    assert half.json("summary.json")["updates"] == 2
    again = launch.small_run(tmp_path / "run")
    assert "Continuing from the checkpoint of update 2" in again.out
    assert "the run's number of updates: 2 then, 4 now" in again.out
    assert_equals_the_whole_run(again)
    assert again.json("summary.json")["updates"] == 4
    assert "finished after 4 updates" in launch.small_run(tmp_path / "run", max_steps=3).out


def test_a_finished_run_without_checkpoints_cannot_continue(tmp_path):
    folder = tmp_path / "run"
    launch.write(folder / "summary.json", '{"after": null, "updates": 2}')
    ran = launch.small_run(folder, save_strategy="no")
    assert (ran.status, ran.compiles) == (2, 0)
    assert (
        "is finished after 2 updates and left no checkpoint to continue from, 4 are requested now" in ran.err
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (10, 20)}, "the training data: 24 rows then, 20 rows now"),
        ({"rows": (11, 24)}, "the training data: 24 rows as before, but with other contents"),
        ({"seed": 7}, "seed: 42 then, 7 now"),
        ({"num_generations": 2}, "prompts per update: 2 then, 4 now; num_generations: 4 then, 2 now"),
        ({"num_iterations": 2}, "num_iterations: 1 then, 2 now"),
        ({"tool_functions_module": "tools_funcs.two_step_tools"}, "tools, by source: math_tools.py then"),
        ({"reward_fn": "rewards/math_reward.py"}, "the rewards: spread then, math_reward now"),
    ],
)
def test_a_checkpoint_of_another_job_is_refused(tmp_path, changes, message):
    settings = dict(changes)
    if (part := settings.pop("rows", None)) is not None:
        bare = [{k: row[k] for k in ("prompt", "answer", "tool_call")} for row in launch.rows(*part)]
        settings["dataset_id_or_path"] = launch.write_rows(tmp_path / "rows.jsonl", bare)
    elif "tool_functions_module" in settings:
        settings["dataset_id_or_path"] = launch.train_rows()
    step = launch.whole().folder / "checkpoints/2"
    ran = launch.small_run(tmp_path / "run", resume_from_checkpoint=step, **settings)
    assert (ran.status, ran.compiles) == (2, 0)
    assert f"cannot continue from {step}: this run differs from the one that saved it (" in ran.err
    assert message in ran.err
    assert "continue anyway with --allow_config_change" in ran.err
    assert ran.err.count("\n") == 1


def test_an_allowed_change_is_said_and_other_rows_are_read_from_their_start(tmp_path):
    rows = launch.write_rows(tmp_path / "rows.jsonl", launch.rows(30, 24))
    ran = launch.small_run(
        tmp_path / "run",
        "--allow_config_change",
        resume_from_checkpoint=launch.whole().folder / "checkpoints/2",
        dataset_id_or_path=rows,
        max_steps=3,
        learning_rate=1e-3,
    )
    assert ran.status == 0, ran.err
    assert "was saved: the training data: 24 rows as before, but with other contents" in ran.out
    assert "was saved: learning_rate: 0.003 then, 0.001 now" in ran.out
    assert "so it is read from the start of an epoch" in ran.out
    (line,) = ran.jsonl("metrics.jsonl")
    assert (line["step"], line["learning_rate"]) == (3, pytest.approx(1e-3))
    assert line["epoch"] == 2 / 24


def test_an_output_dir_that_vanishes_ends_the_run_in_one_line(tmp_path):
    """It is not made again with half of a run in it."""
    folder = tmp_path / "run"
    remove = f"shutil.rmtree({str(folder)!r}, ignore_errors=True)"
    reward = launch.reward_that(tmp_path, "step == 2", remove)
    ran = launch.small_run(folder, reward_fn=reward)
    assert ran.status == 1
    assert ran.err.startswith(
        f"Error: cannot write {folder}/metrics.jsonl: it, or its folder, was removed while"
    )
    assert ran.err.count("\n") == 1
    assert not (folder / "model").exists()


def test_a_full_disk_ends_the_run_in_one_line_and_the_same_command_continues(tmp_path):
    """A limit on the size of files, set by the reward after update 2, stands for the disk."""
    folder = tmp_path / "run"
    saved = folder / "checkpoints" / "2"  # in the background
    wait = f"while not Path({str(saved)!r}).exists(): os.sched_yield()"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    reward = launch.reward_that(tmp_path, "step == 2", f"{wait}\n        {limit}")
    argv = launch.options(folder, reward_fn=reward, save_total_limit=1)
    full = launch.finish(launch.start("train", argv), folder)
    assert full.status == 1, full.err
    lines = full.err.splitlines()
    assert len(lines) == 1, full.err
    assert lines[0].startswith(f"Error: cannot write {folder}/") and "File too large" in lines[0]
    again = launch.small_run(folder, reward_fn=reward, save_total_limit=1)
    assert "Continuing from the checkpoint of update 2" in again.out
    assert_equals_the_whole_run(again)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_alive(tmp_path):
    """Also with --overwrite_output_dir; the first continues as if nothing had been."""
    folder = tmp_path / "run"
    reward = launch.write(
        tmp_path / "slow/spread.py",
        "import time\nfrom pathlib import Path\n\n\ndef reward_func(completions, completion_ids, **kwargs):\n"
        "    Path(__file__).with_name('reached').touch()\n"
        "    while not Path(__file__).with_name('go').exists():\n        time.sleep(0.02)\n"
        f"    return {launch.SPREAD_VALUE}\n",
    )
    first = launch.start("train", launch.options(folder, reward_fn=reward))
    while first.poll() is None and not reward.with_name("reached").exists():
        time.sleep(0.05)
    for main, flags in ((train.main, []), (train.main, ["--overwrite_output_dir"]), (sft.main, [])):
        second = launch.call(main, [*launch.options(folder, reward_fn=reward, seed=7), *flags], folder)
        assert (second.status, second.compiles) == (2, 0)
        assert f"output_dir {folder} is in use by grpo_jax.train (process {first.pid} on host" in second.err
    check = launch.call(train.main, [*launch.options(folder, reward_fn=reward), "--plan", "cpu"], folder)
    assert check.status == 0, check.err
    reward.with_name("go").touch()
    ran = launch.finish(first, folder)
    assert_equals_the_whole_run(ran)
    assert not (folder / ".run.lock").exists()


def test_overwrite_starts_over_and_leaves_the_users_own_files(tmp_path):
    folder = shutil.copytree(launch.whole().folder, tmp_path / "run")
    notes = launch.write(folder / "notes.txt", "mine")
    again = launch.small_run(folder, "--overwrite_output_dir", max_steps=1)
    assert again.status == 0
    assert [line["step"] for line in again.jsonl("metrics.jsonl")] == [1]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["1"]
    assert [path.name for path in (folder / "rollouts").iterdir()] == ["step_000001.jsonl"]
    assert notes.read_text() == "mine"


def test_the_model_is_written_in_files_of_the_asked_size_and_the_load_is_timed(tmp_path):
    ran = launch.small_run(tmp_path / "run", max_steps=1, max_shard_size="50KB")
    assert ran.status == 0, ran.err
    files = list((tmp_path / "run/model").glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "run/model/model.safetensors.index.json").exists()
    assert sum(file.stat().st_size > 60_000 for file in files) <= 1  # a tensor is never cut: the embedding
    cfg = hf.read_config(tmp_path / "run/model")
    size = sum(x.size for x in jax.tree.leaves(abstract_params(cfg)))
    assert re.search(rf"^Loaded {size:,} parameters as float32 in \d+\.\d s$", ran.out, re.MULTILINE)


@pytest.mark.slow
def test_bf16_weights_and_moments_are_saved_resumed_and_exported_as_such(tmp_path):
    options = {"param_dtype": "bfloat16", "optim_dtype": "bfloat16"}
    whole = launch.small_run(tmp_path / "whole", **options)
    assert whole.status == 0, whole.err
    reward = interrupting_reward(tmp_path / "rewards", "SIGTERM")
    settings = options | {"reward_fn": reward, "save_steps": 100}
    assert launch.small_run(tmp_path / "run", **settings).status == 130
    again = launch.small_run(tmp_path / "run", **settings)
    assert "Continuing from the checkpoint of update 3" in again.out
    assert again.weights() == whole.weights() != launch.whole().weights()
    tensors = load_file(tmp_path / "run/model/model.safetensors")
    assert {x.dtype.name for x in tensors.values()} == {"bfloat16"}
    flags = ["--checkpoint", "latest", "--output_dir", tmp_path / "run"]
    assert launch.call(export.main, flags, tmp_path / "run").status == 0
    assert again.weights("export/step_4") == again.weights()
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        items = checkpoints._manager.item_metadata(4)
    saved = [*jax.tree.leaves(items.params.tree), *jax.tree.leaves(items.optimizer.tree["opt_state"])]
    assert {np.dtype(x.dtype).name for x in saved} == {"bfloat16", "int32"}  # the counters of updates


# What it learns from


@pytest.mark.slow
def test_rewards_of_turns_and_penalties_of_calls_train_and_are_logged(tmp_path):
    """Untrained, the model writes one turn; the run continues from its checkpoint to the same weights."""
    turns = "[[len(m['content']) % 5 / 5 for m in c if m['role'] == 'assistant'] for c in completions]"
    file = launch.write(tmp_path / "turns.py", launch.SPREAD.format(value=turns))
    settings = {"reward_fn": [launch.spread_reward(), file], "malformed_call_penalty": 0.5}
    whole = launch.small_run(tmp_path / "whole", **settings)
    assert whole.status == 0, whole.err
    reward = interrupting_reward(tmp_path / "rewards", "SIGTERM")
    settings |= {"reward_fn": [reward, file], "save_steps": 100}
    assert launch.small_run(tmp_path / "run", **settings).status == 130
    again = launch.small_run(tmp_path / "run", **settings)
    assert again.weights() == whole.weights() != launch.whole().weights()
    (row, *_) = whole.jsonl("rollouts/step_000001.jsonl")
    assert row["turns/turns"] == [row["rewards"]["turns"]]
    metrics = whole.jsonl("metrics.jsonl")
    assert all(0 <= one["rewards/turns/mean"] < 1 and not one["skipped"] for one in metrics)


def test_the_policy_never_sees_a_gold_call(tmp_path):
    """Without the column that holds them, GRPO makes the same weights bit for bit."""
    bare = [{"prompt": row["prompt"], "answer": row["answer"]} for row in launch.rows(10, 24)]
    data = launch.write_rows(tmp_path / "bare.jsonl", bare)
    assert launch.small_run(tmp_path / "run", dataset_id_or_path=data).status == 0
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == launch.whole().weights()


def test_evaluation_rows_whose_answers_are_all_errors_leave_the_figures_out(tmp_path):
    errors = [row | {"answer": "Error: wrong arguments"} for row in launch.rows(60, 4)]
    ran = launch.small_run(
        tmp_path / "run",
        max_steps=1,
        eval_dataset_id_or_path=launch.write_rows(tmp_path / "test.jsonl", errors),
    )
    assert ran.status == 0, ran.err
    assert "Evaluation before: exact_answer_match –, answer_grounded –, turn_closed – on 0 rows" in ran.out
    assert "Evaluation on 0 rows (4 rows whose answer is an error are not in the figures)" in ran.out
    after = ran.json("summary.json")["after"]
    assert (after["exact_answer_match"], after["n"], after["error_answers"]["n"]) == (None, 0, 4)


def test_columns_reach_the_reward(tmp_path):
    reward = launch.write(
        tmp_path / "columns.py",
        "def reward_func(completions, answer, tool_call, prompts, **kwargs):\n"
        "    for a, call, prompt in zip(answer, tool_call, prompts, strict=True):\n"
        "        total = call['arguments']['a'] + call['arguments']['b']\n"
        "        assert a == f'Sum: {total}'\n"
        "        assert prompt[-1]['content'].startswith(f\"Add {call['arguments']['a']} and\")\n"
        "    kwargs['log_metric']('seen', len(completions))\n"
        "    return [0.0] * len(completions)\n",
    )
    ran = launch.small_run(tmp_path / "run", reward_fn=reward, max_steps=1)
    assert ran.status == 0
    assert ran.jsonl("metrics.jsonl")[0]["seen"] == 8


def test_mapped_columns_and_the_tools_of_a_row_reach_rollout_and_rewards(tmp_path):
    """With the check of purity on, which finds nothing."""
    renamed = {"prompt": "question", "answer": "expected", "tool_call": "gold", "tools": "allowed"}
    rows = [row | {"tools": ["add"]} for row in launch.rows(10, 24)]
    data = [{theirs: row[ours] for ours, theirs in renamed.items()} for row in rows]
    reward = launch.write(
        tmp_path / "columns.py",
        "def reward_func(completions, answer, tool_call, tools, **kwargs):\n"
        "    for a, call, names in zip(answer, tool_call, tools, strict=True):\n"
        "        assert (a[:4], call['name'], names) == ('Sum:', 'add', ['add'])\n"
        "    return [0.0] * len(completions)\n",
    )
    with mock.patch.object(trainer, "roll_out", wraps=trainer.roll_out) as rollout:
        ran = launch.small_run(
            tmp_path / "run",
            dataset_id_or_path=launch.write_rows(tmp_path / "train.jsonl", data),
            dataset_columns=renamed,
            reward_fn=reward,
            system_prompt="Use the tools. " * 10,  # as long as a schema, for shapes that are compiled already
            max_steps=1,
            verify_purity=True,
        )
    assert ran.status == 0, ran.err
    assert ran.jsonl("metrics.jsonl")[0]["tools/impure"] == 0
    schemas = load_tools(module="tools_funcs.math_tools").schemas
    assert [prompt.schemas for prompt in rollout.call_args.args[2]] == [schemas[:1]] * 2


def test_rule_6_one_compile_per_shape():
    """Four updates compile the functions of the first; a second shape would be announced again."""
    out = launch.whole().out
    assert out.count("Compiling update …") == 1
    assert out.count("Compiling decode …") == 2  # with drafts, which random weights do not keep, and without
    assert out.count("Compiling prefill …") == 2  # the preamble and the prompts


def test_rule_6_twenty_updates_compile_in_the_first(tmp_path, caplog):
    """One shape, as in the quickstart; debug level lists it."""
    compiled = []
    with mock.patch.object(trainer, "print_update", lambda *_: compiled.append(launch.compiles())):
        ran = launch.small_run(tmp_path / "run", "--log_level", "debug", max_steps=20, save_steps=20)
    assert ran.status == 0, ran.err
    assert compiled == [compiled[0]] * 20
    assert "tool responses [B, one of [32, 64, 128]]" in caplog.text
    assert "(T2, J) one of [(80, 80)]" in caplog.text
    assert "First prompt of " in caplog.text and "<|im_start|>user\n" in caplog.text
    assert re.search(r"Completion, \w+:\n", caplog.text)


def test_several_updates_a_batch_with_reference_and_evaluations(tmp_path):
    ran = launch.small_run(
        tmp_path / "run",
        num_iterations=2,
        beta=0.1,
        save_steps=3,
        eval_steps=2,
        eval_dataset_id_or_path=launch.evaluation_rows(),
    )
    assert ran.status == 0, ran.err
    first, last = ran.jsonl("metrics.jsonl")
    assert (first["step"], last["step"]) == (2, 4)
    assert first["kl"] > 0
    assert first["eval/n"] == 6
    assert "eval/n" not in last  # the evaluation after training is in summary.json
    assert ran.json("summary.json")["after"]["n"] == 6
    # the second batch steps over update 3, and is the last
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["4"]


# Dynamic sampling


def of_odd_numbers(folder: Path) -> Path:
    """A reward by which only the groups of odd first numbers differ in themselves."""
    value = "[sum(ids) % 11 / 10 if int(a[5:]) % 4 == 3 else 0.5 for ids, a in zip(completion_ids, kwargs['answer'])]"
    return launch.write(folder / "odd.py", launch.SPREAD.format(value=value))


def dynamic_run(folder: Path, **changes) -> launch.Ran:
    given = {"dynamic_sampling": True, "reward_fn": of_odd_numbers(folder.parent / "rewards")} | changes
    ran = launch.small_run(folder, **given)
    assert ran.status == 0, ran.err
    return ran


def test_groups_of_equal_rewards_are_replaced_by_the_next_and_a_resume_draws_the_same(tmp_path):
    compiled = []
    with mock.patch.object(trainer, "print_update", lambda *_: compiled.append(launch.compiles())):
        ran = dynamic_run(tmp_path / "whole")
    assert compiled == [compiled[0]] * launch.UPDATES  # further rounds run the programs of the first
    order = [10 + int(i) for i in epoch_order(42, 0, 24)]
    wanted = [f"Add {i} and {i + 5}." for i in order if i % 2]
    lines = ran.jsonl("metrics.jsonl")
    assert lines[0]["rollout/rounds"] == 1  # so that what is compiled later would be seen
    assert max(line["rollout/rounds"] for line in lines) > 1
    for step, line in enumerate(lines, 1):
        rows = ran.jsonl(f"rollouts/step_{step:06d}.jsonl")
        learned = list(dict.fromkeys(row["prompt"] for row in rows if row["advantage"]))
        assert learned == wanted[2 * step - 2 : 2 * step]
        rounds = line["rollout/rounds"]
        assert len(rows) == 8 * rounds
        assert line["rollout/wasted_groups"] == pytest.approx(1 - 1 / rounds)
        assert line["reward"] == pytest.approx(np.mean([row["rewards"]["odd"] for row in rows]))
    dynamic_run(tmp_path / "run", max_steps=2)
    again = dynamic_run(tmp_path / "run")
    assert "Continuing from the checkpoint of update 2" in again.out
    assert again.weights() == ran.weights()
    assert timeless(again.jsonl("metrics.jsonl")) == timeless(lines)


# Interrupted


def interrupting_reward(folder: Path, name: str) -> Path:
    """The reward of the small run, which once, after update 2, sends a signal to its own process."""
    return launch.reward_that(folder, "step == 2", f"os.kill(os.getpid(), signal.{name})")


def assert_equals_the_whole_run(ran: launch.Ran) -> None:
    whole = launch.whole()
    assert ran.status == 0, ran.err
    assert ran.weights() == whole.weights()
    lines = ran.jsonl("metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert timeless(lines) == timeless(whole.jsonl("metrics.jsonl"))
    for step in range(1, launch.UPDATES + 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert ran.jsonl(name) == whole.jsonl(name)


def test_rule_7_resume_is_exact_after_sigkill(tmp_path):
    """Killed between updates 2 and 3, with the checkpoint of update 2 perhaps half written."""
    reward = interrupting_reward(tmp_path / "rewards", "SIGKILL")
    killed = launch.finish(
        launch.start("train", launch.options(tmp_path / "run", reward_fn=reward)), tmp_path / "run"
    )
    assert killed.status == -signal.SIGKILL
    assert [line["step"] for line in killed.jsonl("metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "run/model").exists()
    again = launch.small_run(tmp_path / "run", reward_fn=reward)
    assert "Continuing from the checkpoint of update" in again.out
    assert_equals_the_whole_run(again)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_rule_7_resume_is_exact_after_a_clean_stop(tmp_path, name):
    """The update that was asked to stop is ended and saved."""
    reward = interrupting_reward(tmp_path / "rewards", name)
    stopped = launch.small_run(tmp_path / "run", reward_fn=reward, save_steps=100)
    assert stopped.status == 130
    assert "Stopped after update 3, which is saved. The same command continues." in stopped.out
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
    again = launch.small_run(tmp_path / "run", reward_fn=reward, save_steps=100)
    assert "Continuing from the checkpoint of update 3" in again.out
    assert_equals_the_whole_run(again)


def users_run(folder: Path) -> subprocess.Popen:
    """Start 12 updates from the smoke run's cold start, with XLA's own optimisation and tool workers."""
    options = {
        "config": "configs/smoke.yaml",
        "cold_start": "false",
        "model_name_or_path": launch.smoke().folder / "cold_start",
        "reward_fn": launch.spread_reward(),
        "max_steps": 12,
        "log_completions": "false",
        "output_dir": folder,
        "compilation_cache_dir": launch.FOLDER / "optimised",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    return launch.start("train", flags, OPTIMISED)


@pytest.mark.slow
def test_rule_7_resume_is_exact_as_a_user_meets_it(tmp_path):
    """Three signals from outside stop one run, each two updates or more after the last, and each to the whole
    group as a terminal's Ctrl-C; it ends as one that was left alone."""
    whole = launch.finish(users_run(tmp_path / "whole"), tmp_path / "whole")
    assert whole.status == 0, whole.err
    assert whole.weights() != launch.smoke().weights("cold_start")
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    lines = lambda: metrics.read_text().count("\n") if metrics.exists() else 0  # noqa: E731
    for name, status in ("SIGKILL", -signal.SIGKILL), ("SIGTERM", 130), ("SIGINT", 130):
        process, before = users_run(folder), lines()
        while process.poll() is None and lines() < before + 2:
            time.sleep(0.02)
        os.killpg(process.pid, getattr(signal, name))
        stopped = launch.finish(process, folder)
        assert stopped.status == status, stopped.err
        assert before + 2 <= lines() < 12
    again = launch.finish(users_run(folder), folder)
    assert again.status == 0, again.err
    assert again.weights() == whole.weights()
    assert timeless(again.jsonl("metrics.jsonl")) == timeless(whole.jsonl("metrics.jsonl"))
    assert again.json("summary.json")["after"] == whole.json("summary.json")["after"]


@pytest.mark.slow
def test_the_smoke_run_is_short(tmp_path):
    """Under 40 s on two idle cores from an empty compile cache; four times that on a busy machine.

    A second start reads its programs from the cache: it spends under 10 s on them.
    """
    runs = [launch.smoke_run(tmp_path / name, OPTIMISED, tmp_path / "cache") for name in ("run", "again")]
    for ran in runs:
        assert ran.status == 0, ran.err
        print(json.dumps({"seconds": ran.seconds, **ran.json("summary.json")["timings"]}))
    assert runs[0].seconds < 160
    assert runs[1].json("summary.json")["timings"]["compile"] < 10


# How the steps follow from options and data


def steps_of(rows: int, **options) -> Steps:
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4}
    return job.steps_of(GRPOConfig(**(sizes | options)), rows, row_devices=1)


def test_steps_count_full_batches():
    assert steps_of(11, num_train_epochs=1.5) == Steps(
        P=2, G=4, batches_per_epoch=5, batches=8, updates_per_batch=1
    )
    assert steps_of(11, num_train_epochs=1, num_iterations=3).updates == 15


def test_max_steps_counts_updates():
    assert steps_of(11, max_steps=5).batches == 5
    assert steps_of(11, max_steps=5, num_iterations=2).updates == 6  # the third batch is used twice as well


def test_accumulation_makes_the_batch_larger():
    assert steps_of(11, gradient_accumulation_steps=2).P == 4
