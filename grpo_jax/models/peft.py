"""Adapters as a PEFT folder, which `peft.PeftModel.from_pretrained(base_model, folder)` loads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from grpo_jax.files import save_tensors
from grpo_jax.models.hf import TABLE, read_json_object, whole_folder
from grpo_jax.models.lora import MODULES, Adapters, LoraConfig, Params, init_adapters

# what else PEFT's LoRA can do, and the values that mean that it does not
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "init_lora_weights": (True, False, None, "gaussian"),  # others change the base's weights
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
}


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a path is a PEFT folder without a model in it, as `runs/x/adapter`."""
    return (Path(folder) / "adapter_config.json").exists() and not (Path(folder) / "config.json").exists()


def adapter_base(folder: str | Path) -> str:
    """Hub id or folder of the model that a PEFT folder's adapters were trained on.

    Raises:
        ValueError: it does not say.
    """
    path = Path(folder) / "adapter_config.json"
    base = read_json_object(path).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{path}: base_model_name_or_path must name the base model, got {base!r}")
    return base


def load_adapter(folder: str | Path, layers: Params) -> Adapters:
    """The adapters of a PEFT folder.

    Args:
        layers: the base model's stacked layers, or their shapes.

    Raises:
        ValueError: of a kind that is not supported, or a tensor is missing, unknown or misshapen; names it.
    """
    config = _read_config(Path(folder) / "adapter_config.json")
    path = Path(folder) / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"adapter folder {folder} lacks {path.name}; a .bin file is a pickle, which is not read: load it in PEFT and "
            "write it with save_pretrained"
        ) from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
    shapes = jax.eval_shape(lambda: init_adapters(layers, config, seed=0))
    zeros = {name: np.broadcast_to(np.float32(0), x.shape) for name, x in shapes.items()}
    expected = {name: x.shape for name, x in peft_tensors(zeros, config).items()}
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{path}: the tensor {name} is {'missing' if name in expected else 'unknown'}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: the tensor {name} must have shape {shape}, got {tensors[name].shape}")
    weights = {}
    for module in config.modules:
        group, name = MODULES[module]
        prefix = "base_model.model." + TABLE[f"layers/{group}/{name}"][0].removesuffix(".weight")
        for x in "AB":
            key = f"{name}_lora_{x.lower()}"
            L, *shape = shapes[key].shape
            parts = [tensors[f"{prefix.format(i)}.lora_{x}.weight"].T.reshape(shape) for i in range(L)]
            weights[key] = np.stack(parts).astype(np.float32)
    return Adapters(weights, config)


def _read_config(path: Path) -> LoraConfig:
    found = read_json_object(path)
    for key, plain in _PLAIN.items():
        if found.get(key, plain[0]) not in plain:
            raise ValueError(
                f"{path}: {key} must be {plain[0]!r}, got {found[key]!r}; merge the adapter into its model with PEFT first"
            )
    modules = found.get("target_modules")
    if not isinstance(modules, list) or not modules or set(modules) - set(MODULES):
        raise ValueError(f"{path}: target_modules must be a list of {', '.join(MODULES)}, got {modules!r}")
    for key, kinds in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(found.get(key), kinds):
            raise ValueError(f"{path}: {key} must be a number, got {found.get(key)!r}")
    return LoraConfig.of(found["r"], float(found["lora_alpha"]), float(found.get("lora_dropout", 0)), modules)


def save_adapter(folder: Path, adapters: Params, config: LoraConfig, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (float32).

    Args:
        folder: replaced when it exists.
        adapters: stacked; see `lora`.
        base: hub id or folder of the model that they were trained on.
    """
    alpha = config.alpha
    described = {
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
    tensors = peft_tensors(adapters, config)
    with whole_folder(folder) as part:
        (part / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n")
        save_tensors(tensors, part / "adapter_model.safetensors")


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
