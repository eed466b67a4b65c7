"""A small Qwen3-shaped checkpoint made from scratch, in the layout of a published one.

It exists so that the whole pipeline runs in minutes on a CPU without a download:
the same files, names and template as Qwen3, a byte-level BPE trained on the given texts,
random weights. The chat template writes what Qwen3's does for tools, calls and
tool responses, but inserts no think blocks, so that it is prefix-preserving:
rendering a longer conversation only ever appends.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.files import save_tensors
from grpo_jax.models.cache import write_json

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Added tokens that Qwen does not mark as special: decoding keeps them.
TAG_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight")

# Qwen's split rule: digits stand alone, so that numbers are written digit by digit.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\n' + (system + '\n\n' if system else '') }}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif system %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function or tool_call %}
            {{- '\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- (call.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows of the embedding, and the transformer's shape; the defaults have 877,440 parameters."""

    vocab_size: int = 700
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384


def make_tiny_checkpoint(
    folder: str | Path, texts: Iterable[str], sizes: Sizes = Sizes(), *, seed: int = 0
) -> Path:
    """Write a Qwen3-shaped checkpoint with random weights and its own tokenizer.

    The same arguments give the same bytes.

    Args:
        folder: must not exist; it appears whole or not at all, and is returned.
        texts: what the tokenizer is trained on, as often as the model will meet them; the
            template's own words are added.
        sizes: the model's; the tokenizer has at most as many ids as the embedding has rows.

    Raises:
        ValueError: the folder exists, the vocabulary cannot hold all bytes and control
            tokens, or `kv_heads` does not divide `heads`.
    """
    folder = Path(folder)
    control = len(SPECIAL_TOKENS + TAG_TOKENS)
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it or name another folder")
    if sizes.vocab_size < 256 + control:
        raise ValueError(
            f"vocab_size must be >= {256 + control} (256 bytes + control tokens), got {sizes.vocab_size}"
        )
    if sizes.heads % sizes.kv_heads:
        raise ValueError(f"kv_heads must divide heads, got {sizes.kv_heads} and {sizes.heads}")
    config = _config(sizes)
    texts = list(texts)
    words = [w.replace(r"\n", "\n") for w in re.findall(r"'([^']*)'", CHAT_TEMPLATE)]
    tokenizer = _train_tokenizer(texts + words * (len(texts) // 4 + 1), sizes.vocab_size - control)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS + TAG_TOKENS}
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}

    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        write_json(partial / "config.json", config | ends)
        sampling = {
            "bos_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "temperature": 1.0,
        }
        write_json(partial / "generation_config.json", sampling)
        settings = _tokenizer_config(ids, config["max_position_embeddings"])
        write_json(partial / "tokenizer_config.json", settings)
        tokenizer.save(str(partial / "tokenizer.json"))
        _save_weights(partial / "model.safetensors", config, seed)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return folder


def _config(sizes: Sizes) -> dict[str, Any]:
    """config.json with the keys of a published Qwen3, `rope_theta` at top level."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": 32768,
        "max_window_layers": sizes.layers,
        "model_type": "qwen3",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": sizes.vocab_size,
    }


def _tokenizer_config(ids: dict[str, int], max_length: int) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": token in SPECIAL_TOKENS}
            for token, index in ids.items()
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE of at most `vocab_size` entries, built as Qwen's; control tokens come on top."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # A rendered conversation may be given: its control tokens are never split, so no merges are learned from them.
    control = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + TAG_TOKENS)))
    tokenizer.train_from_iterator((piece for text in texts for piece in control.split(text)), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAG_TOKENS])
    return tokenizer


def _save_weights(path: Path, config: dict[str, Any], seed: int) -> None:
    # 1/sqrt(fan in), the embedding table by its width, residual writers smaller so that tokens
    # stay visible: docs/log.md has what the published models' plain 0.02 did to the cold start.
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        shrink = (2 * config["num_hidden_layers"]) ** -0.5 if name.endswith(RESIDUAL_WRITERS) else 1.0
        return rng.normal(0.0, shrink * shape[-1] ** -0.5, shape).astype(np.float32)

    weights = {name: draw(name, shape) for name, shape in weight_shapes(config).items()}
    save_tensors(weights, path)


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each weight by its published name; matrices are [out, in]."""
    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "self_attn.q_norm": (h,),
        "self_attn.k_norm": (h,),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes
