"""The options of a run: what they are (`options`) and how they are read (`command_line`)."""

from grpo_jax.config.command_line import ResolvedConfig, parse_config, print_config, write_resolved
from grpo_jax.config.options import Config

__all__ = ["Config", "ResolvedConfig", "parse_config", "print_config", "write_resolved"]
