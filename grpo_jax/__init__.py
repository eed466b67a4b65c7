"""GRPO with verifiable rewards for tool-calling Qwen models, in JAX and Flax."""

import logging
import os
import sys

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "GRPOTrainer"]  # pyright: ignore[reportUnsupportedDunderAll]

# transformers is used for tokenizers and configurations alone, and would say at every start that PyTorch is missing
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Handlers on the root logger before our own imports: dependencies add some, see `run.console.setup_logging`.
ROOT_HANDLERS = tuple(logging.getLogger().handlers)
ABSL_CAME_FIRST = "absl.logging" in sys.modules


def __getattr__(name: str):
    """The public names, imported when they are first used: a command's --help needs few of them."""
    if name == "GRPOConfig":
        from grpo_jax.run.options import GRPOConfig

        return GRPOConfig
    if name == "GRPOTrainer":
        from grpo_jax.trainer import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
