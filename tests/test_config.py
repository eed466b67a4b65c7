"""Options: sources and their order, errors that say where and what to do, TRL's names."""

import ast
import dataclasses
import importlib.metadata
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import split_state_dict_into_shards_factory

from grpo_jax.run.config import parse_config, print_config, write_resolved
from grpo_jax.run.options import Config
from grpo_jax.run.trl_options import ALIASES, ERRORS, RULINGS, SUPPORTED, WARNINGS

ROOT = Path(__file__).parent.parent

# As the original's recipe generator writes it.
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
    default = None
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
        default = str(tmp_path / "c.yaml")
    return parse_config(list(argv), prog="test", default_config=default, description="")


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


def test_config_flag_replaces_the_default_file(tmp_path):
    (tmp_path / "d.yaml").write_text("seed: 3")
    resolved = parse("--config", f"{tmp_path}/d.yaml", text="beta: 0.5", tmp_path=tmp_path)
    assert (resolved.config.seed, resolved.config.beta) == (3, 0.0)


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
        ("seed: 1\nnum_generation: 4", "c.yaml:2: unknown option 'num_generation'; nearest: num_generations"),
        ("seed: 1\n\nsave_steps: often", "c.yaml:3: save_steps must be a whole number, got 'often'"),
        ("save_steps: 2.5", "c.yaml:1: save_steps must be a whole number, got 2.5"),
        ("save_steps: true", "c.yaml:1: save_steps must be a whole number, got True"),
        ("beta: .nan", "c.yaml:1: beta must be a number, got nan"),
        ("max_steps: .inf", "c.yaml:1: max_steps must be a whole number, got inf"),
        ("model_revision: 12", "c.yaml:1: model_revision must be text, got 12"),
        ("tool_cache: 1", "c.yaml:1: tool_cache must be true or false, got 1"),
        ("chat_template_kwargs: [1]", "c.yaml:1: chat_template_kwargs must be JSON, got [1]"),
        (
            "dataset_columns: {prompt: 3}",
            'c.yaml:1: dataset_columns must be column names, as {"prompt": "question"}, got {\'prompt\': 3}',
        ),
        ("reward_fn: []", "c.yaml:1: reward_fn must be one or more of: text (or none), got []"),
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
def test_yaml_errors_name_file_line_and_mend(text, expected, tmp_path):
    assert message(text=text + "\n", tmp_path=tmp_path) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--num_generation", "4"], "unknown option --num_generation; nearest: --num_generations"),
        (["--zzz=4"], "unknown option --zzz; --help lists every option"),
        (["seed"], "'seed' belongs to no option; write --option value"),
        (["--seed"], "argument --seed: expected one argument; --help lists every option"),
        (["--seed", "x"], "--seed: seed must be a whole number, got 'x'"),
        (
            ["--chat_template_kwargs", "{"],
            "--chat_template_kwargs: chat_template_kwargs must be JSON, got '{'",
        ),
        (
            ["--generation_kwargs", "{"],
            "--generation_kwargs: generation_kwargs '{' is not supported: use temperature, top_p, top_k and min_p",
        ),
        (
            ["--repetition_penalty", "1.1"],
            "--repetition_penalty: repetition_penalty 1.1 is not supported: "
            "sampling knows temperature, top_p, top_k and min_p",
        ),
    ],
)
def test_flag_errors_name_flag_and_mend(argv, expected):
    assert message(*argv) == expected


def test_missing_config_file_is_named():
    assert "no/such.yaml" in message("--config", "no/such.yaml")


