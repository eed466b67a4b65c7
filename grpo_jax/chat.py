"""Talk to a model that calls your Python functions: `python -m grpo_jax.chat`.

In a terminal: text as it is sampled, calls with their results. From or into a pipe: one JSON object a line, each way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_jax.data.rows import read_prompt
from grpo_jax.rollout.chat import Called, Chat, Malformed, Piece, Reply
from grpo_jax.run.chat import open_chat
from grpo_jax.run.command import run_command
from grpo_jax.run.config import ResolvedConfig
from grpo_jax.run.console import Console
from grpo_jax.run.job import Job
from grpo_jax.run.stopping import StopSignal, Terminated
from grpo_jax.text import nearest, shorten
from grpo_jax.tools import signature_line
from grpo_jax.types import Message, Status

HISTORY = Path("~/.cache/grpo_jax/chat_history")  # what was typed, for the arrow keys
COMMANDS = {
    "/tools": "the functions that the model may call",
    "/history": "the conversation so far",
    "/reset": "begin a new conversation",
    "/help": "this list",
    "/quit": "quit, like Ctrl-D; Ctrl-C stops an answer",
}
RESULT_CHARACTERS = 2000  # of a tool's result, on the terminal
WHY: dict[str, str] = {
    Status.OVERLONG: "the answer reached max_grpo_completion_length",
    Status.OVERLONG_TOOL_RESPONSE: "the tool's result did not fit max_grpo_completion_length",
    Status.TOOL_LIMIT: "max_tool_calling_iterations was reached",
    Status.MALFORMED_CALL: "its call does not parse",
}


def run(resolved: ResolvedConfig, console: Console) -> int | None:
    """Open the model and talk until the input ends; nothing is written but what is said."""
    with open_chat("chat", resolved, console) as (job, chat, _):
        return talk(job, chat) if _at_terminal() else answer_lines(chat)


# --- a terminal ---


def talk(job: Job, chat: Chat) -> None:
    """Read a person's lines and answer each."""
    console = job.console
    console.line("Type a message; /help lists the commands.")
    with _typed_before():
        while True:
            try:
                text = input("\n> ").strip()
                if text == "/quit":
                    return
                if text.startswith("/"):
                    _obey(job, chat, text)
                elif text:
                    with StopSignal() as stop:
                        _show(console, chat, text, lambda stop=stop: stop.requested)
                    if stop.hurry:
                        raise Terminated
            except ValueError as error:
                console.line(f"Error: {error}")
            except EOFError:
                return console.line("")
            except Terminated:
                raise
            except KeyboardInterrupt:
                console.line("")


def _show(console: Console, chat: Chat, text: str, stop: Callable[[], bool]) -> None:
    """Print an answer as it comes."""
    line = console.line
    for event in chat.say(text, stop):
        if isinstance(event, Piece):
            console.write(event.text.lstrip("\n") if console.at_start else event.text)
        elif isinstance(event, Called):
            call, result = event.call, event.result
            arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
            line(f"→ {call.name}({arguments})", "cyan")
            line(f"← {shorten(result.text, RESULT_CHARACTERS)}", "green" if result.outcome == "ok" else "red")
        elif isinstance(event, Malformed):
            line(f"The call does not parse: {event.reason}", "red")
        elif isinstance(event, Reply):
            ended = f": {WHY[event.status]}" if event.status in WHY else ""
            line(f"[{event.status}{ended}; {event.tokens} tokens]", "dim")


def _obey(job: Job, chat: Chat, command: str) -> None:
    line = job.console.line
    if command == "/tools":
        for function in job.toolbox.functions.values():
            line(f"{signature_line(function)}\n    {(inspect.getdoc(function) or '').splitlines()[0]}")
    elif command == "/history":
        for message in chat.messages:
            line(json.dumps(message, ensure_ascii=False))
    elif command == "/reset":
        chat.reset()
        line("A new conversation.")
    elif command == "/help":
        for name, what in COMMANDS.items():
            line(f"{name:<10}{what}")
    else:
        close = nearest(command, COMMANDS, cutoff=0.6)
        line(
            f"No command {command}; {f'nearest: {close[0]}' if close else 'there are ' + ', '.join(COMMANDS)}"
        )


@contextlib.contextmanager
def _typed_before() -> Iterator[None]:
    """Line editing, with what was typed in earlier conversations where Python has readline."""
    try:
        import readline
    except ImportError:  # not on every system
        yield
        return
    path = HISTORY.expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)


# --- a pipe ---


def answer_lines(chat: Chat) -> int:
    """Answer each line of standard input with one of standard output; 1 when a line was no question.

    A line is {"prompt": text}, which continues the conversation unless "reset" is true, or {"prompt": messages},
    which begins a new one; other columns are left alone. The answer: {"messages", "status", "tokens"}, or {"error"}.
    """
    failed = False
    for line in sys.stdin.buffer:
        if not line.strip():
            continue
        try:
            prompt = _question(line, chat)
            reply = list(chat.say(prompt))[-1]
            said: dict[str, Any] = dataclasses.asdict(reply)
        except ValueError as error:
            said, failed = {"error": str(error)}, True
        answer = json.dumps(said, ensure_ascii=False)
        try:
            answer.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:  # half a surrogate pair, or an output that is not UTF-8
            answer = json.dumps(said)
        try:
            print(answer, flush=True)
        except BrokenPipeError:  # nobody reads on, as with `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
            break
    return int(failed)


def _question(given: bytes, chat: Chat) -> str | list[Message]:
    line = given.decode("utf-8-sig", "replace")
    try:
        asked = json.loads(given.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a line must be JSON ({error}): {shorten(line.strip(), 80)}") from None
    if not isinstance(asked, dict) or "prompt" not in asked:
        raise ValueError(f'a line must be an object like {{"prompt": "…"}}, got {shorten(line.strip(), 80)}')
    messages = read_prompt(asked["prompt"])
    if isinstance(asked["prompt"], list):
        return messages
    if asked.get("reset"):
        chat.reset()
    return messages[0]["content"]


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    console = None if _at_terminal() else Console(sys.stderr)  # a pipe holds answers and nothing else
    return run_command("chat", "Talk to a model that calls your functions.", run, argv, console=console)


if __name__ == "__main__":
    sys.exit(main())
