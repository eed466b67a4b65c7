"""GRPO with verifiable rewards for tool-calling Qwen models, in JAX and Flax."""

__version__ = "0.1.0"
