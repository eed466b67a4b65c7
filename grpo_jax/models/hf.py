"""HF safetensors ↔ params: one table of names, read both ways, straight into shards.

Only safetensors is read, and GGUF (see `gguf`): no pickle, no remote code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from grpo_jax.files import cannot_write, save_tensors, writing
from grpo_jax.models import gguf
from grpo_jax.models.cache import write_json
from grpo_jax.models.qwen import ModelConfig, Params, abstract_params, check_params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WITH_WEIGHTS = (".json", ".txt", ".jinja")  # config, tokenizer, chat template
TEXT_FILES = [f"*{ending}" for ending in WITH_WEIGHTS]

# path in params -> (HF name, layout). Layouts of an HF matrix [out, in]:
#   "as is"; "in_out" [in, out]; "in_heads" [in, heads, H]; "heads_in" (o_proj) [heads, H, out]; "heads" (bias).
TABLE = {
    "embedding": (EMBEDDING, "as is"),
    "head": (HEAD, "as is"),
    "norm/scale": ("model.norm.weight", "as is"),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", "as is"),
    "layers/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "as is"),
    "layers/attention/q": ("model.layers.{}.self_attn.q_proj.weight", "in_heads"),
    "layers/attention/k": ("model.layers.{}.self_attn.k_proj.weight", "in_heads"),
    "layers/attention/v": ("model.layers.{}.self_attn.v_proj.weight", "in_heads"),
    "layers/attention/o": ("model.layers.{}.self_attn.o_proj.weight", "heads_in"),
    "layers/attention/q_bias": ("model.layers.{}.self_attn.q_proj.bias", "heads"),
    "layers/attention/k_bias": ("model.layers.{}.self_attn.k_proj.bias", "heads"),
    "layers/attention/v_bias": ("model.layers.{}.self_attn.v_proj.bias", "heads"),
    "layers/attention/q_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", "as is"),
    "layers/attention/k_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", "as is"),
    "layers/mlp/gate": ("model.layers.{}.mlp.gate_proj.weight", "in_out"),
    "layers/mlp/up": ("model.layers.{}.mlp.up_proj.weight", "in_out"),
    "layers/mlp/down": ("model.layers.{}.mlp.down_proj.weight", "in_out"),
}


STORED_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; an index maps it into memory for as long as the result is used.

    Each read maps the file anew, because one map of the whole file, as safetensors keeps it, holds on to
    every page that was ever read.
    """

    path: Path
    dtype: Any
    shape: tuple[int, ...]
    offset: int

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[index]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of params and where it lives in an HF checkpoint.

    Args:
        name: HF name, with {} for the layer when stacked.
        shape: of our leaf, [L, …] when stacked.
    """

    name: str
    layout: str
    shape: tuple[int, ...]
    stacked: bool

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape without the layer dimension."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of what one HF tensor fills: the leaf, or one layer of it."""
        return (1, *self.inner) if self.stacked else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of one HF tensor."""
        s = self.inner
        return {
            "as is": s,
            "in_out": s[::-1],
            "in_heads": (int(np.prod(s[1:])), s[0]),
            "heads_in": (s[-1], int(np.prod(s[:-1]))),
            "heads": (int(np.prod(s)),),
        }[self.layout]

    def names(self) -> list[str]:
        """The HF tensors behind this leaf."""
        return [self.name.format(i) for i in range(self.shape[0])] if self.stacked else [self.name]

    def read(self, tensor: Stored | gguf.InGguf, index: tuple[slice, ...]) -> np.ndarray:
        """What an HF tensor fills (see `part`), at an index of it, as a view of the file."""
        return self._read(tensor, index[1:])[None] if self.stacked else self._read(tensor, index)

    def _read(self, tensor: Stored | gguf.InGguf, index: tuple[slice, ...]) -> np.ndarray:
        if self.layout in ("as is", "in_out"):
            part = tensor[index if self.layout == "as is" else index[::-1]]
            return part if self.layout == "as is" else part.T
        H = self.inner[-1] if self.layout != "heads_in" else self.inner[1]
        at = {"in_heads": 1, "heads_in": 0, "heads": 0}[self.layout]
        heads = range(self.inner[at])[index[at]]
        wide = slice(heads.start * H, heads.stop * H)  # heads are sharded whole, never H itself
        if self.layout == "heads":
            return tensor[wide].reshape(-1, H)
        if self.layout == "in_heads":
            return tensor[wide, index[0]].T.reshape(-1, len(heads), H)
        return tensor[index[2], wide].T.reshape(len(heads), H, -1)

    def write(self, value: np.ndarray) -> np.ndarray:
        """One layer's HF tensor from our leaf."""
        if self.layout == "as is":
            return value
        return {
            "in_out": lambda: value.T,
            "in_heads": lambda: value.reshape(value.shape[0], -1).T,
            "heads_in": lambda: value.reshape(-1, value.shape[-1]).T,
            "heads": lambda: value.reshape(-1),
        }[self.layout]()


def entries(cfg: ModelConfig) -> Params:
    """The table for one model: a tree like params, of `Entry`."""

    def entry(path, leaf):
        key = "/".join(k.key for k in path)
        return Entry(*TABLE[key], leaf.shape, key.startswith("layers/"))

    return jax.tree_util.tree_map_with_path(entry, abstract_params(cfg))


def fetch_model(name_or_path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """A local folder for a model: the folder itself, or a hub snapshot (cached, usable offline).

    Args:
        name_or_path: a folder, a GGUF file or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: it is a file other than GGUF, or one that cannot be used.
        FileNotFoundError: no such folder, or the hub cannot be reached and nothing is cached.
    """
    if name_or_path.endswith(".gguf") and Path(name_or_path).is_file():
        return gguf.gguf_folder(Path(name_or_path))
    return _fetch("model", name_or_path, revision, [*TEXT_FILES, *["*.safetensors"] * weights])


def fetch_tokenizer(name_or_path: str) -> Path:
    """A local folder for a tokenizer; as `fetch_model`, without weights.

    transformers would request each file that may exist, six times each: 55 s where no hub answers.
    """
    return _fetch("tokenizer", name_or_path, None, TEXT_FILES)


def _fetch(kind: str, name: str, revision: str | None, wanted: list[str]) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            f"{kind} {name} is a file; name the folder that holds it with its config and tokenizer (an HF folder "
            "with safetensors; of single files only a model's .gguf is read)"
        )
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{kind} folder {name} does not exist. {_alternatives()}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{kind} {name} is not a local folder, is not in the hub cache, and could not be downloaded "
            f"({type(error).__name__}). {_alternatives()}"
        ) from error


def _alternatives() -> str:
    # a run's own model is three levels down: runs/NAME/model
    configs = [path for depth in ("*", "*/*", "*/*/*") for path in Path().glob(f"{depth}/config.json")]
    found = sorted(str(p.parent) for p in configs if list(p.parent.glob("*.safetensors")))
    return (
        "Give the path of a local HF folder, or to train, 'scratch' for a small model made on the spot; "
        f"folders here that hold a model: {', '.join(found[:5]) or 'none'}"
    )


def read_config(folder: Path) -> ModelConfig:
    """The model's sizes from `config.json`.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: it is not JSON, or of an unsupported model; see `ModelConfig.from_hf`.
    """
    path = _need(folder, "config.json")
    return ModelConfig.from_hf(read_json_object(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder.

    Raises:
        ValueError: it is not JSON, or not an object; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {str(value)[:80]}; download it again")
    return value


def load_params(folder: Path, cfg: ModelConfig, shardings: Params, dtype: DTypeLike = np.float32) -> Params:
    """Read a checkpoint tensor by tensor into its shards.

    A tensor goes to its devices as the file holds it and is cast there, a layer of a stacked leaf
    into its place in the stack: beyond the result the host holds one tensor, never a stack.

    Args:
        folder: holds safetensors, one file or several with an index.
        shardings: a tree like params.
        dtype: what the file's tensors are cast to.

    Raises:
        FileNotFoundError: a weight file is missing.
        ValueError: a tensor is missing, unknown or misshapen, or a file is truncated; names it.
    """
    tensors, table = dict(stored_tensors(folder)), entries(cfg)
    _check_tensors(folder, tensors, table)

    def load(entry: Entry, sharding):
        leaf = None
        for i, name in enumerate(entry.names()):
            read: Any = functools.partial(entry.read, tensors[name])
            part = jax.make_array_from_callback(entry.part, sharding, read)
            if leaf is None:  # only now, when the pages of the first part are free again
                leaf = jnp.zeros(entry.shape, dtype, device=sharding)
            leaf = _put(leaf, part, i).block_until_ready()  # else reading runs ahead of the devices
        return leaf

    return jax.tree.map(load, table, shardings, is_leaf=lambda x: isinstance(x, Entry))


@functools.partial(jax.jit, donate_argnums=0)
def _put(leaf, part, i):
    return jax.lax.dynamic_update_slice_in_dim(leaf, part.astype(leaf.dtype), i, 0)


def save_model(
    folder: Path, params: Params, cfg: ModelConfig, source: Path, max_shard_size: str = "5GB"
) -> None:
    """Write an HF folder: safetensors, and the source's config and tokenizer files byte for byte.

    Written to a temporary folder next to it and renamed, so that a folder of that name is whole.
    Tensors have the source's types where these hold the weights exactly, as those of an untrained
    run: its tensors are the source's bit for bit. Else they have the type of `params`, and the type
    that config.json names is changed to it.

    Args:
        folder: replaced when it exists.
        params: stacked, on one host or several devices.
        source: the folder that the model was loaded from.

    Raises:
        OutputError: it cannot be written; what was there before stays.
    """
    check_params(cfg, params)
    tensors = {}
    for entry, value in zip(jax.tree.leaves(entries(cfg)), jax.tree.leaves(params), strict=True):
        value = np.asarray(value)
        for i, name in enumerate(entry.names()):
            tensors[name] = np.ascontiguousarray(entry.write(value[i] if entry.stacked else value))
    exact = _in_types_of(source, tensors)
    with whole_folder(folder) as part:
        for file in source.iterdir():
            if file.is_file() and file.suffix in WITH_WEIGHTS and file.name not in (INDEX, gguf.TENSORS):
                shutil.copyfile(file, part / file.name)
        if exact is None:
            config, dtype = read_json_object(part / "config.json"), jax.tree.leaves(params)[0].dtype.name
            if named := {key: dtype for key in ("dtype", "torch_dtype") if key in config}:
                write_json(part / "config.json", config | named)
        written = exact or tensors
        plan = split_state_dict_into_shards_factory(
            written,
            get_storage_size=lambda x: x.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        for file, names in plan.filename_to_tensors.items():
            save_tensors({name: written[name] for name in names}, part / file)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (part / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A block that fills a temporary folder, which then takes the place of `folder`, or is removed.

    Only a folder that holds nothing but a model is replaced as a whole. Of another, such as a run's, the new files
    take their places one by one, and what else is there stays, except for earlier weights under other names.

    Raises:
        ValueError: the folder is a file.
        OutputError: something in the block, or the folder, cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the model")
    part, aside = (folder.with_name(f".{folder.name}{end}") for end in (".tmp", ".old"))
    with writing(folder):
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
            new = {file.name for file in part.iterdir()}
            there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            others = there - new - {"README.md", INDEX}
            # more than a model is in it, whose weights may have had other names
            if any(not re.fullmatch(r"(adapter_)?model.*\.safetensors", name) for name in others):
                for name in sorted(new):
                    os.replace(part / name, folder / name)
                if any(name.startswith("model") for name in new):  # not an adapter
                    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
                        if old.name not in new:
                            old.unlink(missing_ok=True)
                return
            shutil.rmtree(aside, ignore_errors=True)
            if folder.exists():
                folder.rename(aside)  # at no moment is there neither the old nor the new
            part.rename(folder)
            shutil.rmtree(aside, ignore_errors=True)
        except SafetensorError as error:  # it has no specific error for a full disk
            raise cannot_write(folder, str(error)) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _in_types_of(source: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The tensors in the types that they have in a folder; None if that is not known or loses a bit."""
    try:
        types = {name: np.dtype(stored.dtype) for name, stored in stored_tensors(source)}
    except (FileNotFoundError, ValueError):  # it was moved or damaged since; the weights here are whole
        return None
    exact = {}
    for name, x in tensors.items():
        if name not in types:  # another model lies there by now
            return None
        exact[name] = x.astype(types[name])
        if types[name].itemsize > x.itemsize or not np.array_equal(exact[name].astype(x.dtype), x):
            return None
    return exact


def stored_tensors(folder: Path) -> Iterator[tuple[str, Stored | gguf.InGguf]]:
    """Name and place of every tensor of an HF folder.

    Raises:
        FileNotFoundError: a weight file is missing.
        ValueError: a file is truncated, or holds a tensor of a type other than float32, float16 and bfloat16.
    """
    if (folder / gguf.TENSORS).exists():
        yield from gguf.tensors_of(folder)
        return
    if (folder / INDEX).exists():
        files = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{folder / INDEX}: weight_map must name each tensor's file; download it again")
        names = sorted(set(files.values()))
    else:
        names = [WEIGHTS]
    for name in names:
        path = _need(folder, name)
        for key, entry in _header(path).items():
            if entry["dtype"] not in STORED_TYPES:
                raise ValueError(
                    f"{path}: the tensor {key} must be stored as one of {', '.join(STORED_TYPES)}, "
                    f"got {entry['dtype']}"
                )
            yield key, Stored(path, STORED_TYPES[entry["dtype"]], tuple(entry["shape"]), entry["at"])


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Of each tensor its `dtype`, its `shape` and the byte `at` which it begins."""
    try:
        with safe_open(path, framework="np"):  # checks all of the header, and the file's length
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {key: x | {"at": 8 + size + x["data_offsets"][0]} for key, x in header.items()}


def _check_tensors(folder: Path, tensors: dict[str, Stored | gguf.InGguf], table: Params) -> None:
    want = {name: e.hf_shape for e in jax.tree.leaves(table) for name in e.names()}
    unknown = tensors.keys() - want.keys() - {HEAD}  # some tied checkpoints store it twice
    for name in sorted(want.keys() - tensors.keys()):
        raise ValueError(f"{folder}: the tensor {name} {want[name]} is missing")
    for name in sorted(unknown):
        raise ValueError(f"{folder}: the tensor {name} is not part of this architecture")
    for name, shape in want.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{folder}: the tensor {name} must have shape {shape}, got {tensors[name].shape}"
            )
    if HEAD in tensors and HEAD not in want:
        head, rows = tensors[HEAD][:], tensors[EMBEDDING][:]
        at_once = 4096  # rows, so that the comparison holds little
        parts = (slice(i, i + at_once) for i in range(0, len(rows), at_once))
        if head.shape != rows.shape or not all(np.array_equal(head[part], rows[part]) for part in parts):
            raise ValueError(
                f"{folder}: {HEAD} differs from {EMBEDDING}, but config.json says that they are one; set "
                "tie_word_embeddings to false there"
            )


def _need(folder: Path, name: str) -> Path:
    path = Path(folder) / name
    if path.exists():
        return path
    pickled = sorted(p.name for p in Path(folder).glob("*") if p.suffix in (".bin", ".pt", ".pth"))
    if name == WEIGHTS and pickled:
        raise FileNotFoundError(
            f"model folder {folder} lacks {name}; {pickled[0]} is a pickle, which is not read: load it in "
            "transformers and write it with save_pretrained, which makes safetensors"
        )
    if name == WEIGHTS and any(Path(folder).glob("model-*-of-*.safetensors")):
        name = INDEX
    raise FileNotFoundError(f"model folder {folder} lacks {name}; copy it from the model's repository")
