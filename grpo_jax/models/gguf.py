"""GGUF files of Qwen2, Qwen3 and Llama: an HF folder made of one, whose weights stay in the file.

The folder has config.json, tokenizer and chat template as a published model's, and `TENSORS`, which says where in the
file each tensor lies. Quantised tensors become float32 when they are read, one at a time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.models.cache import cached_name, filled_folder, write_json
from grpo_jax.models.rope import Llama3, frequencies

TENSORS = "gguf_tensors.json"
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
# what the package gguf dequantises among the types that files of these models have
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3's scaling: what each frequency is divided by

# tokenizer.ggml.pre -> how a text is split before merges: a regular expression, or None for GPT-2's own
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"qwen2": _WORDS % r"\p{N}", "llama-bpe": _WORDS % r"\p{N}{1,3}", "smollm": None, "gpt-2": None}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type


@dataclasses.dataclass(frozen=True)
class InGguf:
    """A tensor of a GGUF file; an index reads and dequantises the rows that it names.

    Args:
        type: ggml's name of how it is stored.
        shape: as HF has it, [outputs, inputs].
        offset: where its first byte lies in the file.
        row_bytes: bytes of one row; of a vector, all of its bytes.
        heads: the rows of so many heads lie as llama.cpp permutes them for its rotation; None: as HF has them.
    """

    path: Path
    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int
    heads: int | None

    @property
    def dtype(self) -> Any:
        """Of what is read."""
        return PLAIN.get(self.type, np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = self.shape[0] if len(self.shape) > 1 else 1
        stored = np.memmap(self.path, np.uint8, "r", self.offset, (rows, self.row_bytes))
        if self.heads is not None:  # rows are whole, so they are put in order as they are stored
            stored = stored.reshape(self.heads, -1, 2, self.row_bytes).swapaxes(1, 2).reshape(rows, -1)
        if self.type in PLAIN:
            return stored.view(self.dtype).reshape(self.shape)[index]
        from gguf import GGMLQuantizationType, dequantize

        first, *rest = index if isinstance(index, tuple) else (index,)
        values = dequantize(np.ascontiguousarray(stored[first]), GGMLQuantizationType[self.type])
        return values[(slice(None), *rest)]


def tensors_of(folder: Path) -> Iterator[tuple[str, InGguf]]:
    """HF name and place of every tensor of a folder that `gguf_folder` made.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: it is another one now.
    """
    found = json.loads((folder / TENSORS).read_text())
    path = Path(found["file"])
    if not path.exists():
        raise FileNotFoundError(
            f"the GGUF file {path}, which holds the weights of {folder}, is missing; put it back"
        )
    if path.stat().st_size != found["size"]:
        raise ValueError(
            f"the GGUF file {path} has changed since {folder} was made; name it with --model_name_or_path"
        )
    for name, fields in found["tensors"].items():
        yield name, InGguf(path, **fields | {"shape": tuple(fields["shape"])})


def gguf_folder(path: Path) -> Path:
    """The HF folder of a GGUF file, made in the cache when it is not there.

    Raises:
        ValueError: the package gguf is not installed, the file is damaged or of an architecture, type of tensor or
            tokenizer that is not supported; names it.
    """
    path = path.absolute()
    state = path.stat()
    folder = cached_name(path.stem, path, state.st_size, state.st_mtime_ns)
    if not (folder / TENSORS).exists():
        fields, tensors = _read(path)
        config = _config(path, fields, tensors)
        with filled_folder(folder) as part:
            write_json(part / "config.json", config)
            _write_tokenizer(part, path, fields)
            placed = {_hf_name(t["name"]): _placed(t, config) for t in tensors if t["name"] != ROPE_FACTORS}
            write_json(part / TENSORS, {"file": str(path), "size": state.st_size, "tensors": placed})
    return folder


# --- reading ---


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The file's metadata, and of each tensor its name, type, HF shape, offset and row_bytes."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
    except ImportError:
        raise ValueError(
            f'reading {path} needs the package gguf: pip install "grpo_jax[gguf]" or pip install gguf'
        ) from None
    table: list[dict[str, Any]] = []
    size = path.stat().st_size

    class Reader(GGUFReader):
        """Notes where tensors lie, and checks it, instead of mapping them all."""

        def _build_tensors(self, start_offs, fields):
            for field in fields:
                _, name, _, dims, kind, offset = field.parts
                name, kind = bytes(name).decode(), int(kind[0])
                known = {t.value: t.name for t in GGMLQuantizationType}.get(kind, str(kind))
                if known not in PLAIN and known not in QUANTISED:
                    raise _Unusable(
                        f"the tensor {name} is of type {known}; supported: {', '.join([*PLAIN, *QUANTISED])}"
                    )
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[known]]
                shape = dims.tolist()[::-1]
                row_bytes, at = shape[-1] * block_bytes // block, int(start_offs + offset[0])
                rows = int(np.prod(shape[:-1]))
                if at + rows * row_bytes > size:
                    raise _Unusable(
                        f"it ends at byte {size}, inside the tensor {name}, which ends at {at + rows * row_bytes}; "
                        "fetch the file again"
                    )
                entry = {"name": name, "type": known, "shape": shape, "offset": at, "row_bytes": row_bytes}
                table.append(entry)

    try:
        fields = {name: field.contents() for name, field in Reader(path).fields.items()}
    except _Unusable as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # the package raises what numpy does at the end of a file
        raise ValueError(
            f"{path} is not a whole GGUF file ({type(error).__name__}: {error}); fetch it again"
        ) from None
    return fields, table


class _Unusable(Exception):
    """What is wrong with a file, without its name."""


def _hf_name(name: str) -> str:
    """HF's name of a tensor; one that is not known stays as it is, and is named when weights are loaded."""
    stem, _, end = name.rpartition(".")
    layer, stem = (stem.split(".", 2)[1], stem.split(".", 2)[2]) if stem.startswith("blk.") else ("", stem)
    if stem not in NAMES:
        return name
    return f"model.layers.{layer}.{NAMES[stem]}.{end}" if layer else f"{NAMES[stem]}.{end}"


