"""What every test needs, set before jax is imported."""

import os
import sys

import pytest
from jaxtyping import install_import_hook

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set its environment")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite compiles many small programs and runs each a few times: without XLA's optimisation one
# gradient of a two-layer model takes 1.1 s to compile, not 10.9 s (CPU time).
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0")

# every annotated shape and dtype is checked whenever one of these functions is called or traced
ARRAY_MODULES = ["attention", "logprobs", "models.qwen", "losses", "advantages"]
install_import_hook([f"grpo_jax.{name}" for name in ARRAY_MODULES], "beartype.beartype")
