"""Options: sources and their order, errors that say where and what to do, TRL's names."""

import ast
import dataclasses
import importlib.metadata
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import split_state_dict_into_shards_factory

from grpo_jax import GRPOConfig
from grpo_jax.run.config import parse_config, print_config, write_resolved
from grpo_jax.run.fields import OPTIONS
from grpo_jax.run.rules import check_no_evaluation_is_due
from grpo_jax.run.trl_options import ALIASES, EQUAL, HANDLED, INSTEAD, REFUSED, SETS, SUPPORTED

ROOT = Path(__file__).parent.parent

# As the YAML generator of the original writes it.
ORIGINAL = """\
model_name_or_path: Qwen/Qwen3-1.7B
model_revision: main
dtype: bfloat16
attn_implementation: kernels-community/flash-attn2
trust_remote_code: true
output_dir: /opt/ml/checkpoints/Qwen/Qwen3-1.7B/grpo-rlvr/

dataset_id_or_path: /opt/ml/input/data/training/grpo_financial_train.jsonl

# Generation settings
num_generations: 8
max_grpo_completion_length: 1024
mask_truncated_completions: true
learning_rate: 5.0e-6
lr_scheduler_type: "constant"
warmup_steps: 0
num_train_epochs: 15
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
gradient_checkpointing: true
save_strategy: "steps"
save_steps: 25
save_total_limit: 3
logging_steps: 1
report_to:
  - "mlflow"
seed: 42
"""


def parse(*argv, text=None, tmp_path=None):
    """The resolved config of these flags and, where given, of a YAML file of this text."""
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
        argv = ["--config", f"{tmp_path}/c.yaml", *argv]
    return parse_config(argv, prog="test")


def message(*argv, text=None, tmp_path=None):
    with pytest.raises(ValueError) as error:
        parse(*argv, text=text, tmp_path=tmp_path)
    return str(error.value).replace(f"{tmp_path}/", "")


# --- sources ---


def test_flag_beats_yaml_beats_default_and_each_origin_is_known(tmp_path):
    resolved = parse("--seed", "7", text="seed: 1\nbeta: 0.5\n", tmp_path=tmp_path)
    assert (resolved.config.seed, resolved.config.beta, resolved.config.epsilon) == (7, 0.5, 0.2)
    assert resolved.origin["seed"] == "--seed"
    assert resolved.origin["beta"] == f"{tmp_path}/c.yaml:2"
    assert resolved.origin["epsilon"] == "default"
    assert resolved.path == f"{tmp_path}/c.yaml"


DEFAULT = str(ROOT / "configs/default.yaml")


def test_config_flag_replaces_the_default_file(tmp_path):
    (tmp_path / "d.yaml").write_text("seed: 3")
    resolved = parse_config(["--config", f"{tmp_path}/d.yaml"], prog="test", default_config=DEFAULT)
    assert (resolved.config.seed, resolved.config.gradient_accumulation_steps) == (3, 1)


@pytest.mark.parametrize(
    "flags",
    [
        ["--tools_script", "t.py"],
        ["--tool-functions-module=m"],
        ["--reward_fn", "a.py", "b.py"],
        ["--reward_function_name", "accuracy"],
        ["--reward_funcs", "accuracy"],
        ["--dataset_name", "owner/name"],
    ],
)
def test_flags_for_own_tools_rewards_or_data_start_from_the_defaults(flags):
    resolved = parse_config([*flags, "--seed", "7"], prog="test", default_config=DEFAULT)
    assert resolved.path is None
    assert resolved.config.gradient_accumulation_steps == 1
    assert resolved.config.batch_size(1) == 8
    assert resolved.sources() == "Options: 2 flags, defaults otherwise"
    named = parse_config(["--config", DEFAULT, *flags], prog="test", default_config=DEFAULT)
    assert named.config.gradient_accumulation_steps == 8


def test_other_flags_change_the_default_job():
    resolved = parse_config(["--model_name_or_path", "m"], prog="test", default_config=DEFAULT)
    assert (resolved.config.model_name_or_path, resolved.config.gradient_accumulation_steps) == ("m", 8)
    assert resolved.sources() == f"Options: {DEFAULT}, 1 flag, defaults otherwise"
    assert parse_config([], prog="test").sources() == "Options: all defaults"


