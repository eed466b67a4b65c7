"""What the console prints, and where log records go."""

import contextlib
import io
import logging
import math
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from trajectories import trajectory

from grpo_jax.run import console as console_module
from grpo_jax.run.console import Console, printable, setup_logging


class Clock:
    """A clock that the test turns."""

    now = 100.0

    def __call__(self):
        return self.now


def printed(console_file):
    return console_file.getvalue().splitlines()


def test_without_a_terminal_a_long_phase_prints_a_line_every_few_seconds():
    clock, file = Clock(), io.StringIO()
    console = Console(file, clock=clock)
    with console.progress("rollout", 20) as bar:
        bar.advance(0)
        for _ in range(10):
            clock.now += 2
            bar.advance(2, reward=0.25)
    assert printed(file) == [
        "rollout 6/20, 14 s left, reward 0.25",
        "rollout 12/20, 8 s left, reward 0.25",
        "rollout 18/20, 2 s left, reward 0.25",
        "rollout 20/20, done in 20 s, reward 0.25",
    ]


def test_the_first_units_of_a_phase_which_compile_or_were_done_before_do_not_enter_what_is_left():
    clock, file = Clock(), io.StringIO()
    with Console(file, clock=clock).progress("updates", 10) as bar:
        for seconds, n in ((60, 1), (10, 1), (10, 8)):
            clock.now += seconds
            bar.advance(n)
    assert printed(file) == ["updates 1/10", "updates 2/10, 80 s left", "updates 10/10, done in 80 s"]


def test_without_a_terminal_an_update_that_takes_minutes_says_that_it_is_running(monkeypatch):
    monkeypatch.setattr(console_module, "SECONDS_OF_SILENCE", 0.02)
    clock, file = Clock(), io.StringIO()
    console = Console(file, clock=clock)
    with console.progress("updates", 2), console.progress("rollout", 4) as rollout:
        rollout.advance()
        clock.now += 61
        wait_for(lambda: file.getvalue())
        clock.now += 61
        wait_for(lambda: len(printed(file)) == 2)
    assert printed(file) == ["rollout 1/4, running for 61 s", "rollout 1/4, running for 122 s"]
    time.sleep(0.05)
    assert len(printed(file)) == 2 and "console" not in {thread.name for thread in threading.enumerate()}


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_without_a_terminal_a_short_phase_prints_nothing():
    file = io.StringIO()
    with Console(file, clock=Clock()).progress("save", 1) as bar:
        bar.advance()
    assert file.getvalue() == ""


def test_on_a_terminal_nested_bars_and_lines_share_the_screen():
    file = io.StringIO()
    console = Console(file, terminal=True)
    with console.progress("train", 2) as outer, console.progress("rollout [1]", 4) as inner:
        inner.advance(4, reward=0.5)
        time.sleep(0.25)  # bars are drawn ten times a second
        console.line("a line [bold]with[/bold] brackets")
        outer.advance()
    text = file.getvalue()
    assert "rollout [1]" in text
    assert "reward 0.5" in text
    assert "a line [bold]with[/bold] brackets" in text
    with console.progress("again", 1) as bar:
        bar.advance()


def test_a_long_line_is_not_broken():
    file = io.StringIO()
    Console(file).line("x " * 200)
    assert printed(file) == ["x " * 200]


def test_samples_show_conversation_answer_rewards_and_status():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 15, "b": 27}}}
    messages = [
        {"role": "assistant", "content": "Let me [see]", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "Sum: 42\x1b[2J" + "y" * 500},
    ]
    rows = [trajectory(messages=messages, rewards=(1.0, math.nan)), trajectory(), trajectory(), trajectory()]
    for terminal in (False, True):
        file = io.StringIO()
        Console(file, terminal=terminal).samples(rows, ["Sum: 42", "b", "c", "d"], n=2)
        text = file.getvalue()
        assert "assistant: Let me [see] add(a=15, b=27)" in " ".join(text.replace("│", " ").split())
        assert "\x1b[2J" not in text
        assert "y" * 500 not in text
        assert "1, none" in text
        assert "answered" in text
    assert printed(file)[0].strip() == "Sample conversations"
    file = io.StringIO()
    Console(file).samples(rows[:1], ['a "b"\nc'])
    assert printed(file)[1] == r'  status answered, rewards 1, none, answer "a \"b\"\nc"'
    assert printed(file)[2].startswith("    assistant: Let me")
    file = io.StringIO()
    Console(file).samples(rows, ["row 0", "row 1", "row 2", "row 3"], n=2)
    assert [name for name in ("row 0", "row 1", "row 2", "row 3") if name in file.getvalue()] == [
        "row 0",
        "row 2",
    ]


def test_tools_and_tables_are_plain_lines_without_a_terminal():
    file = io.StringIO()
    console = Console(file)
    console.tools(["add(a: float, b: float) -> str"])
    console.table("Evaluation", ["metric", "before", "after"], [["n", 500, "–"], ["reward", 0.25, 1]])
    assert printed(file) == [
        "Loaded 1 tool functions:",
        "  add(a: float, b: float) -> str",
        "Evaluation",
        "  metric  before  after",
        "  n       500     –",
        "  reward  0.25    1",
    ]


