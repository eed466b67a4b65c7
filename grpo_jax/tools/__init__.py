"""The tool layer: loading, schemas, argument checks, and running tools so that nothing they do hurts."""

from grpo_jax.tools.arguments import check_arguments
from grpo_jax.tools.call import run_tool
from grpo_jax.tools.load import Toolbox, load_tools
from grpo_jax.tools.schema import get_schema, signature_line

__all__ = [
    "ToolRunner",
    "Toolbox",
    "check_arguments",
    "get_schema",
    "load_tools",
    "run_tool",
    "signature_line",
]


def __getattr__(name: str):
    # ToolRunner's result types bring jax with them; the worker program imports this package and must not pay that.
    if name == "ToolRunner":
        from grpo_jax.tools.runner import ToolRunner

        return ToolRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
