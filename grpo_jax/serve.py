"""An OpenAI-compatible server for trying a model and its tools: `python -m grpo_jax.serve`."""

from __future__ import annotations

import argparse
import logging
import socket
import sys

from grpo_jax.run.chat import open_chat
from grpo_jax.run.command import run_command
from grpo_jax.run.config import ResolvedConfig
from grpo_jax.run.console import Console, note_dependencies

GRACE = 10  # seconds that a running answer, which stops at its next few tokens, has to end
LOCAL = ("127.0.0.1", "localhost", "::1")
IN_URLS = ("127.0.0.1", "localhost", "[::1]")  # what a browser or client calls these hosts


def run(resolved: ResolvedConfig, console: Console, host: str, port: int) -> None:
    """Open the model and answer requests until the process is interrupted."""
    try:
        import uvicorn

        from grpo_jax.run.openai_api import make_app
    except ModuleNotFoundError as error:
        raise ValueError(f'serve needs the package {error.name}: pip install -e ".[serve]"') from None
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))  # before the model is loaded; it listens afterwards
        except (OSError, OverflowError) as error:
            raise ValueError(f"--host {host} --port {port} cannot be used ({error}); give others") from None
        with open_chat("serve", resolved, console) as (job, chat, sampling):
            name = resolved.config.as_given()["model_name_or_path"]
            named = IN_URLS if host in LOCAL else ["*"]
            app = make_app(job, chat, sampling, name, named, stopping=lambda: server.should_exit)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
            server = uvicorn.Server(config)
            logging.getLogger("uvicorn.access").setLevel(logging.INFO)
            url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
            console.line(f"Serving {url} without authentication; Ctrl-C ends it")
            server.run([listener])


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    flags = argparse.ArgumentParser("python -m grpo_jax.serve", add_help=False, allow_abbrev=False)
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=8000)
    own, rest = flags.parse_known_args(argv)
    if argv is None:
        note_dependencies()
    return run_command(
        "serve",
        "Answer OpenAI clients with a model and its tools: --host 127.0.0.1 --port 8000.",
        lambda resolved, console: run(resolved, console, own.host, own.port),
        rest,
    )


if __name__ == "__main__":
    sys.exit(main())