def test_printable_keeps_text_and_drops_control_characters():
    assert printable("é 漢\n\tx\x1b[1m\x07\x7f") == "é 漢\n\tx�[1m��"


@contextlib.contextmanager
def bare_root():
    """The root logger without pytest's handlers; everything is put back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("grpo_jax")
    kept = root.handlers[:], root.level, ours.handlers[:], ours.level, ours.propagate
    root.handlers[:] = []
    try:
        yield root
    finally:
        root.handlers[:], ours.handlers[:], ours.propagate = kept[0], kept[2], kept[4]
        root.setLevel(kept[1])
        ours.setLevel(kept[3])


def test_log_records_become_lines_of_the_console():
    file = io.StringIO()
    with bare_root() as root:
        setup_logging(Console(io.StringIO()), "info")
        setup_logging(Console(file), "info")
        log = logging.getLogger("grpo_jax.x")
        log.debug("hidden")
        log.info("step %d", 3)
        log.warning("careful")
        root.addHandler(logging.StreamHandler(file))  # as a library may, later: no line comes twice
        log.info("once")
    assert printed(file) == ["step 3", "WARNING: careful", "once"]


def test_a_root_logger_that_the_user_configured_is_honoured():
    theirs, ours = io.StringIO(), io.StringIO()
    with bare_root() as root:
        root.addHandler(logging.StreamHandler(theirs))
        root.setLevel(logging.DEBUG)
        setup_logging(Console(ours), "info")
        logging.getLogger("grpo_jax.x").debug("schema")
        setup_logging(Console(ours), "warning")
        logging.getLogger("grpo_jax.x").info("hidden")
    assert (printed(theirs), ours.getvalue()) == (["schema"], "")


# What is on the root logger when a run begins, in a separate process: the user's lines, our import, and a
# library that configures the root logger while it is imported.
START = """
import io, logging, sys
{before}
import grpo_jax
{library}
from grpo_jax.run.console import Console, note_dependencies, setup_logging
note_dependencies()  # as the commands do when their imports are done
{after}
console = io.StringIO()
setup_logging(Console(console), "info")
log = logging.getLogger("grpo_jax.scoring.rewards")
log.info("reward function prints: hello")
log.warning("careful")
{later}
sys.stderr.flush()
print(console.getvalue(), end="")
"""
OURS = "reward function prints: hello\nWARNING: careful\n"
ABSL = "import absl.logging; absl.logging.info('imported')"
USERS = "logging.basicConfig(level=logging.INFO, format='user %(message)s')"


def start(**lines):
    """Standard output, where the console prints, and standard error, where root handlers write."""
    code = START.format(**{"before": "", "library": "", "after": "", "later": ""} | lines)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    "lines",
    [
        {},
        {"library": ABSL},
        {"before": ABSL},
        {"library": "import absl.logging; absl.logging.use_absl_handler()"},
        {"library": "logging.basicConfig()"},
        {"library": "logging.warning('imported')"},
        {"library": "logging.basicConfig(level=logging.ERROR, format='lib %(message)s')"},
        {"library": "logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)"},
        {"after": ABSL},  # not imported before the run's own functions log with it
    ],
    ids=str,
)
def test_what_libraries_do_to_the_root_logger_loses_no_line(lines):
    out, err = start(**lines)
    assert out == OURS
    assert "hello" not in err and "careful" not in err


@pytest.mark.parametrize(
    "lines",
    [
        {"before": USERS},
        {"after": USERS},
        {"before": USERS, "library": "logging.basicConfig()"},
        {"before": USERS, "library": ABSL},
        {"before": "import absl.logging\n" + USERS},
        {"before": "logging.root.addHandler(logging.StreamHandler()); logging.root.setLevel('INFO')"},
    ],
    ids=str,
)
def test_what_the_user_did_to_the_root_logger_counts(lines):
    out, err = start(**lines)
    assert out == ""
    assert "reward function prints: hello\n" in err and "careful\n" in err


def test_a_users_default_handler_keeps_its_level():
    out, err = start(before="logging.basicConfig()")
    assert (out, err) == ("", "WARNING:grpo_jax.scoring.rewards:careful\n")


def test_a_second_run_in_one_process_is_set_up_like_the_first():
    """absl adds the default handler when it logs, which may be long after the imports."""
    again = "setup_logging(Console(console), 'info'); log.info('again')"
    out, _ = start(later=f"{ABSL}\n{again}")
    assert out == OURS + "again\n"


@pytest.mark.slow
def test_the_real_imports_lose_no_line():
    """Orbax logs through absl while it is imported."""
    assert start(library="import grpo_jax.run.job")[0] == OURS


def test_a_line_does_not_continue_what_was_written():
    file = io.StringIO()
    console = Console(file)
    console.write("an ans")
    console.line("Compiling decode …")
    console.write("wer\n")
    console.line("Done")
    assert printed(file) == ["an ans", "Compiling decode …", "wer", "Done"]
