"""What the program prints: lines, tables and progress bars with time left.

On a terminal rich draws them; elsewhere (a file, a pipe, CI) they are plain lines, and a long phase reports
every few seconds. All output goes through here, so that nothing breaks a bar.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

import grpo_jax
from grpo_jax.text import shorten
from grpo_jax.types import Trajectory

SECONDS_BETWEEN_LINES = 5.0
SECONDS_OF_SILENCE = 60.0  # without a terminal, after which a long update says that it is still running
SAMPLE_CHARACTERS = 400  # of a message, in the table of samples


class Console:
    """Where the program prints.

    Args:
        file: None for standard output.
        terminal: None to find out whether the file is a terminal.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        file: IO[str] | None = None,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._rich = RichConsole(
            file=file, force_terminal=terminal, highlight=False, markup=False, emoji=False
        )
        self.terminal = self._rich.is_terminal
        self._clock = clock
        self._bars: Progress | None = None
        self.at_start = True  # of a line
        self._said = clock()  # when the last line was printed
        self._running: list[_Lines] = []

    def mute(self) -> None:
        """Print nothing from now on."""
        self._rich.quiet = True
        self.terminal = False

    def line(self, text: str, style: str = "") -> None:
        """Print a line of its own."""
        if not self.at_start:
            self._rich.print()
        self.at_start, self._said = True, self._clock()
        self._rich.print(Text(printable(text), style), soft_wrap=True)

    def write(self, text: str, style: str = "") -> None:
        """Print text as it comes, without ending the line.

        Args:
            style: rich's, as "dim"; seen on a terminal only.
        """
        if text:
            self._rich.print(Text(printable(text), style), end="", soft_wrap=True)
            self.at_start = text.endswith("\n")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table.

        Args:
            rows: one value per column each; printed as text.
        """
        if not self.terminal:
            self.line(title)
            lines = [list(map(str, row)) for row in (columns, *rows)]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for cells in lines:
                padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
                self.line("  " + "  ".join(padded).rstrip())
            return
        table = Table(
            title=Text(title), title_justify="left", show_lines=any("\n" in str(v) for r in rows for v in r)
        )
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(str(value))) for value in row))
        self._rich.print(table)

    def tools(self, signatures: Sequence[str]) -> None:
        """Print the signatures of the loaded tools."""
        self.line(f"Loaded {len(signatures)} tool functions:")
        for signature in signatures:
            self.line(f"  {signature}")

    def samples(self, trajectories: Sequence[Trajectory], answers: Sequence[str], n: int = 3) -> None:
        """Print a few conversations of a batch, spread evenly over its rows.

        Args:
            trajectories: [B].
            answers: [B] what each row should have found.
        """
        n = min(n, len(trajectories))
        chosen = [i * len(trajectories) // n for i in range(n)]
        title, rows = "Sample conversations", []
        for i in chosen:
            one = trajectories[i]
            rewards = ", ".join("none" if math.isnan(value) else f"{value:.3g}" for value in one.rewards)
            rows.append(("\n".join(map(_message, one.messages)), answers[i], rewards, one.status.value))
        if self.terminal:
            return self.table(title, ("completion", "answer", "rewards", "status"), rows)
        self.line(title)
        for text, answer, rewards, status in rows:
            scored = f"rewards {rewards}, " if rewards else ""
            self.line(f"  status {status}, {scored}answer {json.dumps(answer, ensure_ascii=False)}")
            self.line(textwrap.indent(text, "    "))

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[_Bar | _Lines]:
        """A progress bar: `with console.progress("rollout", 64) as bar: bar.advance(8, reward=0.4)`.

        Bars may be nested; each is removed at its end.

        Yields:
            An object with `advance(n=1, **fields)`; the fields are shown next to the bar.
        """
        if not self.terminal:
            lines = _Lines(self, description, total)
            with self._heard_of(lines):
                yield lines
            lines.finish()
            return
        outermost = self._bars is None
        bars = self._bars or Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}", markup=False),
            console=self._rich,
            transient=True,
        )
        if outermost:
            self._bars = bars
            bars.start()
        bar = _Bar(bars, bars.add_task(printable(description), total=total, fields=""))
        try:
            yield bar
        finally:
            bars.remove_task(bar.task)
            if outermost:
                bars.stop()
                self._bars = None

    @contextlib.contextmanager
    def _heard_of(self, lines: _Lines) -> Iterator[None]:
        """A block that is never silent for long, though a compilation or an update takes many minutes."""
        self._running.append(lines)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(SECONDS_OF_SILENCE / 4):
                if self._clock() - self._said >= SECONDS_OF_SILENCE:
                    for innermost in self._running[-1:]:
                        innermost.still()

        if len(self._running) == 1:
            threading.Thread(target=watch, daemon=True, name="console").start()
        try:
            yield
        finally:
            ended.set()
            self._running.pop()


class _Bar:
    """A bar on a terminal."""

    def __init__(self, bars: Progress, task: Any):
        self.bars, self.task = bars, task

    def advance(self, n: int = 1, **fields: Any) -> None:
        shown: dict[str, Any] = {"fields": _fields(fields)} if fields else {}
        self.bars.update(self.task, advance=n, **shown)


class _Lines:
    """A bar's place where there is no terminal: a line every few seconds."""

    def __init__(self, console: Console, description: str, total: int):
        self._console, self._description, self._total = console, description, total
        self._done, self._fields = 0, ""
        self._start = self._printed = console._clock()
        self._timed: tuple[float, int] | None = None  # from when and how many on: the first units compile

    def advance(self, n: int = 1, **fields: Any) -> None:
        self._done += n
        self._fields = _fields(fields) if fields else self._fields
        now = self._console._clock()
        if self._timed is None and n:
            self._timed = now, self._done
        if now - self._printed >= SECONDS_BETWEEN_LINES and self._done < self._total:
            since, first = self._timed or (now, self._done)
            pace = (now - since) / (self._done - first) if self._done > first else None
            self._print("" if pace is None else f"{pace * (self._total - self._done):.0f} s left")
            self._printed = now

    def still(self) -> None:
        self._print(f"running for {self._console._clock() - self._start:.0f} s")

    def finish(self) -> None:
        # A phase shorter than the interval is reported by its caller.
        if self._printed > self._start:
            self._print(f"done in {self._console._clock() - self._start:.0f} s")

    def _print(self, when: str) -> None:
        parts = [f"{self._description} {self._done}/{self._total}", when, self._fields]
        self._console.line(", ".join(part for part in parts if part))


