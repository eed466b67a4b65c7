"""Adapters as a PEFT folder, which `peft.PeftModel.from_pretrained(base_model, folder)` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from grpo_jax.models.hf import TABLE, whole_folder
from grpo_jax.models.lora import MODULES, LoraConfig, Params


def save_adapter(folder: Path, adapters: Params, config: LoraConfig, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (float32).

    Args:
        folder: replaced when it exists.
        adapters: stacked; see `lora`.
        base: hub id or folder of the model that they were trained on.
    """
    tensors = peft_tensors(adapters, config)
    with whole_folder(folder) as part:
        (part / "adapter_config.json").write_text(json.dumps(_peft_config(config, base), indent=2) + "\n")
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(config: LoraConfig, base: str) -> dict[str, Any]:
    alpha = config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def peft_tensors(adapters: Params, config: LoraConfig) -> dict[str, np.ndarray]:
    """PEFT's names and layouts: A [R, inputs], B [outputs, R], heads and head size in one dimension."""
    out = {}
    for module in config.modules:
        group, name = MODULES[module]
        path = TABLE[f"layers/{group}/{name}"][0].removesuffix(".weight")
        a, b = (np.asarray(adapters[f"{name}_lora_{x}"], np.float32) for x in "ab")
        for i in range(len(a)):
            prefix = "base_model.model." + path.format(i)
            out[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a[i].reshape(-1, config.rank).T)
            out[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b[i].reshape(config.rank, -1).T)
    return out
