"""LoRA: adapters next to frozen weights, as PEFT defines them.

A target module computes y = x·W + (alpha / rank)·B(A(dropout(x))): A random, B zero, both
float32 and trained; W is the frozen base. Adapters are a separate tree, stacked [L, …]:
{"q_lora_a": [L, D, R], "q_lora_b": [L, R, N, H], …}, A with the weight's input dimensions and
B with its output's. `qwen.extend` finds them in the parameters under "lora" (`join`); the
rollout and the written model hold their product merged into the weights (`merge`).

Dropout belongs to updates: rollout, scores and reference never drop. Its keys are
fold_in(seed, update, row, level, layer, module), so that neither a resume nor the split into
micro-batches changes what is dropped. Tokens that rows share (preamble, prompts) pass through
the model once and so are dropped once for all of their rows; PEFT, which runs every row whole,
draws them anew for each. The update's log-probabilities, and with them the metric
sampling/sampling_logp_difference, are those under dropout.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, UInt32

Params = dict[str, Any]

# HF name -> where the weight lies in a layer; the names' order numbers the modules in random keys.
MODULES = {
    "q_proj": ("attention", "q"),
    "k_proj": ("attention", "k"),
    "v_proj": ("attention", "v"),
    "o_proj": ("attention", "o"),
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}
DEFAULT_MODULES = ("q_proj", "v_proj")  # PEFT's for Qwen2 and Qwen3
_NUMBER = {name: i for i, (_, name) in enumerate(MODULES.values())}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What the adapters are.

    Args:
        rank: R, the width between A and B.
        alpha: their product is scaled by alpha / rank.
        dropout: share of A's inputs that an update drops.
        modules: HF names out of `MODULES`, in its order.
    """

    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]

    @classmethod
    def of(cls, rank: int, alpha: float, dropout: float, modules: Sequence[str] | None) -> LoraConfig:
        """From the options' values; "all-linear" is every module, None PEFT's default."""
        chosen = MODULES if "all-linear" in (modules or ()) else modules or DEFAULT_MODULES
        return cls(rank, alpha, dropout, tuple(name for name in MODULES if name in chosen))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LoraConfig:
        """What `dataclasses.asdict` gave, after a trip through JSON."""
        return cls(**dict(fields, modules=tuple(fields["modules"])))

    @property
    def scale(self) -> float:
        """The factor of the adapters' product."""
        return self.alpha / self.rank


@struct.dataclass
class Adapters:
    """The adapters of all layers, or of one, and how they are applied.

    Args:
        weights: {"q_lora_a": [L, D, R], …}; one layer's lack the L.
    """

    weights: Params
    config: LoraConfig = struct.field(pytree_node=False)


@struct.dataclass
class Frozen:
    """What an update of adapters reads and does not change.

    Args:
        base: the model's weights, stacked, in the dtype of the computation.
        seed: uint32 scalar, what the dropout is drawn from.
    """

    base: Params
    seed: Int[Array, ""] | UInt32[Array, ""]
    config: LoraConfig = struct.field(pytree_node=False)


def init_adapters(layers: Params, config: LoraConfig, seed: int) -> Params:
    """Fresh float32 adapters: A uniform within ± 1/√(inputs) as PEFT's, B zero, so that nothing changes yet.

    Args:
        layers: the model's stacked layers, or their shapes.
    """
    out = {}
    for module in config.modules:
        group, name = MODULES[module]
        L, *shape = layers[group][name].shape
        split = 2 if name == "o" else 1  # the output projection reads [N, H]
        inputs, outputs = shape[:split], shape[split:]
        bound = math.prod(inputs) ** -0.5
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _NUMBER[name])
        a = jax.random.uniform(key, (L, *inputs, config.rank), jnp.float32, -bound, bound)
        out |= {f"{name}_lora_a": a, f"{name}_lora_b": jnp.zeros((L, config.rank, *outputs))}
    return out


def join(trained: Params, frozen: Frozen | None) -> Params:
    """The parameters that `extend` runs: what is trained, on its frozen base when there is one."""
    if frozen is None:
        return trained
    return frozen.base | {"lora": Adapters(trained, frozen.config)}


def adapt(adapters: Adapters | None, keys: UInt32[Array, "n 2"] | None, y, name: str, x):
    """A module's output with that of its adapters: y + (alpha / rank)·B(A(dropout(x))).

    Args:
        adapters: those of one layer; None for none.
        keys: one per row of x, for the dropout; None drops nothing.
        y: [n, T, …] output of the frozen weight, which comes back as it is when the weight has no adapters.
        x: [n, T, …] the weight's input.
    """
    if adapters is None or f"{name}_lora_a" not in adapters.weights:
        return y
    a, b = adapters.weights[f"{name}_lora_a"], adapters.weights[f"{name}_lora_b"]
    if keys is not None:
        rate = adapters.config.dropout

        def keep(key):
            key = jax.random.wrap_key_data(key, impl="threefry2x32")
            return jax.random.bernoulli(key, 1 - rate, x.shape[1:])

        x = jnp.where(jax.vmap(keep)(fold_in(keys, _NUMBER[name])), x / (1 - rate), 0)
    return y + adapters.config.scale * jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)


def fold_in(keys: UInt32[Array, "n 2"], data: Int[Array, "*n"] | int) -> UInt32[Array, "n 2"]:
    """Keys of rows with one more number in each; the number is the same for all, or one per row."""

    def one(key, number):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), number)
        return jax.random.key_data(key)

    return jax.vmap(one)(keys, jnp.broadcast_to(data, keys.shape[:1]))


def dropout_keys(frozen: Frozen | None, step: Int[Array, ""], rows: int) -> UInt32[Array, "n 2"] | None:
    """A key per row of an update, fold_in(seed, update, row); None where nothing is dropped."""
    if frozen is None or not frozen.config.dropout:
        return None
    key = jax.random.fold_in(jax.random.key(frozen.seed, impl="threefry2x32"), step)
    return fold_in(jnp.broadcast_to(jax.random.key_data(key), (rows, 2)), jnp.arange(rows))


def merge_layer(weights: Params, adapters: Adapters | None) -> Params:
    """One layer's weights with the adapters' product added, W + (alpha / rank)·A·B, in float32."""
    if adapters is None:
        return weights
    merged = {group: dict(part) for group, part in weights.items()}
    for module in adapters.config.modules:
        group, name = MODULES[module]
        a, b = adapters.weights[f"{name}_lora_a"], adapters.weights[f"{name}_lora_b"]
        product = jnp.tensordot(a, b, 1, precision="highest")
        merged[group][name] = weights[group][name].astype(jnp.float32) + adapters.config.scale * product
    return merged


def merge(params: Params, get: Callable[[Any], Any] = jax.device_get) -> Params:
    """Whole weights without adapters: on the host, in float32, merged layer by layer; as they are without.

    Only one layer at a time is on the device twice: at 8 B weights all of them would not fit.

    Args:
        get: brings a tree of arrays to the host.
    """
    if "lora" not in params:
        return params
    stacked = (params["layers"], params["lora"])
    layers = [get(_merge_at(stacked, i)) for i in range(len(jax.tree.leaves(stacked)[0]))]
    rest = {name: x for name, x in params.items() if name not in ("layers", "lora")}
    return jax.tree.map(_float32, get(rest)) | {
        "layers": jax.tree.map(lambda *x: _float32(np.stack(x)), *layers)
    }


@jax.jit
def _merge_at(stacked, i):
    return merge_layer(*jax.tree.map(lambda w: w[i], stacked))


def _float32(x) -> np.ndarray:
    return np.asarray(x).astype(np.float32)