def test_the_readme_command_is_a_batch_of_two_prompts():
    text = (ROOT / "README.md").read_text()
    start = text.index("python -m grpo_jax.train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct")
    words = text[start : text.index("```", start)].replace("\\\n", " ").split()[3:]
    config = parse_config(words, prog="test", default_config=DEFAULT).config
    assert config.batch_size(1) == 2 * config.num_generations == 16


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--learning_rate=5e-7"], "learning_rate", 5e-7),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--log_completions"], "log_completions", True),
        (["--tool_cache", "false"], "tool_cache", False),
        (["--reward_fn", "a.py", "b.py"], "reward_fn", ["a.py", "b.py"]),
        (["--reward_fn", "a.py"], "reward_fn", ["a.py"]),
        (
            ["--chat_template_kwargs", '{"enable_thinking": false}'],
            "chat_template_kwargs",
            {"enable_thinking": False},
        ),
        (["--max_completion_length", "64"], "max_grpo_completion_length", 64),
        (["--min_p", "none"], "min_p", None),
        (["--eval_dataset_id_or_path", "none"], "eval_dataset_id_or_path", None),
        (["--tokenizer_name_or_path", "None"], "tokenizer_name_or_path", None),
        (["--reward_fn", "none"], "reward_fn", None),
        (["--resume_from_checkpoint", "none"], "resume_from_checkpoint", "none"),
        (["--compilation_cache_dir", "none"], "compilation_cache_dir", "none"),
    ],
)
def test_flags_read_every_kind_of_value(argv, name, value):
    assert getattr(parse(*argv).config, name) == value


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 5e-7", "learning_rate", 5e-7),  # PyYAML reads this one as text
        ("scale_rewards: true", "scale_rewards", "group"),
        ("scale_rewards: false", "scale_rewards", "none"),
        ("save_strategy: no", "save_strategy", "no"),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("reward_fn: a.py", "reward_fn", ["a.py"]),
        (
            "chat_template_kwargs: {enable_thinking: false}",
            "chat_template_kwargs",
            {"enable_thinking": False},
        ),
        ("delta: null", "delta", None),
        ("eval_dataset_id_or_path: none", "eval_dataset_id_or_path", None),
        ("report_to: [tensorboard]", "report_to", "tensorboard"),
        ("top_k: -1", "top_k", 0),
        ("top_k: null", "top_k", 0),
        ("chat_template_kwargs: null", "chat_template_kwargs", {}),
        ("shuffle_dataset: false", "shuffle_dataset", False),
        ("reward_funcs: accuracy", "reward_function_name", ["accuracy"]),
        ("lr_scheduler_kwargs: {}", "lr_scheduler_type", "linear"),
        ("lr_scheduler_kwargs: null", "lr_scheduler_kwargs", {}),
        (
            "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 1e-7, power: null}",
            "lr_scheduler_kwargs",
            {"lr_end": 1e-7},
        ),
        ("optim: adamw_torch_fused", "optim", "adamw"),
        ("soft_punish_cache: 64", "soft_overlong_cache", 64),
        ("optim: paged_lion_32bit", "optim", "lion"),
        ("model_revision: null", "model_revision", "main"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", None),
        ("resume_from_checkpoint: false", "resume_from_checkpoint", "none"),
        ("use_bias_correction_kl: false", "use_bias_correction_kl", False),
        ("save_steps: 0.1", "save_steps", 0.1),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("lora_target_modules: all-linear", "lora_target_modules", ["all-linear"]),
        ("", "seed", 42),
    ],
)
def test_yaml_reads_every_kind_of_value(text, name, value, tmp_path):
    assert getattr(parse(text=text, tmp_path=tmp_path).config, name) == value


def test_a_reward_named_by_flag_beats_a_reward_file_of_the_yaml(tmp_path):
    text = "reward_fn: r.py\ntools_script: t.py\n"
    config = parse("--reward_function_name", "accuracy", text=text, tmp_path=tmp_path).config
    assert (config.reward_fn, config.reward_function_name) == (None, ["accuracy"])
    assert config.tools_script == "t.py"
    config = parse("--tool_functions_module", "m", text=text, tmp_path=tmp_path).config
    assert (config.reward_fn, config.tools_script, config.tool_functions_module) == (["r.py"], None, "m")


def test_within_one_source_both_stay_and_the_file_wins_later(tmp_path):
    config = parse(text="reward_fn: r.py\nreward_function_name: accuracy\n", tmp_path=tmp_path).config
    assert (config.reward_fn, config.reward_function_name) == (["r.py"], ["accuracy"])