def _placed(tensor: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    heads = None
    if config["model_type"] == "llama":
        of = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        heads = config.get(of.get(tensor["name"].split(".")[-2], ""))
    return {key: value for key, value in tensor.items() if key != "name"} | {"heads": heads}


def _needed(path: Path, fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise ValueError(f"{path}: the key {key} is missing; fetch the file again")
    return fields[key]


def _config(path: Path, fields: dict[str, Any], tensors: list[dict[str, Any]]) -> dict[str, Any]:
    """config.json with the keys of a published model."""
    kind = fields.get("general.architecture")
    if kind not in CLASSES:
        raise ValueError(f"{path}: the architecture must be one of {', '.join(CLASSES)}, got {kind!r}")
    if (parts := fields.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model; join them with llama-gguf-split --merge, and name the result"
        )

    def need(key: str) -> Any:
        return _needed(path, fields, f"{kind}.{key}")

    shapes = {tensor["name"]: tensor["shape"] for tensor in tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path}: the tensor token_embd.weight is missing; fetch the file again")
    D, N = need("embedding_length"), need("attention.head_count")
    theta = _short(fields.get(f"{kind}.rope.freq_base", 10000.0))
    H = fields.get(f"{kind}.attention.key_length", D // N)
    if (rotated := fields.get(f"{kind}.rope.dimension_count", H)) != H:
        raise ValueError(f"{path}: {kind}.rope.dimension_count must be the head size {H}, got {rotated}")
    config = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": D,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": N,
        "num_key_value_heads": fields.get(f"{kind}.attention.head_count_kv", N),
        "head_dim": H,
        "hidden_act": "silu",
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": "float32",
    }
    scaling = fields.get(f"{kind}.rope.scaling.type")
    if scaling is None:  # llama.cpp then takes a factor to be linear
        factors = [fields.get(f"{kind}.rope.{key}", 1.0) for key in ("scaling.factor", "scale_linear")]
        scaling = "none" if {*factors} <= {0.0, 1.0} else "linear"
    if scaling == "yarn":
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": _short(need("rope.scaling.factor")),
            "original_max_position_embeddings": need("rope.scaling.original_context_length"),
        }
    elif scaling != "none":
        raise ValueError(f"{path}: {kind}.rope.scaling.type must be none or yarn, got {scaling!r}")
    if ROPE_FACTORS in shapes:
        (place,) = (t for t in tensors if t["name"] == ROPE_FACTORS)
        config["rope_scaling"] = _llama3_of(
            path, InGguf(path, **_placed(place, {"model_type": ""}))[:], theta, H
        )
    return config


def _llama3_of(path: Path, factors: np.ndarray, theta: float, H: int) -> dict[str, Any]:
    """Llama 3's scaling as config.json has it: the file only holds what each frequency is divided by."""
    scaling = Llama3(factor=float(factors.max()), original=8192, low=1.0, high=4.0)  # of Llama 3.1 to 3.3
    expected = frequencies(theta, H) / frequencies(theta, H, scaling)
    if not np.allclose(np.ravel(factors), expected, rtol=1e-3):
        raise ValueError(f"{path}: {ROPE_FACTORS} holds factors other than those of Llama 3.1 to 3.3")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original,
    }


def _short(value: float) -> float:
    """A float32 as the decimal number that it was written as: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# --- the tokenizer ---


def _write_tokenizer(folder: Path, path: Path, fields: dict[str, Any]) -> None:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    # files from before May 2024 do not say how text is split
    usual = None if fields["general.architecture"] == "llama" else "qwen2"
    model, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", usual)
    if model != "gpt2" or split not in SPLITS:
        raise ValueError(
            f"{path}: the tokenizer must be of model gpt2 (byte-level BPE) with pre one of {', '.join(SPLITS)}, "
            f"got model {model!r} with pre {split!r}"
        )
    tokens, types, pairs = (
        _needed(path, fields, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")
    )
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in pairs]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=split == "llama-bpe"))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if SPLITS[split] is not None:
        first = pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_])
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, of in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        if ids[of] is not None:
            settings[name] = tokens[ids[of]]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
    ends = list(dict.fromkeys(i for i in (ids["eos"], ids["eot"]) if i is not None))
    write_json(folder / "generation_config.json", {"eos_token_id": ends} if ends else {})
