"""GRPO with verifiable rewards for tool-calling Qwen models, in JAX and Flax."""

__version__ = "0.1.0"
__all__ = ["GRPOConfig"]


def __getattr__(name: str):
    """The public names, imported when they are first used: a command's --help needs few of them."""
    if name == "GRPOConfig":
        from grpo_jax.run.options import GRPOConfig

        return GRPOConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