@pytest.mark.parametrize(
    ("name", "bad", "rule"),
    [
        ("num_generations", 1, "must be >= 2 to rank completions, got 1"),
        ("temperature", 0, "must be > 0, got 0.0"),
        ("top_p", 0, "must be in (0, 1], got 0.0"),
        ("top_p", 1.5, "must be in (0, 1], got 1.5"),
        ("min_p", -0.1, "must be in [0, 1], got -0.1"),
        ("adam_beta2", 1, "must be in [0, 1), got 1.0"),
        ("max_steps", 0, "must be -1 or >= 1, got 0"),
        ("mesh_data", 0, "must be -1 or >= 1, got 0"),
        ("warmup_steps", 2.5, "must be >= 0, and whole from 1 on, got 2.5"),
        ("delta", 1, "must be > 1, the ratio of an unchanged policy, got 1.0"),
        ("beta", -1, "must be >= 0, got -1.0"),
        ("tool_timeout", 0, "must be > 0, got 0.0"),
        ("seed", -1, "must be in [0, 2**32 - 1], got -1"),
        (
            "loss_type",
            "dr-grpo",
            "must be one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo, got 'dr-grpo'; nearest: dr_grpo",
        ),
        ("sampler_correction_max", 0.5, "must be >= 1, got 0.5"),
        ("sampler_correction_min", 1.5, "must be in [0, 1], got 1.5"),
        ("off_policy_mask_threshold", 0, "must be > 0, got 0.0"),
        ("vespo_lambda_neg", 0, "must be >= 1e-4"),
        (
            "lr_scheduler_type",
            "cosine_with_restarts",
            "must be one of constant, constant_with_warmup, linear, cosine",
        ),
        ("dtype", "float16", "must be one of auto, float32, bfloat16, got 'float16'"),
        ("param_dtype", "auto", "must be one of float32, bfloat16, got 'auto'"),
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
        Config(**{name: bad})
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
        ({"sampler_correction": "token_truncate", "sampler_correction_max": None}, "_min or _max to cut at"),
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
    ],
)
def test_options_of_the_loss_that_the_others_leave_without_effect_are_refused(options, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        Config(**options)


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
    Config(**options)


@pytest.mark.parametrize("size", ["500MB", "1.5gb", "20 KB", "1TB"])
def test_a_size_of_weight_files_is_one_that_the_hub_library_reads(size):
    limit = Config(max_shard_size=size).max_shard_size
    plan = split_state_dict_into_shards_factory(
        {"a": 9000, "b": 9000},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    assert not plan.is_sharded


def test_reward_weights_are_one_per_function():
    assert Config(reward_weights=[2]).reward_weights == [2.0]
    with pytest.raises(ValueError, match=r"1 functions \(accuracy\), got \[1.0, 2.0\]"):
        Config(reward_weights=[1, 2])


# --- batch size, warm-up ---


def test_batch_size_is_per_device_times_devices_times_accumulation():
    config = Config(per_device_train_batch_size=2, gradient_accumulation_steps=8)
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
    config = Config(per_device_train_batch_size=per_device, gradient_accumulation_steps=steps)
    with pytest.raises(ValueError) as error:
        config.batch_size(devices)
    assert str(error.value).endswith(f"nearest valid: {nearest}")
    assert f"got {per_device * steps * devices} = " in str(error.value)


def test_warmup_counts_updates_or_is_a_share_rounded_up():
    assert Config(warmup_steps=10).warmup_updates(total=40) == 10
    assert Config(warmup_steps=0.1).warmup_updates(total=25) == 3
    assert Config().warmup_updates(total=25) == 0


def test_warmup_of_a_constant_schedule_is_named(tmp_path, caplog):
    parse(text="lr_scheduler_type: constant\nwarmup_ratio: 0.1\n", tmp_path=tmp_path)
    assert "c.yaml:2: lr_scheduler_type constant has no warm-up" in caplog.text


def test_adapters_options_without_use_peft_are_named(tmp_path, caplog):
    parse("--lora_r", "8", text="lora_alpha: 32\nlora_dropout: 0\n", tmp_path=tmp_path)
    assert [r.getMessage().replace(f"{tmp_path}/", "") for r in caplog.records] == [
        "--lora_r: lora_r has no effect without use_peft",
        "c.yaml:2: lora_dropout has no effect without use_peft",
    ]
    caplog.clear()
    parse("--lora_r", "8", "--use_peft")
    assert caplog.text == ""


def test_required_option_that_is_not_set_is_named():
    with pytest.raises(ValueError, match="model_name_or_path must be set: --model_name_or_path VALUE"):
        Config().required("model_name_or_path")
    assert Config(model_name_or_path="m").required("model_name_or_path") == "m"


# --- names of TRL and the recipe ---


def test_original_recipe_runs_as_it_is(tmp_path, caplog, monkeypatch):
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
    options = {field.name for field in dataclasses.fields(Config)}
    assert options >= {*SUPPORTED.split(), *ALIASES.values()}
    assert options.isdisjoint({*ALIASES, *ERRORS, *" ".join(WARNINGS.values()).split()})


@pytest.mark.parametrize("name", [name for name, ruling in RULINGS.items() if ruling.kind == "warning"])
def test_each_warning_option_says_what_takes_its_place(name, tmp_path, caplog):
    assert parse(text=f"{name}: something\n", tmp_path=tmp_path).config == Config()
    assert f"c.yaml:1: {name} has no effect here: {RULINGS[name].text}" in caplog.text
    caplog.clear()
    parse(text=f"{name}: false\n", tmp_path=tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_option_is_refused_but_for_neutral_values(name, tmp_path):
    assert message(text=f"{name}: 17\n", tmp_path=tmp_path).startswith(
        f"c.yaml:1: {name} 17 is not supported: "
    )
    for value in RULINGS[name].neutral:
        text = yaml.safe_dump({name: value})
        assert parse(text=text, tmp_path=tmp_path).config == Config()


def test_a_switch_is_not_confused_with_its_number(tmp_path):
    assert "repetition_penalty True is not supported" in message(
        text="repetition_penalty: true", tmp_path=tmp_path
    )


def test_every_name_of_transformers_has_a_ruling():
    """The release that the list was made from; a later one is ruled on when the list is renewed."""
    if not importlib.metadata.version("transformers").startswith("5.23."):
        pytest.skip("the committed list is of transformers 5.23")
    (folder,) = (
        f for f in importlib.metadata.files("transformers") if f.match("transformers/training_args.py")
    )
    tree = ast.parse(Path(folder.locate()).read_text())
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    names = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    assert len(names) > 100
    assert names - set(RULINGS) == set()


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
    }
    config = Config()
    assert {name: getattr(config, name) for name in expected} == expected


def test_default_yaml_is_the_original_quick_start():
    config = parse_config([], prog="test", default_config=str(ROOT / "configs/default.yaml")).config
    assert config.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.dataset_id_or_path == "data/financial_train.jsonl"
    assert (config.num_train_epochs, config.learning_rate) == (3.0, 5e-7)
    assert (config.max_grpo_completion_length, config.batch_size(1)) == (512, 16)


def test_resolved_config_loads_again_as_it_is(tmp_path):
    config = Config(
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


def test_help_lists_every_option_with_default_and_one_line(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text
        assert field.metadata["help"] in text
        assert len(field.metadata["help"]) <= 100
    assert "--num_generations INT Completions per prompt, ranked with one another. [default: 8]" in text
    assert "load_in_4bit" not in text


def test_print_config_shows_value_and_origin(capsys, tmp_path):
    print_config(parse("--seed=7", text="beta: 0.5", tmp_path=tmp_path))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["seed", "7", "--seed"] in lines
    assert ["beta", "0.5", f"{tmp_path}/c.yaml:1"] in lines
    assert ["min_p", "unset", "default"] in lines
    assert len(lines) == len(dataclasses.fields(Config))


def test_config_and_metrics_import_neither_jax_nor_transformers():
    code = (
        "import sys, grpo_jax.run.config, grpo_jax.run.log, grpo_jax.run.console\n"
        "print([m for m in ('jax', 'transformers', 'flax', 'tensorboardX') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