# --- errors ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "seed: 1\nnum_generation: 4",
            "c.yaml:2: unknown option 'num_generation'; nearest: num_generations (its value: 4)",
        ),
        ("seed: 1\n\nsave_steps: often", "c.yaml:3: save_steps must be a number, got 'often'"),
        (
            "save_steps: 2.5",
            "c.yaml:1: save_steps must be a whole number of updates, or a fraction of all updates between 0 and 1, got 2.5",
        ),
        ("eval_batch_size: true", "c.yaml:1: eval_batch_size must be a whole number, got True"),
        ("eval_batch_size: 2.5", "c.yaml:1: eval_batch_size must be a whole number, got 2.5"),
        ("beta: .nan", "c.yaml:1: beta must be a number, got nan"),
        ("max_steps: .inf", "c.yaml:1: max_steps must be a whole number, got inf"),
        ("model_revision: 12", "c.yaml:1: model_revision must be text, got 12"),
        ("tool_cache: 1", "c.yaml:1: tool_cache must be true or false, got 1"),
        ("chat_template_kwargs: [1]", "c.yaml:1: chat_template_kwargs must be a JSON object, got [1]"),
        (
            "dataset_columns: {prompt: 3}",
            'c.yaml:1: dataset_columns must be column names, as {"prompt": "question"}, got {\'prompt\': 3}',
        ),
        ("reward_fn: []", "c.yaml:1: reward_fn must be one or more values (text), got []"),
        ("seed: 1\nseed: 2", "c.yaml:2: seed is given twice, first at c.yaml:1; keep one"),
        (
            "max_completion_length: 1\nmax_grpo_completion_length: 2",
            "c.yaml:2: max_grpo_completion_length is given twice, first at c.yaml:1; keep one",
        ),
        ("- seed", "c.yaml:1: a config file must hold `option: value` lines"),
        ("seed: 1\nbeta: [", "c.yaml:3: not YAML: expected the node content, but found '<stream end>'"),
        (
            "report_to: tensorbord",
            "c.yaml:1: report_to must be one of none, tensorboard, wandb, mlflow, got 'tensorbord'; nearest: tensorboard",
        ),
        (
            "use_peft: true\nlora_target_modules: [q_proj, k_prj]",
            "c.yaml:2: lora_target_modules must be one of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            "down_proj, all-linear, got 'k_prj'; nearest: k_proj",
        ),
        ("lora_r: 0", "c.yaml:1: lora_r must be >= 1, got 0"),
        (
            "beta: 0\nload_in_4bit: true",
            "c.yaml:2: load_in_4bit True is not supported: weights are not quantised; use dtype bfloat16",
        ),
    ],
)
def test_yaml_errors_name_file_line_and_fix(text, expected, tmp_path):
    assert message(text=text + "\n", tmp_path=tmp_path) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--num_generation", "4"],
            "--num_generation: unknown option 'num_generation'; nearest: num_generations (its value: 4)",
        ),
        (["--zzz=4"], "--zzz: unknown option 'zzz'; --help lists every option (its value: 4)"),
        (
            ["--load_in_4bt"],
            "--load_in_4bt: unknown option 'load_in_4bt'; nearest: load_in_4bit (its value: True)",
        ),
        (["--seed=1", "2"], "'2' belongs to no option; write --option value"),
        (["--config"], "--config needs a value"),
        (["seed"], "'seed' belongs to no option; write --option value"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "x"], "--seed: seed must be a whole number, got 'x'"),
        (
            ["--chat_template_kwargs", "{"],
            "--chat_template_kwargs: chat_template_kwargs must be a JSON object, got '{'",
        ),
        (
            ["--generation_kwargs", "{"],
            "--generation_kwargs: generation_kwargs '{' is not supported: use temperature, top_p, top_k and min_p",
        ),
        (
            ["--repetition_penalty", "1.1"],
            "--repetition_penalty: repetition_penalty 1.1 is not supported: "
            "it would change the sampler's log-probabilities and not the trainer's; use temperature or min_p",
        ),
    ],
)
def test_flag_errors_name_flag_and_fix(argv, expected):
    assert message(*argv) == expected


def test_missing_config_file_is_named():
    assert "no/such.yaml" in message("--config", "no/such.yaml")


