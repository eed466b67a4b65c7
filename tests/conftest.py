"""What every test needs, set before jax is imported.

Tests see one CPU device. Those that need eight live in `on_eight_devices.py`, which
`test_sharding.py` runs in a separate process.
"""

import os
import sys
import tempfile

import hypothesis
import pytest
from jaxtyping import install_import_hook

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set its environment")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# threads of XLA's CPU client, here and in child processes: virtual devices wait for each other
# in collectives and deadlock when there are fewer threads than devices
os.environ.setdefault("NPROC", "32")
# The suite compiles many small programs and runs each a few times: without XLA's optimisation one
# gradient of a two-layer model takes 1.1 s of CPU time to compile instead of 10.9 s.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0")

# One compile cache for the session, its xdist workers and every process that a test starts.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="grpo_jax_xla_")  # removed when the session ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# [B, T] + [T] is a mistake more often than not: the shorter one's place is written down
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# annotated shapes and dtypes are checked whenever a function of these modules is called or traced
CHECKED = ("models.attention", "models.logprobs", "models.qwen", "update.losses", "scoring.advantages")
install_import_hook([f"grpo_jax.{name}" for name in CHECKED], "beartype.beartype")

hypothesis.settings.register_profile("jax", deadline=None)  # a first call compiles
hypothesis.settings.load_profile("jax")


@pytest.fixture
def rows_file(tmp_path):
    """Writes the lines to rows.jsonl and gives its path."""

    def write(*lines: str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write
