"""The whole weights of a checkpoint: adapters need the base that they were trained on.

A checkpoint of a run with adapters holds them alone; its meta names the rest: `source`, the base's
folder, `lora`, the adapters' settings, and `base`, what others call it and the dtype it had in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax import hosts
from grpo_jax.models import hf
from grpo_jax.models.lora import Adapters, LoraConfig, init_adapters, merge
from grpo_jax.models.qwen import Params, abstract_params
from grpo_jax.models.sharding import placed
from grpo_jax.run.checkpoint import OF_COLD_START, Checkpoints

Place = Callable[[Any], Any]  # a tree of weights -> the tree of its shardings, as `Layout.params`


WITHIN_A_RUN = ("cold_start", "base_model")  # folders of output_dir that its updates may have started from


def source_of(meta: Mapping[str, Any], run: Path) -> Path:
    """The folder of the model that a run's updates started from: its config.json and tokenizer.

    Args:
        run: where the run's folder is now, which may be another place than it was trained in.

    Raises:
        ValueError: the checkpoint is of a cold start.
    """
    if "source" not in meta:
        raise ValueError(OF_COLD_START)
    then = Path(meta["source"])
    now = run / then.name
    return now if then.name in WITHIN_A_RUN and not then.exists() and now.exists() else then


def restore_weights(checkpoints: Checkpoints, step: int, place: Place, dtype: Any = jnp.float32) -> Params:
    """A step's whole weights; adapters are merged into their base.

    Raises:
        ValueError, FileNotFoundError: no such step, it is damaged, or its source is gone.
    """
    meta = checkpoints.meta(step)
    source = source_of(meta, checkpoints.directory.parent)
    model = hf.read_config(source)
    shapes = abstract_params(model)
    if "lora" not in meta:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
        return checkpoints.restore_params(step, placed(shapes, place(shapes)))
    adapters, config = restore_adapters(checkpoints, step, place)
    base = hf.load_params(source, model, place(shapes), jnp.dtype(meta["base"]["dtype"]))
    return merged(base, Adapters(adapters, config), dtype, place(shapes))


def merged(base: Params, adapters: Adapters, dtype: Any, shardings: Any) -> Params:
    """Whole weights: a base with its adapters' product added."""
    whole = merge(base | {"lora": adapters}, hosts.fetch)
    return jax.device_put(jax.tree.map(lambda x: x.astype(dtype), whole), shardings)


def restore_adapters(checkpoints: Checkpoints, step: int, place: Place) -> tuple[Params, LoraConfig]:
    """A step's adapters alone; arguments and errors as `restore_weights`.

    Raises:
        ValueError: also where all weights were trained.
    """
    meta = checkpoints.meta(step)
    if "lora" not in meta:
        raise ValueError(
            f"{checkpoints.directory / str(step)} holds whole weights and no adapters: the run was without "
            "--use_peft; export it without --adapter"
        )
    config = LoraConfig.from_json(meta["lora"])
    layers = abstract_params(hf.read_config(source_of(meta, checkpoints.directory.parent)))["layers"]
    shapes = jax.eval_shape(lambda: init_adapters(layers, config, seed=0))
    return checkpoints.restore_params(step, placed(shapes, place(shapes))), config