@pytest.mark.parametrize(
    ("name", "bad", "rule"),
    [
        ("num_generations", 1, "must be >= 2 to rank completions, got 1"),
        ("temperature", 0, "must be > 0, got 0"),
        ("top_p", 0, "must be > 0 and <= 1, got 0"),
        ("top_p", 1.5, "must be > 0 and <= 1, got 1.5"),
        ("min_p", -0.1, "must be >= 0 and <= 1, got -0.1"),
        ("adam_beta2", 1, "must be >= 0 and < 1, got 1"),
        ("max_steps", 0, "must be -1 or >= 1, got 0"),
        ("mesh_data", 0, "must be -1 or >= 1, got 0"),
        ("warmup_steps", 2.5, "must be >= 0, and whole from 1 on, got 2.5"),
        ("delta", 1, "must be > 1 (an unchanged policy has the ratio 1), got 1"),
        ("beta", -1, "must be >= 0, got -1"),
        ("tool_timeout", 0, "must be > 0, got 0"),
        ("seed", -1, "must be in [0, 2**32 - 1], got -1"),
        (
            "loss_type",
            "dr-grpo",
            "must be one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo, got 'dr-grpo'; nearest: dr_grpo",
        ),
        ("sampler_correction_max", 0.5, "must be >= 1, got 0.5"),
        ("sampler_correction_min", 1.5, "must be >= 0 and <= 1, got 1.5"),
        ("off_policy_mask_threshold", 0, "must be > 0, got 0"),
        ("vespo_lambda_neg", 0, "must be >= 0.0001, got 0"),
        (
            "lr_scheduler_type",
            "cosine_with_min",
            "must be one of constant, constant_with_warmup, linear, cosine, cosine_with_restarts, "
            "cosine_with_min_lr, polynomial, inverse_sqrt, warmup_stable_decay, got 'cosine_with_min'; "
            "nearest: cosine_with_min_lr",
        ),
        (
            "optim",
            "adamw_8bit",
            "must be one of adamw, adafactor, lion, muon, sgd (moments are kept in optim_dtype, float32 "
            "or bfloat16), got 'adamw_8bit'; nearest: adamw",
        ),
        ("dtype", "float16", "must be one of auto, float32, bfloat16, got 'float16'"),
        ("param_dtype", "auto", "must be one of float32, bfloat16, got 'auto'"),
        ("dynamic_sampling_max_rounds", 1, "must be >= 2 to replace any group, got 1"),
        ("optim_dtype", "float16", "must be one of float32, bfloat16, got 'float16'"),
        (
            "max_shard_size",
            "5",
            "must be a number above 0 and its unit KB, MB, GB or TB, as 5GB or 500MB, got",
        ),
        ("max_shard_size", "0.0GB", "must be a number above 0 and its unit"),
        ("max_shard_size", "5 gigabytes", "must be a number above 0 and its unit"),
        ("max_shard_size", "-1GB", "must be a number above 0 and its unit"),
    ],
)
def test_values_out_of_range_name_the_rule(name, bad, rule):
    with pytest.raises(ValueError) as error:
        GRPOConfig(**{name: bad})
    assert str(error.value).startswith(f"{name} {rule}")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"loss_type": "sapo", "epsilon_high": 0.3}, "epsilon_high 0.3 has no effect with loss_type sapo"),
        ({"loss_type": "cispo", "epsilon": 0.1}, "epsilon 0.1 has no effect with loss_type cispo"),
        ({"loss_type": "vespo", "delta": 1.5}, "delta 1.5 has no effect with loss_type vespo"),
        ({"sapo_temperature_pos": 2}, "sapo_temperature_pos 2.0 has no effect with loss_type dapo: it needs"),
        (
            {"loss_type": "sapo", "vespo_k_neg": 1},
            "vespo_k_neg 1.0 has no effect with loss_type sapo: it needs",
        ),
        ({"loss_type": "luspo"}, "set importance_sampling_level to sequence"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "leave it out"),
        (
            {"sampler_correction": "token_truncate", "sampler_correction_max": None},
            "_min or _max to truncate at",
        ),
        (
            {"sampler_correction_max": 2},
            "sampler_correction_max 2.0 has no effect without sampler_correction",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "batch"},
            "scale_rewards batch has no effect with multi_objective_aggregation normalize_then_sum",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "advantage_estimator": "loo"},
            "advantage_estimator loo has no effect with multi_objective_aggregation normalize_then_sum",
        ),
        ({"advantage_estimator": "none"}, "set scale_rewards to none"),
        (
            {"soft_overlong_cache": 513},
            "soft_overlong_cache 513 must be at most max_grpo_completion_length 512",
        ),
        (
            {"soft_overlong_penalty": 0.5},
            "soft_overlong_penalty 0.5 has no effect without soft_overlong_cache",
        ),
        ({"max_turn_length": 600}, "max_turn_length 600 has no effect above max_grpo_completion_length 512"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "lr_scheduler_type linear takes no arguments, got 'power'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate in lr_scheduler_kwargs"),
        (
            {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
            "lr_end must be below learning_rate 1e-08",
        ),
        ({"optim": "sgd", "optim_dtype": "bfloat16"}, "optim_dtype bfloat16 has no effect with optim sgd"),
        (
            {"optim": "muon", "use_peft": True},
            "optim muon is for the matrices of whole weights; with use_peft",
        ),
        ({"optim": "muon", "optim_dtype": "bfloat16"}, "optim muon, whose moments are float32; leave it out"),
    ],
)
def test_options_that_the_others_leave_without_effect_are_refused(options, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        GRPOConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "cispo", "epsilon_high": 5},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "delta": 2},
        {"loss_type": "vespo", "importance_sampling_level": "sequence", "beta": 0.1},
        {"sampler_correction": "token_mask", "sampler_correction_max": None},
        {
            "sampler_correction": "sequence_truncate",
            "sampler_correction_min": 0.5,
            "sampler_correction_max": None,
        },
        {"advantage_estimator": "none", "scale_rewards": "none"},
        {"advantage_estimator": "loo", "scale_rewards": "batch"},
        {"use_bias_correction_kl": False},
    ],
)
def test_options_of_the_loss_that_act_together_are_taken(options):
    config = GRPOConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("size", ["500MB", "1.5gb", "20 KB", "1TB"])
