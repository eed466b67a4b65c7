"""The files in configs/: each parses as it stands, and those of real size run on their architecture in small."""

import functools
import json
import shutil
from pathlib import Path

import launch
import numpy as np
import pytest
import yaml
from parity import QWEN2, QWEN3, load, published_shapes, write_checkpoint
from safetensors import safe_open

from grpo_jax import train
from grpo_jax.models.scratch import Sizes, make_tiny_checkpoint
from grpo_jax.run.config import parse_config
from grpo_jax.tools import load_tools

CONFIGS = sorted((launch.ROOT / "configs").glob("*.yaml"))
V = 2048
# Switches and head size as published; two layers, and the width of two heads.
SMALL = {
    "vocab_size": V,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
}
QWEN2_5_TIED = QWEN2 | SMALL | {"hidden_size": 128, "tie_word_embeddings": True}  # heads of 64
QWEN3_TIED = QWEN3 | SMALL | {"head_dim": 128, "tie_word_embeddings": True}
QWEN3_UNTIED = QWEN3_TIED | {"tie_word_embeddings": False}
ARCHITECTURES = {
    "default": QWEN2_5_TIED,
    "qwen3_0.6b": QWEN3_TIED,
    "qwen3_1.7b": QWEN3_TIED,
    "qwen3_4b": QWEN3_TIED,
    "qwen3_8b_lora": QWEN3_UNTIED,
}


def parsed(name):
    """The options of a config file, and where each came from."""
    return parse_config(["--config", str(launch.ROOT / f"configs/{name}.yaml")], prog="test")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_silently_and_opens_with_its_command(path, caplog):
    parsed(path.stem)
    assert not caplog.records
    title, blank, command, *_ = path.read_text().splitlines()
    flag = "" if path.stem == "default" else f" --config configs/{path.name}"
    assert (title[:2], blank, command) == ("# ", "#", f"#   python -m grpo_jax.train{flag}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_writes_into_a_folder_of_its_own_and_names_files_that_exist(path):
    config = parsed(path.stem).config
    assert config.output_dir == f"runs/{path.stem}"
    files = [config.dataset_id_or_path, config.eval_dataset_id_or_path, *config.reward_fn]
    for file in filter(None, files):
        assert (launch.ROOT / file.split("[")[0]).is_file()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "default"])
def test_qwen3_configs_have_the_values_of_the_original(name):
    config = parsed(name).config
    expected = {
        "num_generations": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "learning_rate": 5e-5 if name == "qwen3_8b_lora" else 5e-6,
        "lr_scheduler_type": "constant",
        "max_grpo_completion_length": 1024,
        "mask_truncated_completions": True,
        "num_train_epochs": 25 if name == "qwen3_4b" else 15,
        "save_steps": 25,
        "use_peft": name == "qwen3_8b_lora",
    }
    assert {option: getattr(config, option) for option in expected} == expected
    size = {"qwen3_0.6b": "0.6B", "qwen3_1.7b": "1.7B", "qwen3_4b": "4B", "qwen3_8b_lora": "8B"}[name]
    assert config.model_name_or_path == f"Qwen/Qwen3-{size}"


@functools.cache
def tokenizer() -> Path:
    """An HF folder whose tokenizer makes about as many tokens of the financial tools as Qwen's."""
    schemas = load_tools(module="tools_funcs.financial_tools_complex").schemas
    shape = {"layers": 1, "hidden": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "mlp": 8}
    return make_tiny_checkpoint(
        launch.FOLDER / "financial", [json.dumps(schemas)] * 4, Sizes(vocab_size=V, **shape)
    )


def two_layers(folder: Path, architecture: dict) -> Path:
    """A published-style folder with random weights and that tokenizer."""
    shutil.copytree(tokenizer(), folder)
    return write_checkpoint(folder, architecture)


@pytest.mark.slow  # a prompt with the 8 tools has 6,000 tokens
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_path_of_each_config_runs_on_its_architecture_in_two_layers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(launch.ROOT)
    architecture = ARCHITECTURES[name]
    small = {
        "model_name_or_path": two_layers(tmp_path / "source", architecture),
        "dataset_id_or_path": "data/financial_train.jsonl[:2]",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "max_steps": 1,
        "max_grpo_completion_length": 15,
        "eval_batch_size": 2,
        "mesh_fsdp": 1,
        "output_dir": tmp_path / "run",
        "compilation_cache_dir": launch.XLA_CACHE,
    }
    if parsed(name).config.eval_dataset_id_or_path:
        small["eval_dataset_id_or_path"] = "data/financial_test.jsonl[:2]"
    flags = [word for option, value in small.items() for word in (f"--{option}", value)]
    ran = launch.call(train.main, ["--config", f"configs/{name}.yaml", *flags], tmp_path / "run")
    assert ran.status == 0, ran.err
    assert_trained(ran, architecture)
    assert_evaluated(ran, "eval_dataset_id_or_path" in small)
    assert (ran.folder / "adapter").exists() == (name == "qwen3_8b_lora")
    if name == "qwen3_8b_lora":
        assert_adapters(ran)


def assert_trained(ran, architecture):
    """One update with a finite loss, and a model of the architecture that loads."""
    (line,) = ran.jsonl("metrics.jsonl")
    assert np.isfinite(line["loss"])
    assert not line["skipped"]
    with safe_open(ran.folder / "model" / "model.safetensors", "np") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes == published_shapes(architecture)
    cfg, params = load(ran.folder / "model")
    assert cfg.model_type == architecture["model_type"]
    assert np.isfinite(params["embedding"]).all()


def assert_evaluated(ran, expected):
    """Both evaluations had the two test rows; without a test file there were none."""
    summary = ran.json("summary.json")
    rows = [summary[moment]["n"] for moment in ("before", "after") if summary.get(moment)]
    assert rows == ([2, 2] if expected else [])


def assert_adapters(ran):
    """The PEFT folder has the rank of the YAML, and a pair for each of seven modules in two layers."""
    values = yaml.safe_load((launch.ROOT / "configs/qwen3_8b_lora.yaml").read_text())
    config = ran.json("adapter/adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (values["lora_r"], values["lora_alpha"])
    with safe_open(ran.folder / "adapter" / "adapter_model.safetensors", "np") as file:
        assert len(list(file.keys())) == 2 * 2 * 7
