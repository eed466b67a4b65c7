"""What `--plan` reads first: the machine's text, the model's sizes, the data's lengths.

Nothing here loads weights, reaches for the network or starts a jax backend.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache

from grpo_jax.models import hf
from grpo_jax.models.cost import Rates
from grpo_jax.models.qwen import ModelConfig
from grpo_jax.rollout.conversation import load_conversation
from grpo_jax.run.inputs import templated
from grpo_jax.run.job import encoded, read_examples, schemas_of
from grpo_jax.run.options import GRPOConfig
from grpo_jax.tools import load_tools
from grpo_jax.update.batch import common_prefix

CHARACTERS_PER_TOKEN = 3.5  # of English and JSON under Qwen's tokenizer, about
CPU_CORE_FLOPS, CPU_BYTES = 32e9, 20e9  # float32 with AVX2, one socket's memory


# published figures of one device: bytes of memory; FLOP/s of bfloat16 products, bytes/s
DEVICES = {
    "v4": (32 * 2**30, Rates(275e12, 1228e9)),
    "v5e": (16 * 2**30, Rates(197e12, 819e9)),
    "v5p": (95 * 2**30, Rates(459e12, 2765e9)),
    "v6e": (32 * 2**30, Rates(918e12, 1640e9)),
    "h100": (80e9, Rates(989e12, 3350e9)),
    "h200": (141e9, Rates(989e12, 4800e9)),
}
GPUS = ("h100", "h200")
CORES_A_DEVICE = {"v4": 2, "v5p": 2}  # these names count cores, of which jax sees two as one device
GPU_SHARE = "XLA_CLIENT_MEM_FRACTION"  # jax reads it, and an older name of it
_UNITS = {"": 1, "mb": 1e6, "gb": 1e9, "tb": 1e12, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class Machine(NamedTuple):
    """The devices of a plan, as jax sees them.

    Args:
        memory: bytes of one device.
        rates: peak rates of one device; None where only the memory was given.
    """

    name: str
    count: int
    memory: float
    rates: Rates | None = None

    @property
    def kind(self) -> str:
        """A name in `DEVICES`, "cpu" for this computer's own processor, or neither."""
        return self.name.split("-")[0]

    @property
    def taken(self) -> float:
        """Bytes of a device that jax takes: of a GPU the share that the environment asks for, or 75 %."""
        return self.memory * (gpu_share() if self.kind in GPUS else 1)


def gpu_share() -> float:
    """What jax takes of a GPU's memory at its start, as a share of it.

    Raises:
        ValueError: the variable is no share.
    """
    text = os.environ.get(GPU_SHARE) or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    if not re.fullmatch(r"0?\.\d+|1(\.0*)?", text):
        raise ValueError(f"{GPU_SHARE} must be a share of the memory in (0, 1], got {text!r}")
    return float(text)


def read_machine(text: str) -> Machine:
    """The machine of a text: `v5e-8`, `h200`, `cpu`, or `80GB x 8`.

    Raises:
        ValueError: it is none of these; lists the known machines.
    """
    plain = text.strip().lower()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([mgt]i?b|)\s*[x×*]\s*([1-9]\d*)", plain):
        return Machine(text, int(match[3]), float(match[1]) * _UNITS[match[2]])
    if match := re.fullmatch(r"([a-z]\w*)(?:-([1-9]\d*))?", plain):
        cores = CORES_A_DEVICE.get(match[1], 1)
        count = int(match[2] or cores)
        if match[1] == "cpu":
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            rates = Rates(CPU_CORE_FLOPS * (os.cpu_count() or 1) / count, CPU_BYTES / count)
            return Machine(plain, count, memory / count, rates)
        if match[1] in DEVICES and count % cores == 0:
            return Machine(plain, count // cores, *DEVICES[match[1]])
    raise ValueError(
        f"plan must be one of {', '.join(DEVICES)} or cpu, with -N for more (v5e-8; v4 and v5p count two cores a "
        f"device, v5p-64 is 32 devices), or BYTES x DEVICES as '80GB x 8', got {text!r}"
    )


PUBLISHED = {  # model_type, V, D, F, L, N, K, H, rope_theta, norm_eps, tied
    "Qwen2.5-0.5B": ModelConfig("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 1e6, 1e-6, True),
    "Qwen2.5-1.5B": ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, 1e6, 1e-6, True),
    "Qwen2.5-3B": ModelConfig("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, 1e6, 1e-6, True),
    "Qwen2.5-7B": ModelConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 1e6, 1e-6, False),
    "Qwen3-0.6B": ModelConfig("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, 1e6, 1e-6, True),
    "Qwen3-1.7B": ModelConfig("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, 1e6, 1e-6, True),
    "Qwen3-4B": ModelConfig("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 1e6, 1e-6, True),
    "Qwen3-8B": ModelConfig("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, 1e6, 1e-6, False),
}
SCRATCH_SIZES = ModelConfig("qwen3", 700, 128, 384, 4, 4, 2, 32, 1e3, 1e-6, True)  # make_tiny_checkpoint's


def model_sizes(config: GRPOConfig) -> tuple[ModelConfig, Path | None]:
    """The model's sizes, and its local folder if there is one.

    Raises:
        ValueError: neither a folder, nor in the hub cache, nor a published size known here.
    """
    name = config.required("model_name_or_path")
    if name == "scratch":
        return SCRATCH_SIZES, None
    folder = hf.fetch_model(name) if Path(name).exists() else _cached(name, config.model_revision)
    if folder is not None:
        return hf.read_config(folder), folder
    size = re.sub(r"-(Instruct|Base)$", "", name.removeprefix("Qwen/"))
    if name.startswith("Qwen/") and size in PUBLISHED:
        return PUBLISHED[size], None
    raise ValueError(
        f"the sizes of model {name!r} are not known here: give a local folder with its config.json, or one of "
        f"{', '.join(f'Qwen/{known}' for known in PUBLISHED)}"
    )


def _cached(name: str, revision: str, file: str = "config.json") -> Path | None:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return None
    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


class DataLengths(NamedTuple):
    """Rows of a data set, and tokens of the preamble and of the longest rest of a prompt but its last.

    `exact`: counted by the model's tokenizer, not estimated from characters.
    """

    rows: int
    preamble: int
    rest: int
    exact: bool


def data_lengths(config: GRPOConfig, folder: Path | None) -> DataLengths:
    """Read the data and the tools, and count or estimate the tokens of the prompts.

    Args:
        folder: the model's, if there is one.
    """
    toolbox = load_tools(config.tools_script, config.tool_functions_module)
    examples = read_examples(config, config.required("dataset_id_or_path"))
    name, per_token = config.tokenizer_name_or_path, 1.0
    if name is not None:
        folder = Path(name) if Path(name).is_dir() else _cached(name, "main", "tokenizer.json")
    if folder is not None and (folder / "tokenizer.json").exists():
        folder = templated(folder, config.chat_template)
        conversation = load_conversation(folder, chat_template_kwargs=config.chat_template_kwargs)
        prompts = [prompt.ids for prompt in encoded(examples, toolbox, conversation)]
    else:  # about what a template renders: system message, schemas, the other messages
        prompts, per_token = [], CHARACTERS_PER_TOKEN
        for example in examples:
            texts = [str(m.get("content") or "") for m in example.messages]
            first = int(example.messages[0]["role"] == "system")
            schemas = [json.dumps(schema) for schema in schemas_of(example, toolbox)]
            prompts.append("\n".join(texts[:first] + schemas + texts[first:]))
    if config.max_prompt_length is not None:
        prompts = [p for p in prompts if len(p) / per_token <= config.max_prompt_length]
        if not prompts:
            raise ValueError(
                f"every prompt is longer than max_prompt_length {config.max_prompt_length}; raise it"
            )
    preamble = len(common_prefix(prompts))
    rest = max(map(len, prompts)) - preamble
    tokens = math.ceil(preamble / per_token), math.ceil(rest / per_token) - 1
    return DataLengths(len(prompts), *tokens, per_token == 1)