def test_a_size_of_weight_files_is_one_that_the_hub_library_reads(size):
    limit = GRPOConfig(max_shard_size=size).max_shard_size
    plan = split_state_dict_into_shards_factory(
        {"a": 9000, "b": 9000},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    assert not plan.is_sharded


def test_reward_weights_are_one_per_function():
    assert GRPOConfig(reward_weights=[2]).reward_weights == [2.0]
    with pytest.raises(ValueError, match=r"1 functions \(accuracy\), got \[1.0, 2.0\]"):
        parse_config(["--reward_weights", "1", "2"], prog="train")
    with pytest.raises(ValueError, match=r"1 functions \(math_reward\), got \[1.0, 2.0\]"):
        GRPOConfig(reward_function_name=["math_reward"], reward_weights=[1, 2])
    with pytest.raises(ValueError, match="normalize_then_sum needs several reward functions, got accuracy"):
        parse_config(["--multi_objective_aggregation", "normalize_then_sum"], prog="train")


def test_weights_and_aggregation_wait_for_the_rewards_that_python_gives():
    """Only GRPOTrainer knows them; see test_trainer."""
    config = GRPOConfig(reward_weights=[1, 2], multi_objective_aggregation="normalize_then_sum")
    assert config.reward_weights == [1.0, 2.0]


def test_all_that_is_wrong_is_reported_in_one_start_in_the_order_of_the_file(tmp_path, caplog):
    text = """\
num_generation: 4
lerning_rate: 1.0e-5
load_in_4bit: true
repetition_penalty: 1.1
save_steps: often
loss_type: gpo
temperature: 0
reward_weights: [1, 2]
use_vllm: true
bf16: maybe
steps_per_generation: 3
"""
    assert message("--seed", "--beta=x", "--zzz", "3", "--zzz2", text=text, tmp_path=tmp_path).split(
        "\n  "
    ) == [
        "14 options are wrong:",
        "--seed needs a value",
        "c.yaml:1: unknown option 'num_generation'; nearest: num_generations (its value: 4)",
        "c.yaml:2: unknown option 'lerning_rate'; nearest: learning_rate (its value: 1e-05)",
        "c.yaml:3: load_in_4bit True is not supported: weights are not quantised; use dtype bfloat16",
        "c.yaml:4: repetition_penalty 1.1 is not supported: it would change the sampler's log-probabilities and not the trainer's; use temperature or min_p",
        "c.yaml:5: save_steps must be a number, got 'often'",
        "c.yaml:6: loss_type must be one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo, got 'gpo'; nearest: grpo",
        "c.yaml:7: temperature must be > 0, got 0",
        "c.yaml:8: reward_weights needs one weight per reward function: 1 functions (accuracy), got [1.0, 2.0]",
        "c.yaml:10: bf16 must be true or false, got 'maybe'",
        "c.yaml:11: steps_per_generation must equal gradient_accumulation_steps 1, got 3: every update samples "
        "its own batch; num_iterations makes more updates of one batch",
        "--beta: beta must be a number, got 'x'",
        "--zzz: unknown option 'zzz'; --help lists every option (its value: 3)",
        "--zzz2: unknown option 'zzz2'; --help lists every option (its value: True)",
    ]
    assert "c.yaml:9: use_vllm has no effect here: the sampler is built in" in caplog.text


# --- called from Python ---


def test_python_values_are_checked_as_those_of_a_file():
    config = GRPOConfig(
        learning_rate=np.float32(0.5),
        num_generations=np.int64(4),
        output_dir=Path("runs") / "x",
        reward_fn=Path("r.py"),
        reward_weights=(1,),
        report_to=[],
        min_p=None,
    )
    assert (config.learning_rate, config.num_generations, config.output_dir) == (0.5, 4, "runs/x")
    assert (config.reward_fn, config.reward_weights, config.report_to) == (["r.py"], [1.0], "none")
    assert (config.model_name_or_path, config.dataset_id_or_path) == (None, None)  # the trainer's arguments
    with pytest.raises(
        ValueError, match=r"^2 options are wrong:\n  top_p must be .*\n  seed must be a whole num"
    ):
        GRPOConfig(top_p=2, seed="x")


def test_trl_keywords_are_handled_as_names_of_a_file(caplog):
    assert GRPOConfig(max_completion_length=64).max_grpo_completion_length == 64
    assert caplog.text == ""
    assert GRPOConfig(vllm_mode="colocate") == GRPOConfig()
    (record,) = caplog.records
    assert record.getMessage() == (
        "vllm_mode has no effect here: the sampler is built in and shares the trainer's code and weights"
    )
    with pytest.raises(
        ValueError, match=r"^load_in_4bit True is not supported: weights are not quantised; use"
    ):
        GRPOConfig(load_in_4bit=True)


def test_an_unknown_keyword_is_a_type_error_that_names_the_nearest():
    with pytest.raises(
        TypeError, match=r"^unknown option 'num_generation'; nearest: num_generations \(its value: 4\)$"
    ):
        GRPOConfig(num_generation=4)


def test_a_config_is_frozen_and_a_copy_is_checked_and_says_nothing_again(caplog):
    config = GRPOConfig(lora_r=8)
    assert [r.getMessage() for r in caplog.records] == ["lora_r has no effect without use_peft"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    assert dataclasses.replace(config, seed=3).seed == 3
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match=r"^seed must be in"):
        dataclasses.replace(config, seed=-1)
    assert pickle.loads(pickle.dumps(config)) == config


# --- TRL's names that set or must equal an option ---


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("bf16: true", "bfloat16"),
        ("bf16: false\nfp16: false", "float32"),
        ("fp16: false", "auto"),
        ("bf16: null", "auto"),
        ("bf16: true\ndtype: auto", "bfloat16"),
        ("bf16: true\ntorch_dtype: bfloat16", "bfloat16"),
        ("dtype: bfloat16\nbf16: false", "bfloat16"),  # weights in bfloat16, no autocast
    ],
)
def test_bf16_and_fp16_set_the_data_type(text, dtype, tmp_path):
    assert parse(text=text, tmp_path=tmp_path).config.dtype == dtype


def test_bf16_as_a_flag_wins_over_the_file_and_contradicts_next_to_another_dtype(tmp_path):
    assert parse("--bf16", "false", text="dtype: bfloat16", tmp_path=tmp_path).config.dtype == "float32"
    assert message(text="bf16: true\ndtype: float32", tmp_path=tmp_path) == (
        "c.yaml:1: bf16 True contradicts dtype float32, first at c.yaml:2; keep one"
    )
    assert "float16 needs loss scaling" in message(text="fp16: true", tmp_path=tmp_path)


def test_steps_per_generation_may_be_the_accumulation_of_any_source(tmp_path):
    text = "steps_per_generation: 8\n"
    config = parse("--gradient_accumulation_steps", "8", text=text, tmp_path=tmp_path).config
    assert config == GRPOConfig(gradient_accumulation_steps=8)
    assert "steps_per_generation must equal gradient_accumulation_steps 1, got 8" in message(
        text=text, tmp_path=tmp_path
    )


