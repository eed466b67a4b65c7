"""The cases in which our Qwen is compared with the published models' own code, and our side of them.

Weights come from numpy's frozen `RandomState` under names and shapes written down here, in
the published layout, so that neither our table of names nor torch takes part in making them.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from grpo_jax.models.hf import entries, load_params, read_config
from grpo_jax.models.qwen import (
    Level,
    ModelConfig,
    Params,
    abstract_params,
    compiler_options,
    extend,
    head_weights,
)
from grpo_jax.models.sharding import Layout, make_mesh
from grpo_jax.types import Example, Prompt, Status, Trajectory
from grpo_jax.update.batch import make_batch, make_tree
from grpo_jax.update.update import ModelStep, make_score

V, POSITIONS, GREEDY, GENERATIONS = 128, 512, 64, 2

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "attention_bias": False,
}
CASES = {
    "qwen2": QWEN2,
    "qwen2-tied": QWEN2 | {"tie_word_embeddings": True, "num_key_value_heads": 6},
    # what the published Qwen2.5 configs say to add for texts of up to 131,072 tokens
    "qwen2-yarn": QWEN2
    | {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 131072,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "qwen3": QWEN3,
    # as Llama 3.1's, whose four frequencies here are kept, blended, and twice divided by the factor
    "llama3": QWEN2
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 256,
            "rope_type": "llama3",
        },
    },
    "qwen3-tied": QWEN3 | {"tie_word_embeddings": True, "rope_theta": 10000.0},
}
LOGITS_ATOL, LOGPROBS_ATOL, GRADIENT_RTOL = 2e-4, 1e-4, 1e-3


def published_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint; matrices are [out, in]."""
    D, F, N = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads"))
    H = config.get("head_dim", D // N)
    wide, narrow = N * H, config["num_key_value_heads"] * H
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], D)
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        layer |= {
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }
        for name, out in (("q", wide), ("k", narrow), ("v", narrow)):
            layer[f"self_attn.{name}_proj.weight"] = (out, D)
            if config["model_type"] == "qwen2":
                layer[f"self_attn.{name}_proj.bias"] = (out,)
        layer["self_attn.o_proj.weight"] = (D, wide)
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights in the published layout; norms near one, biases not zero."""
    rng = np.random.RandomState(seed)

    def draw(name, shape):
        mean, std = (1, 0.1) if "norm" in name else (0, shape[-1] ** -0.5)
        return (mean + std * rng.standard_normal(shape)).astype(np.float32)

    return {name: draw(name, shape) for name, shape in published_shapes(config).items()}


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A published-style folder of `config.json` and one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = random_tensors(config) if tensors is None else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path) -> tuple[ModelConfig, Params]:
    """The folder's model on one device, through the code that loads a published one."""
    cfg = read_config(folder)
    layout = Layout(make_mesh())
    return cfg, load_params(folder, cfg, layout.params(abstract_params(cfg)))


def tokens() -> np.ndarray:
    """[1, 512] random ids."""
    return np.random.RandomState(1).randint(0, V, (1, POSITIONS)).astype(np.int32)


@functools.cache
def trajectories() -> tuple[Trajectory, ...]:
    """Two prompts of 20 shared tokens, two completions each, each with two tool turns, all ragged."""
    rng = np.random.RandomState(2)

    def draw(n):
        return rng.randint(0, V, n).tolist()

    preamble, rows = draw(20), []
    for rest in (7, 12):
        prompt = preamble + draw(rest)
        for _ in range(GENERATIONS):
            turns = rng.randint(3, 15, 5)  # sampled, tool, sampled, tool, sampled
            mask = np.repeat([True, False, True, False, True], turns).tolist()
            rows.append(
                Trajectory(
                    Prompt(Example([], ""), prompt, []),
                    draw(len(mask)),
                    mask,
                    [0.0] * len(mask),
                    status=Status.ANSWERED,
                )
            )
    return tuple(rows)


