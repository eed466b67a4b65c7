"""The tool layer: loading, schemas, argument checks, and running tools in isolation."""

from grpo_jax.tools.arguments import check_arguments
from grpo_jax.tools.call import run_tool
from grpo_jax.tools.isolation import Isolation
from grpo_jax.tools.load import Toolbox, final_tools, load_tools, tools_of
from grpo_jax.tools.runner import Limits, PurityCheck, ToolRunner
from grpo_jax.tools.schema import get_schema, signature_line

__all__ = [
    "Isolation",
    "Limits",
    "PurityCheck",
    "ToolRunner",
    "Toolbox",
    "check_arguments",
    "final_tools",
    "get_schema",
    "load_tools",
    "run_tool",
    "signature_line",
    "tools_of",
]