def test_generation_batch_size_must_be_the_completions_of_an_update():
    config = GRPOConfig(generation_batch_size=64, gradient_accumulation_steps=2)
    assert config.batch_size(devices=4) == 64
    with pytest.raises(
        ValueError, match=r"must equal the completions per update, 16 = .* × 1 device × .* 2, got 64"
    ):
        config.batch_size(devices=1)


@pytest.mark.parametrize(
    ("options", "event", "updates"),
    [
        ({"save_steps": 0.1}, "save", 3),
        ({"save_steps": 0.5, "logging_steps": 0.34}, "logging", 11),
        ({"save_steps": 25}, "save", 25),
        ({"save_strategy": "epoch"}, "save", 12),
        ({"save_strategy": "no"}, "save", None),
        ({}, "logging", 10),
        ({}, "eval", None),
        ({"eval_steps": 0.25}, "eval", 8),
        ({"eval_strategy": "steps"}, "eval", 10),
        ({"eval_strategy": "steps", "eval_steps": 4}, "eval", 4),
        ({"eval_strategy": "epoch"}, "eval", 12),
        ({"eval_strategy": "no", "eval_steps": 4}, "eval", None),
    ],
)
def test_intervals_are_updates_or_a_share_of_all_rounded_up(options, event, updates):
    assert GRPOConfig(**options).interval(event, total=30, per_epoch=12) == updates


def test_eval_steps_without_evaluation_data_are_named(caplog):
    check_no_evaluation_is_due(GRPOConfig(eval_strategy="no"))
    assert not caplog.text
    check_no_evaluation_is_due(GRPOConfig(eval_steps=4))
    assert "eval_steps has no effect without evaluation data; set eval_dataset_id_or_path" in caplog.text


def test_eval_steps_that_the_strategy_does_not_read_are_named(tmp_path, caplog):
    parse(text="eval_strategy: no\neval_steps: 4\n", tmp_path=tmp_path)
    assert "c.yaml:2: eval_steps has no effect with eval_strategy no" in caplog.text


# --- paths ---


def test_absolute_paths_do_not_move_with_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "model").mkdir()
    given = {
        "output_dir": "run",
        "tools_script": "~/t.py",
        "reward_fn": ["a.py", "/r/b.py", "grounded"],
        "dataset_id_or_path": "rows.jsonl[:5%]",
        "eval_dataset_id_or_path": "owner/name",
        "model_name_or_path": "model",
        "tokenizer_name_or_path": "Qwen/Qwen3-0.6B",
        "resume_from_checkpoint": "none",
        "compilation_cache_dir": "xla",
    }
    config = GRPOConfig(**given)
    absolute = config.with_absolute_paths()
    monkeypatch.chdir("/")
    assert {name: getattr(absolute, name) for name in given} == {
        "output_dir": f"{tmp_path}/run",
        "tools_script": "/home/me/t.py",
        "reward_fn": [f"{tmp_path}/a.py", "/r/b.py", "grounded"],
        "dataset_id_or_path": f"{tmp_path}/rows.jsonl[:5%]",
        "eval_dataset_id_or_path": "owner/name",
        "model_name_or_path": f"{tmp_path}/model",
        "tokenizer_name_or_path": "Qwen/Qwen3-0.6B",
        "resume_from_checkpoint": "none",
        "compilation_cache_dir": f"{tmp_path}/xla",
    }
    assert absolute.with_absolute_paths() == absolute
    assert absolute.as_given() == absolute.with_absolute_paths().as_given() == dataclasses.asdict(config)
    for name in ("scratch", "tfds:gsm8k"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    config = GRPOConfig(model_name_or_path="scratch", dataset_id_or_path="tfds:gsm8k").with_absolute_paths()
    assert (config.model_name_or_path, config.dataset_id_or_path) == ("scratch", "tfds:gsm8k")


def test_the_resolved_config_holds_paths_as_they_were_given(tmp_path):
    config = GRPOConfig(output_dir="runs/x", reward_fn=["r.py"]).with_absolute_paths()
    write_resolved(config, tmp_path / "resolved_config.yaml")
    written = yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())
    assert (written["output_dir"], written["reward_fn"]) == ("runs/x", ["r.py"])
    assert list(written) == list(OPTIONS)


# --- batch size, warm-up ---


def test_batch_size_is_per_device_times_devices_times_accumulation():
    config = GRPOConfig(per_device_train_batch_size=2, gradient_accumulation_steps=8)
    assert config.batch_size(devices=1) == 16
    assert config.batch_size(devices=4) == 64


@pytest.mark.parametrize(
    ("per_device", "steps", "devices", "nearest"),
    [
        (2, 3, 1, "gradient_accumulation_steps 4, or num_generations 3 or 6"),
        (2, 5, 1, "gradient_accumulation_steps 4 or 8, or num_generations 5 or 10"),
        (3, 1, 2, "gradient_accumulation_steps 4, or num_generations 3 or 6"),
        (1, 1, 1, "gradient_accumulation_steps 8"),
    ],
)
def test_indivisible_batch_names_the_nearest_valid_values(per_device, steps, devices, nearest):
    config = GRPOConfig(per_device_train_batch_size=per_device, gradient_accumulation_steps=steps)
    with pytest.raises(ValueError) as error:
        config.batch_size(devices)
    assert str(error.value).endswith(f"nearest valid: {nearest}")
    assert f"got {per_device * steps * devices} = " in str(error.value)