def logits(params: Params, tokens, cfg: ModelConfig, dtype=jnp.float32):
    """[n, T, V] of plain rows; the plainest use of `extend`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    level = Level(jnp.asarray(tokens), positions, jnp.ones(tokens.shape, bool))
    (hidden,), _ = extend(params, (level,), cfg=cfg, dtype=dtype, keep_kv=False)
    return jnp.einsum("btd,vd->btv", hidden, head_weights(params).astype(dtype)).astype(jnp.float32)


def tree_logprobs(cfg: ModelConfig, params: Params, dtype=jnp.float32) -> np.ndarray:
    """Log-probabilities of all sampled tokens, row after row, on the three-level tree."""
    rows = trajectories()
    tree = make_tree([t.prompt.ids for t in rows], budget=max(len(t.completion_ids) for t in rows))
    assert len(tree.preamble) >= 20
    batch = make_batch(tree, rows, GENERATIONS)
    score = make_score(ModelStep(cfg, Layout(make_mesh()), dtype, remat=False))
    return np.asarray(score(params, jax.tree.map(jnp.asarray, batch)))[batch.completions.trained]


def ours(folder: Path, greedy: np.ndarray) -> dict[str, np.ndarray]:
    """Our results on a checkpoint, under the reference's names.

    Args:
        folder: from `write_checkpoint`.
        greedy: the reference's greedy tokens. Where our best token after each prefix of them is
            the next of them, our own greedy decoding gives the same tokens, by induction.
    """
    cfg, params = load(folder)
    fed = np.concatenate([tokens()[:, :16], greedy[None, :-1]], 1)
    best = np.asarray(logits(params, fed, cfg)[0, 15:].argmax(-1))
    return run(cfg, params) | {"greedy": best}


def run(cfg: ModelConfig, params: Params, dtype=jnp.float32) -> dict[str, np.ndarray]:
    """Logits, gradients and log-probabilities on the tree, computed in a dtype."""
    ids = tokens()

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        out = logits(params, ids, cfg, dtype)
        logprobs = jax.nn.log_softmax(out[:, :-1])
        return -jnp.take_along_axis(logprobs, jnp.asarray(ids)[:, 1:, None], 2).mean(), out

    (_, out), grads = jax.jit(loss, compiler_options=compiler_options(2))(params)
    results = {f"gradient/{name}": g for name, g in in_published_layout(cfg, grads).items()}
    return results | {"logits": np.asarray(out[0]), "tree": tree_logprobs(cfg, params, dtype)}


def in_published_layout(cfg: ModelConfig, tree: Params) -> dict[str, np.ndarray]:
    """A tree like params as tensors under their published names."""
    out = {}
    for entry, value in zip(jax.tree.leaves(entries(cfg)), jax.tree.leaves(tree), strict=True):
        for i, name in enumerate(entry.names()):
            out[name] = entry.write(np.asarray(value)[i] if entry.stacked else np.asarray(value))
    return out


def assert_parity(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Logits and log-probabilities within an absolute tolerance, gradients relative to their norm."""
    assert got.keys() == want.keys()
    np.testing.assert_allclose(got["logits"], want["logits"], rtol=0, atol=LOGITS_ATOL)
    np.testing.assert_allclose(got["tree"], want["tree"], rtol=0, atol=LOGPROBS_ATOL)
    np.testing.assert_array_equal(got["greedy"], want["greedy"])
    for name in (n for n in want if n.startswith("gradient/")):
        assert got[name].shape == want[name].shape
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error <= GRADIENT_RTOL, f"{name}: relative error {error:.1e}"


def thinned(results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What golden files keep: 6,000 of the logits and 64 entries of each gradient, always the same."""

    def thin(name, x):
        keep = {"logits": 6000, "greedy": x.size, "tree": x.size}.get(name, 64)
        places = np.random.RandomState(3).permutation(x.size)[:keep]
        return x if keep >= x.size else np.asarray(x).reshape(-1)[np.sort(places)]

    return {name: thin(name, x) for name, x in results.items()}