def _fields(fields: dict[str, Any]) -> str:
    return " ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())


def _message(message: dict[str, Any]) -> str:
    parts = [message.get("reasoning_content"), message.get("content")]
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        parts.append(f"{call['function']['name']}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})")
    text = " ".join(str(part) for part in parts if part)
    return f"{message['role']}: {shorten(text, SAMPLE_CHARACTERS)}"


def printable(text: str) -> str:
    """The text without control characters (except newline and tab): a model may write escape sequences."""
    return "".join(c if (c >= " " and c != "\x7f") or c in "\n\t" else "�" for c in text)


class _ConsoleHandler(logging.Handler):
    """Log records as lines of the console."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            self.console.line(text if record.levelno <= logging.INFO else f"{record.levelname}: {text}")
        except Exception:
            self.handleError(record)


def setup_logging(console: Console, level: str) -> None:
    """Send this package's log records to the console, or to the root logger's handlers if the user set any.

    A root logger that the user configured keeps its handlers and its level; only a
    level other than "info" is then set on our own logger.
    """
    ours = logging.getLogger("grpo_jax")
    for handler in [h for h in ours.handlers if isinstance(h, _ConsoleHandler)]:
        ours.removeHandler(handler)
    if any(map(_is_users, logging.getLogger().handlers)):
        ours.setLevel(logging.NOTSET if level == "info" else level.upper())
        ours.propagate = True
        return
    ours.setLevel(level.upper())
    ours.addHandler(_ConsoleHandler(console))
    ours.propagate = False


_dependencies_handlers: list[logging.Handler] = []


def note_dependencies() -> None:
    """Treat the root handlers that were added since `import grpo_jax` as those of dependencies.

    To be called when the heavy imports are done, before the user's code runs again.
    """
    known = (*grpo_jax.ROOT_HANDLERS, *_dependencies_handlers)
    _dependencies_handlers.extend(h for h in logging.getLogger().handlers if h not in known)


def _is_users(handler: logging.Handler) -> bool:
    """Whether the user put a handler on the root logger, rather than a library.

    1. absl's own class is absl's.
    2. What was there before this package was imported is the user's, and what came with the imports is not.
    3. The default handler, to which `logging.info` and absl's functions help themselves on first use, is the
       user's only by 2., where absl was not there yet to add it.
    """
    if type(handler).__module__.startswith("absl.") or handler in _dependencies_handlers:
        return False
    if handler in grpo_jax.ROOT_HANDLERS and not grpo_jax.ABSL_CAME_FIRST:
        return True
    # what `logging.basicConfig()` adds without an argument, at the level it leaves
    is_default = (
        type(handler) is logging.StreamHandler
        and handler.level == logging.NOTSET
        and getattr(handler.formatter, "_fmt", None) == logging.BASIC_FORMAT
        and logging.getLogger().level == logging.WARNING
    )
    return not is_default