def test_warmup_counts_updates_or_is_a_share_rounded_up():
    assert GRPOConfig(warmup_steps=10).warmup_updates(total=40) == 10
    assert GRPOConfig(warmup_steps=0.1).warmup_updates(total=25) == 3
    assert GRPOConfig().warmup_updates(total=25) == 0
    assert GRPOConfig(warmup_ratio=0.1).warmup_updates(total=25) == 3
    assert GRPOConfig(warmup_ratio=1).warmup_updates(total=25) == 25
    assert GRPOConfig(warmup_ratio=0.1, warmup_steps=7).warmup_updates(total=25) == 7  # as in transformers


def test_warmup_of_a_constant_schedule_is_named(tmp_path, caplog):
    parse(text="lr_scheduler_type: constant\nwarmup_ratio: 0.1\n", tmp_path=tmp_path)
    assert "c.yaml:2: lr_scheduler_type constant has no warm-up, so warmup_ratio 0.1 has no" in caplog.text


def test_adapters_options_without_use_peft_are_named(tmp_path, caplog):
    parse("--lora_r", "8", text="lora_alpha: 32\nlora_dropout: 0\n", tmp_path=tmp_path)
    assert [r.getMessage().replace(f"{tmp_path}/", "") for r in caplog.records] == [
        "--lora_r: lora_r has no effect without use_peft",
        "c.yaml:2: lora_dropout has no effect without use_peft",
    ]
    caplog.clear()
    parse("--lora_r", "8", "--use_peft")
    assert caplog.text == ""
    parse("--sft_stop_reward", "0.3", "--sft_stop_match", "0.5")
    assert "sft_stop_match has no effect with sft_stop_reward" in caplog.text
    caplog.clear()
    parse("--dynamic_sampling_max_rounds", "8")
    assert "dynamic_sampling_max_rounds has no effect without dynamic_sampling" in caplog.text


def test_required_option_that_is_not_set_is_named():
    with pytest.raises(ValueError, match="model_name_or_path must be set: --model_name_or_path VALUE"):
        GRPOConfig().required("model_name_or_path")
    assert GRPOConfig(model_name_or_path="m").required("model_name_or_path") == "m"


# --- names of TRL and the original ---


