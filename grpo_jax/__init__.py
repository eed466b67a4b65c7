"""GRPO with verifiable rewards for tool-calling Qwen models, in JAX and Flax."""

import logging
import sys

__version__ = "0.1.0"

# Handlers on the root logger before our own imports: dependencies add some, see `run.console.setup_logging`.
ROOT_HANDLERS = tuple(logging.getLogger().handlers)
ABSL_CAME_FIRST = "absl.logging" in sys.modules
