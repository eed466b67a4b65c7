"""The commands under one name: `grpo-jax COMMAND …`, or `python -m grpo_jax COMMAND …`."""

from __future__ import annotations

import importlib
import os
import sys

COMMANDS = {
    "train": "Train a model with GRPO to call your Python functions.",
    "sft": "Fine-tune a model on gold calls.",
    "evaluate": "Evaluate a model folder or a checkpoint.",
    "export": "Write a checkpoint as a Hugging Face folder.",
    "report": "Write a run's curves and conversations to report.html.",
    "chat": "Talk to a model that calls your Python functions.",
    "serve": "Answer OpenAI clients with a model and its tools: --host 127.0.0.1 --port 8000.",
}
OF_OPTIONS = ("train", "sft", "evaluate", "chat", "serve")  # which take every option; their help needs no jax
_LIST = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
USAGE = f"""\
usage: grpo-jax COMMAND [--option value ...]

commands:
{_LIST}

grpo-jax COMMAND --help lists the options of a command."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    from_shell = argv is None
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        from grpo_jax.text import nearest

        close = nearest(name, COMMANDS, cutoff=0.6)
        print(f"Error: no command {name!r}; {f'nearest: {close[0]}' if close else USAGE}", file=sys.stderr)
        return 2
    if name in OF_OPTIONS and {"-h", "--help"} & set(rest):
        from grpo_jax.run.config import parse_config

        default = "configs/default.yaml" if name == "train" else None
        parse_config(rest, prog=f"grpo-jax {name}", default_config=default, description=COMMANDS[name])
    # A console script, unlike python -m, does not look for modules (tool_functions_module) in the folder it runs in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    command = importlib.import_module(f"grpo_jax.{name}").main
    if not from_shell:
        return command(rest)
    sys.argv[1:] = rest  # as python -m gives them: the command then knows that no user code has run before it
    return command()


if __name__ == "__main__":
    sys.exit(main())