def test_yaml_of_the_original_runs_as_it_is(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no tracker is installed
    config = parse(text=ORIGINAL, tmp_path=tmp_path).config
    assert config.batch_size(1) == 32
    assert (config.learning_rate, config.max_grpo_completion_length) == (5e-6, 1024)
    assert (config.save_total_limit, config.report_to, config.dtype) == (3, "none", "bfloat16")
    warned = [record.getMessage().replace(f"{tmp_path}/", "") for record in caplog.records]
    assert [one.split(" ")[:2] for one in warned] == [
        ["c.yaml:4:", "attn_implementation"],
        ["c.yaml:5:", "trust_remote_code"],
        ["c.yaml:25:", "report_to"],
    ]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_tracker_that_is_installed_is_taken(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert parse(text=ORIGINAL, tmp_path=tmp_path).config.report_to == "mlflow"
    assert not any("report_to" in record.getMessage() for record in caplog.records)


def test_a_tracker_whose_package_is_missing_is_named_with_its_extra(caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert parse("--report_to", "wandb").config.report_to == "none"
    (record,) = caplog.records
    assert record.getMessage() == (
        "--report_to: report_to wandb has no effect, since its package is not installed; metrics.jsonl holds "
        'every update; to report, pip install -e ".[wandb]"'
    )


def test_original_launcher_flags_are_named_in_a_warning(caplog):
    parse("--num_process", "4", "--zero_stage=3", "--tools_script", "t.py")
    assert [r.getMessage().split(" ")[1] for r in caplog.records] == ["num_process", "zero_stage"]


def test_supported_and_alias_names_are_options_and_the_rest_are_not():
    assert set(OPTIONS) >= {*SUPPORTED, *ALIASES.values()}
    assert set(OPTIONS) >= {option for values in SETS.values() for sets in values.values() for option in sets}
    assert set(OPTIONS) >= {option for option, _ in EQUAL.values()}
    assert set(OPTIONS).isdisjoint({*ALIASES, *HANDLED})
    assert len(HANDLED) == sum(map(len, (SETS, EQUAL, INSTEAD, REFUSED)))  # none is handled in two ways


@pytest.mark.parametrize("name", INSTEAD)
def test_each_option_without_effect_says_what_takes_its_place(name, tmp_path, caplog):
    assert parse(text=f"{name}: something\n", tmp_path=tmp_path).config == GRPOConfig()
    assert f"c.yaml:1: {name} has no effect here: {INSTEAD[name]}" in caplog.text
    caplog.clear()
    parse(text=f"{name}: false\n", tmp_path=tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize("name", REFUSED)
def test_each_refused_option_is_an_error_but_for_values_that_change_nothing(name, tmp_path, caplog):
    assert message(text=f"{name}: 17\n", tmp_path=tmp_path).startswith(
        f"c.yaml:1: {name} 17 is not supported: "
    )
    for value in (*REFUSED[name][0], None):
        text = yaml.safe_dump({name: value})
        assert parse(text=text, tmp_path=tmp_path).config == GRPOConfig()
    assert caplog.text == ""


def test_each_option_name_of_20_public_recipes_is_an_option_or_is_handled(capsys):
    """What becomes of the names; a value may still be wrong here, such as a reward's name of another script."""
    recipes = yaml.safe_load((Path(__file__).parent / "recipes.yaml").read_text(encoding="utf-8"))
    names = [name for text in recipes.values() for name in text.split()]
    kinds = {
        "options here": {*OPTIONS, *ALIASES, *SETS, *EQUAL},
        "without effect, with a warning": {*INSTEAD},
        "refused, but for values that change nothing": {*REFUSED},
    }
    assert len(recipes) == 20
    assert set(names) - set().union(*kinds.values()) == set()
    with capsys.disabled():
        for kind, known in kinds.items():
            n = sum(name in known for name in names)
            print(f"\n{n} of {len(names)} option names of 20 recipes ({n / len(names):.1%}): {kind}", end="")


def test_a_switch_is_not_confused_with_its_number(tmp_path):
    assert "repetition_penalty True is not supported" in message(
        text="repetition_penalty: true", tmp_path=tmp_path
    )


def test_every_name_of_transformers_is_handled():
    """The releases that the list was made from; it is renewed for a later one."""
    if not importlib.metadata.version("transformers").startswith(("5.23.", "5.24.")):
        pytest.skip("the committed list is of transformers 5.23 and 5.24")
    (folder,) = (
        f for f in importlib.metadata.files("transformers") if f.match("transformers/training_args.py")
    )
    tree = ast.parse(Path(folder.locate()).read_text())
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    names = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    assert len(names) > 100
    assert names - {*SUPPORTED, *ALIASES, *HANDLED} == set()


# --- defaults, files, help ---


def test_defaults_are_those_of_trl():
    """Written down from TRL 1.16.0's GRPOConfig."""
    expected = {
        "learning_rate": 1e-6,
        "num_generations": 8,
        "max_grpo_completion_length": 512,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "beta": 0.0,
        "num_iterations": 1,
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "importance_sampling_level": "token",
        "scale_rewards": "group",
        "loss_type": "dapo",
        "use_bias_correction_kl": True,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "entropy_coef": 0.0,
        "off_policy_mask_threshold": None,
        "multi_objective_aggregation": "sum_then_normalize",
        "top_entropy_quantile": 1.0,
        "mask_truncated_completions": False,
        "max_tool_calling_iterations": None,
        "log_completions": False,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": True,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": None,
        "report_to": "none",
        "eval_steps": None,
        "seed": 42,
        "model_revision": "main",
        "warmup_ratio": None,
        "generation_batch_size": None,
    }
    config = GRPOConfig()
    assert {name: getattr(config, name) for name in expected} == expected


def test_default_yaml_is_the_original_quick_start():
    config = parse_config([], prog="test", default_config=str(ROOT / "configs/default.yaml")).config
    assert config.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.dataset_id_or_path == "data/financial_train.jsonl"
    assert (config.num_train_epochs, config.learning_rate) == (3.0, 5e-7)
    assert (config.max_grpo_completion_length, config.batch_size(1)) == (512, 16)


def test_resolved_config_loads_again_as_it_is(tmp_path):
    config = GRPOConfig(
        reward_fn=["a.py", "b.py"],
        reward_weights=[1, 0.5],
        chat_template_kwargs={"enable_thinking": False, "é": [1, {"x": None}]},
        save_strategy="no",
        scale_rewards="none",
        learning_rate=5e-7,
        system_prompt="Say: yes\nor #no",
        delta=4.0,
    )
    write_resolved(config, tmp_path / "out" / "resolved_config.yaml")
    again = parse_config([], prog="test", default_config=str(tmp_path / "out" / "resolved_config.yaml"))
    assert again.config == config


def test_a_command_with_a_runs_own_file_does_not_start_over(tmp_path):
    write_resolved(GRPOConfig(overwrite_output_dir=True), tmp_path / "resolved_config.yaml")
    again = parse_config([], prog="test", default_config=str(tmp_path / "resolved_config.yaml"))
    assert again.config.overwrite_output_dir is False


def test_help_lists_every_option_with_default_and_one_line(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, field in OPTIONS.items():
        assert f"--{name} " in text
        assert field.description in text
        assert len(field.description) <= 105
    assert "--num_generations INT Completions per prompt, which form a group. [default: 8]" in text
    assert "load_in_4bit" not in text


def test_print_config_shows_value_and_origin(capsys, tmp_path):
    print_config(parse("--seed=7", text="beta: 0.5", tmp_path=tmp_path))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["seed", "7", "--seed"] in lines
    assert ["beta", "0.5", f"{tmp_path}/c.yaml:1"] in lines
    assert ["min_p", "unset", "default"] in lines
    assert len(lines) == len(OPTIONS)


def test_config_and_metrics_import_neither_jax_nor_transformers():
    code = (
        "import sys, grpo_jax.run.config, grpo_jax.run.log, grpo_jax.run.console\n"
        "print([m for m in ('jax', 'transformers', 'flax', 'tensorboardX') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
