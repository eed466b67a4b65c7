"""Loads a checkpoint of Qwen2.5-0.5B's exact shapes and measures the host memory that it takes.

    python benchmarks/load.py
    python benchmarks/load.py --stored float32 --dtype bfloat16

The weights are random and written to a temporary folder first. What counts is the memory of the
process beyond what it held before and beyond the weights themselves, at its highest, in units of
the largest tensor of the file: the embedding. Linux only (/proc). On a CPU the weights lie in the
same memory as what is measured; on an accelerator they do not, and nothing is taken off for them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from grpo_jax.models.hf import entries, load_params, read_config, stored_tensors
from grpo_jax.models.qwen import ModelConfig, abstract_params
from grpo_jax.models.sharding import Layout, make_mesh

QWEN25_HALF_B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


def write_checkpoint(folder: Path, dtype: str) -> None:
    """Random weights of the published shapes in one safetensors file."""
    rng = np.random.default_rng(0)
    tensors = {}
    for entry in jax.tree.leaves(entries(ModelConfig.from_hf(QWEN25_HALF_B))):
        for name in entry.names():
            tensors[name] = rng.standard_normal(entry.hf_shape, np.float32).astype(jnp.dtype(dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(QWEN25_HALF_B))


class HostMemory:
    """A context that samples this process's resident memory, in bytes, every millisecond."""

    def __enter__(self) -> HostMemory:
        self.before = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    """Print the seconds, the bytes and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    types = ("float32", "bfloat16", "float16")
    parser.add_argument("--stored", choices=types, default="bfloat16", help="type in the file")
    parser.add_argument("--dtype", choices=types, default="float32", help="type of the loaded weights")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(folder, args.stored)
        )
        writer.start()  # in a separate process: memory that it frees would be reused, unseen
        writer.join()
        cfg = read_config(folder)
        shardings = Layout(make_mesh()).params(abstract_params(cfg))
        jnp.zeros(1).block_until_ready()  # the backend's own memory
        with HostMemory() as memory:
            began = time.perf_counter()
            params = jax.block_until_ready(load_params(folder, cfg, shardings, jnp.dtype(args.dtype)))
            seconds = time.perf_counter() - began
        report(params, memory, seconds, dict(stored_tensors(folder)), args.stored)


def report(params, memory: HostMemory, seconds: float, tensors: dict, stored: str) -> None:
    """Print what was measured."""
    leaves = jax.tree.leaves(params)
    on_host = sum(x.nbytes for x in leaves) if jax.default_backend() == "cpu" else 0
    above = memory.peak - memory.before - on_host
    size, name = max((np.prod(x.shape) * jnp.dtype(x.dtype).itemsize, name) for name, x in tensors.items())
    print(
        f"Loaded {sum(x.size for x in leaves):,} parameters, {stored} to {leaves[0].dtype}, in {seconds:.1f} s\n"
        f"final {sum(x.nbytes for x in leaves) / 1e6:.0f} MB on {jax.default_backend()}, peak of the process "
        f"{(memory.peak - memory.before) / 1e6:.0f} MB above its start\n"
        f"host memory above the final arrays {above / 1e6:.0f} MB; largest tensor {name} {size / 1e6:.0f} MB\n"
        f"ratio {above / size:.2f}"
    )


if __name__ == "__main__":
    main()
