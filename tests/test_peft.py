"""The PEFT folder, without PEFT: its names, shapes and values. `test_lora_torch.py` loads it with PEFT."""

import json

import helpers
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_update import CFG, weights

from grpo_jax.models.lora import LoraConfig
from grpo_jax.models.peft import adapter_base, load_adapter, save_adapter


def written(folder, modules, alpha=6.0):
    config = LoraConfig.of(3, alpha, 0.05, modules)
    adapters = helpers.random_adapters(weights()["layers"], config)
    save_adapter(folder, adapters, config, "Qwen/Qwen3-0.6B")
    return adapters, load_file(folder / "adapter_model.safetensors")


def test_names_and_shapes_are_pefts(tmp_path):
    """Of one layer with D 16, F 24, N·H = 4·4, K·H = 2·4 and rank 3."""
    _, tensors = written(tmp_path / "adapter", ["all-linear"])
    sizes = {  # inputs, outputs
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (16, 8),
        "self_attn.v_proj": (16, 8),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (16, 24),
        "mlp.up_proj": (16, 24),
        "mlp.down_proj": (24, 16),
    }
    want = {}
    for i in range(CFG.L):
        for name, (inputs, outputs) in sizes.items():
            want[f"base_model.model.model.layers.{i}.{name}.lora_A.weight"] = (3, inputs)
            want[f"base_model.model.model.layers.{i}.{name}.lora_B.weight"] = (outputs, 3)
    assert {name: x.shape for name, x in tensors.items()} == want
    assert {x.dtype for x in tensors.values()} == {np.dtype("float32")}


def test_heads_lie_one_after_the_other(tmp_path):
    """Row 4·head + h of B, and column 4·head + h of o_proj's A."""
    adapters, tensors = written(tmp_path / "adapter", ["k_proj", "o_proj"])
    prefix = "base_model.model.model.layers.1.self_attn"
    B, A = tensors[f"{prefix}.k_proj.lora_B.weight"], tensors[f"{prefix}.o_proj.lora_A.weight"]
    assert (B[5] == adapters["k_lora_b"][1, :, 1, 1]).all()
    assert (A[:, 14] == adapters["o_lora_a"][1, 3, 2]).all()


def test_the_config_is_what_peft_reads_and_a_folder_is_replaced(tmp_path):
    written(tmp_path / "adapter", None, alpha=4.5)
    written(tmp_path / "adapter", ["down_proj"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (
        config.items()
        >= {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "Qwen/Qwen3-0.6B",
            "r": 3,
            "lora_alpha": 6,
            "lora_dropout": 0.05,
            "target_modules": ["down_proj"],
            "bias": "none",
        }.items()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 4


def test_what_was_written_is_read_again(tmp_path):
    adapters, _ = written(tmp_path / "adapter", ["all-linear"])
    found = load_adapter(tmp_path / "adapter", weights()["layers"])
    assert found.config == LoraConfig.of(3, 6.0, 0.05, ["all-linear"])
    assert found.weights.keys() == adapters.keys()
    assert all((found.weights[name] == adapters[name]).all() for name in adapters)
    assert adapter_base(tmp_path / "adapter") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_dora": True},
            "use_dora must be False, got True; merge the adapter into its model with PEFT first",
        ),
        ({"r": 4}, "q_proj.lora_A.weight must have shape (4, 16), got (3, 16)"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight is unknown"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "o_proj.lora_A.weight is missing"),
        ({"target_modules": ".*proj"}, "target_modules must be a list of q_proj"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, got 'pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication must be None"),
        ({"r": "8"}, "r must be a number, got '8'"),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
    ],
)
def test_adapters_that_are_not_supported_are_named(tmp_path, changes, message):
    written(tmp_path / "adapter", None)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError) as error:
        load_adapter(tmp_path / "adapter", weights()["layers"])
    assert message in str(error.value)


def test_pickled_adapters_are_named(tmp_path):
    written(tmp_path / "adapter", None)
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"lacks adapter_model\.safetensors; a \.bin file is a pickle"
    ):
        load_adapter(tmp_path / "adapter", weights()["layers"])
