"""Running tools: for anything that one call does, the others continue and nothing raises."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tools import Limits, Toolbox, ToolRunner, load_tools, run_tool, tools_of
from grpo_jax.types import Outcome, ToolCall
from tools_funcs import math_tools

SCRIPT = '''
import asyncio, os, signal, subprocess, sys, threading, time

LOG = "THE LOG"

def square(n: int) -> str:
    """Square."""
    print("a print of the user", flush=True)
    os.write(1, b"and a raw one\\n")
    return f"{n * n}"

def note(text: str) -> str:
    """Write to the log."""
    with open(LOG, "a") as log:
        log.write(text + "\\n")
    return text

def hang(n: int) -> str:
    """Hang."""
    while True:
        pass

def leave(code: int) -> str:
    """Call sys.exit."""
    sys.exit(code)

def die(code: int) -> str:
    """End the process."""
    os._exit(code)

def segfault() -> str:
    """Be killed by a signal."""
    os.kill(os.getpid(), signal.SIGSEGV)

def eat(gigabytes: int) -> str:
    """Eat memory."""
    return str(len(bytearray(gigabytes * 2**30)))

def long(n: int) -> str:
    """Answer at length."""
    return "é" * n

def boom() -> str:
    """Raise."""
    raise RuntimeError("kaboom")

def refuse() -> str:
    """Refuse."""
    return "Error: not allowed; allowed is nothing"

def read() -> str:
    """Read what is not there."""
    return repr(sys.stdin.read())

def shut() -> str:
    """Close every pipe."""
    os.closerange(3, 100)
    return "shut"

def unwritable() -> object:
    """Return what cannot be written."""
    class Odd:
        def __str__(self):
            raise TypeError("no text")
    return Odd()

class Mute(Exception):
    def __str__(self):
        sys.exit("no text")

def mute(said: bool) -> str:
    """Raise what says nothing, or cannot be read."""
    raise Mute if said else AssertionError

def count() -> dict:
    """Count: not pure."""
    global COUNT
    COUNT += 1
    return {"count": COUNT}

async def later(n: int) -> str:
    """Answer later."""
    await asyncio.sleep(0.001)
    return f"later {n}"

def child() -> str:
    """Start a child that outlives the call, and hang."""
    process = subprocess.Popen(["sleep", "60"])
    note(str(process.pid))
    time.sleep(60)

def fork() -> str:
    """Fork, and let the child return too."""
    child = os.fork() == 0
    time.sleep(0.0 if child else 0.1)
    return "child" if child else "parent"

def echo(value: object) -> str:
    """Say it back."""
    return repr(value)

def where() -> str:
    """Name the process and whether jax is in it."""
    return f"{os.getpid()} {'jax' in sys.modules}"

COUNT = 0
TOOL_FUNCTIONS = [square, note, hang, leave, die, segfault, eat, long, boom, refuse, read, shut, unwritable, mute,
                  count, later, child, fork, echo, where]
'''

STATE = '''
class Account:
    def __init__(self):
        self.balance = 0

    def deposit(self, amount: int) -> str:
        """Put money in."""
        self.balance += amount
        return f"Balance: {self.balance}"

    def wait(self) -> str:
        """Hang."""
        import time
        time.sleep(3)

def make_tools():
    account = Account()
    return [account.deposit, account.wait]
'''


def call(name, **arguments):
    return ToolCall(name, arguments)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "log.txt"


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory, log):
    path = tmp_path_factory.mktemp("tools") / "wild_tools.py"
    path.write_text(SCRIPT.replace("THE LOG", str(log)))
    return load_tools(script=path)


@pytest.fixture(scope="module")
def runner(toolbox):
    with ToolRunner(toolbox, limits=Limits(1.0, 256, 100), workers=2) as runner:
        yield runner


@pytest.fixture
def account(tmp_path):
    path = tmp_path / "account.py"
    path.write_text(STATE)
    return load_tools(script=path)


def test_results_come_in_the_order_of_the_calls(runner):
    results = runner.run([call("square", n=n) for n in range(50)])
    assert [r.text for r in results] == [str(n * n) for n in range(50)]
    assert {r.outcome for r in results} == {Outcome.OK}
    assert all(0 < r.seconds < 5 for r in results)


@pytest.mark.parametrize(
    "bad, outcome, text",
    [
        (call("hang", n=1), Outcome.TIMEOUT, "Error: hang did not finish within 1 s"),
        (call("leave", code=3), Outcome.CRASH, "Error: leave called sys.exit(3)"),
        (call("die", code=4), Outcome.CRASH, "Error: die ended its worker process with exit code 4"),
        (call("segfault"), Outcome.CRASH, "Error: segfault crashed its worker process (SIGSEGV)"),
        (
            call("eat", gigabytes=8),
            Outcome.CRASH,
            "Error: eat ran out of memory; tool_memory_limit is 256 MB",
        ),
        (
            call("long", n=101),
            Outcome.ERROR,
            "Error: long returned 101 characters, more than the limit of 100",
        ),
        (call("boom"), Outcome.ERROR, "Error: boom raised RuntimeError: kaboom"),
        (call("refuse"), Outcome.ERROR, "Error: not allowed; allowed is nothing"),
        (call("unwritable"), Outcome.ERROR, "Error: unwritable raised TypeError: no text"),
        (call("mute", said=False), Outcome.ERROR, "Error: mute raised AssertionError"),
        (call("mute", said=True), Outcome.ERROR, "Error: mute raised Mute"),
        (call("shut"), Outcome.CRASH, "Error: shut "),
        (
            call("square", n="4"),
            Outcome.ERROR,
            "Error: wrong arguments for square: 'n' must be integer, got s",
        ),
        (call("nope"), Outcome.ERROR, "Error: unknown tool 'nope'. Available: square, note, hang"),
        (ToolCall("square", [1]), Outcome.ERROR, "Error: the arguments of square must be a JSON object"),
        (
            ToolCall("square", {"n": {1}}),
            Outcome.ERROR,
            "Error: the arguments of square must be a JSON object",
        ),
        (call("square", n=10**5000), Outcome.ERROR, "Error: the arguments of square must be a JSON object"),
    ],
)
def test_a_bad_call_is_a_string_and_the_others_continue(runner, bad, outcome, text):
    runner.start_step()
    calls = [call("square", n=n) for n in range(6)]
    results = runner.run([*calls[:3], bad, *calls[3:]])
    assert results[3].text.startswith(text)
    assert results[3].outcome is outcome
    assert [r.text for r in results[:3] + results[4:]] == ["0", "1", "4", "9", "16", "25"]


@pytest.mark.parametrize(
    "good, text",
    [
        (call("long", n=100), "é" * 100),
        (call("later", n=2), "later 2"),
        (call("read"), "''"),
        (call("echo", value="\ud800"), "'\\ud800'"),
    ],
)
def test_async_tools_empty_stdin_and_odd_text(runner, good, text):
    assert runner.run([good])[0].text == text


def test_workers_are_other_processes_without_jax(runner):
    pid, has_jax = runner.run([call("where")])[0].text.split()
    assert int(pid) != os.getpid() and has_jax == "False"


def test_prints_stay_out_of_the_protocol(toolbox, capfd):
    """They go to stderr; stdout may carry what the parent prints for others to read."""
    with ToolRunner(toolbox, workers=1) as runner:
        assert runner.run([call("square", n=3)])[0].text == "9"
    out, err = capfd.readouterr()
    assert "a print of the user" in err and "and a raw one" in err and out == ""


def test_a_hanging_call_delays_its_batch_by_at_most_the_limit_and_0_6_s(runner):
    calls = [call("square", n=n) for n in range(100, 200)]
    runner.run(calls[:2])  # the workers are up
    start = time.perf_counter()
    results = runner.run([call("hang", n=7), *calls])
    assert 1.0 <= time.perf_counter() - start < 1.0 + 0.6
    assert [r.outcome for r in results].count(Outcome.OK) == 100


def test_what_a_hanging_tool_started_is_killed_with_it(runner, log):
    log.write_text("")
    runner.run([call("child")])
    pid = int(log.read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.02)
    assert not _alive(pid)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_that_a_tool_forks_does_not_answer(runner):
    """Its answer would be taken for that of the next call, and so on for ever."""
    runner.start_step()
    texts = [r.text for r in runner.run([call("fork"), *(call("square", n=n) for n in range(6))])]
    assert texts == ["parent", "0", "1", "4", "9", "16", "25"]
    assert [r.text for r in runner.run([call("square", n=n) for n in range(6, 9)])] == ["36", "49", "64"]


def test_equal_calls_of_a_step_run_once(runner, log):
    log.write_text("")
    runner.start_step()
    calls = [call("note", text="a"), call("note", text="b"), call("note", text="a")]
    assert [r.text for r in runner.run(calls)] == ["a", "b", "a"]
    runner.run(calls[:1])
    assert sorted(log.read_text().split()) == ["a", "b"]
    assert runner.cache_hit_rate == 0.5
    runner.start_step()
    runner.run(calls[:1])
    assert sorted(log.read_text().split()) == ["a", "a", "b"]
    assert runner.cache_hit_rate == 0.0


def test_submitted_calls_run_while_others_are_submitted():
    """The first call ends only after the second batch was submitted; an equal call in it waits for the first."""
    proceed, ran = threading.Event(), []

    def wait(n: int) -> str:
        ran.append(n)
        return f"{n} {proceed.wait(5)}"

    toolbox = Toolbox(functions={"wait": wait}, schemas=[], source="a test")
    with ToolRunner(toolbox, executor="inline", workers=2, limits=Limits(seconds=10)) as runner:
        first = runner.submit([call("wait", n=1)])
        second = runner.submit([call("wait", n=1), call("wait", n=2)])
        assert not any(future.done() for future in [*first, *second])
        proceed.set()
        assert [future.result().text for future in [*first, *second]] == ["1 True", "1 True", "2 True"]
        assert sorted(ran) == [1, 2]
        assert runner.cache_hit_rate == pytest.approx(1 / 3)


def test_closing_ends_the_calls_under_way(toolbox):
    runner = ToolRunner(toolbox, workers=1, limits=Limits(seconds=30))
    runner.run([call("where")])  # the worker is up
    futures = runner.submit([call("hang", n=1), call("square", n=3)])
    runner.close()
    for future in futures:
        with pytest.raises(RuntimeError, match="closed"):
            future.result()


def test_a_worker_that_is_killed_from_outside_costs_its_call_alone(toolbox):
    """As by a machine that runs out of memory: between calls nothing is seen of it, in one it is a crash."""
    with ToolRunner(toolbox, workers=1, limits=Limits(seconds=30), cache=False) as runner:
        first = int(runner.run([call("where")])[0].text.split()[0])
        os.kill(first, signal.SIGKILL)
        time.sleep(0.3)
        second = int(runner.run([call("where")])[0].text.split()[0])
        assert second != first
        under_way = runner.submit([call("hang", n=1), call("square", n=3)])
        time.sleep(0.3)
        os.kill(second, signal.SIGKILL)
        crash, after = (future.result() for future in under_way)
        assert (crash.outcome, after.text) == (Outcome.CRASH, "9")
        assert crash.text == "Error: hang crashed its worker process (SIGKILL, perhaps out of memory)"


def test_one_true_and_1_0_are_different_calls(runner):
    values = [1, True, 1.0, "1"]
    assert [r.text for r in runner.run([call("echo", value=v) for v in values])] == [
        "1",
        "True",
        "1.0",
        "'1'",
    ]


def test_without_cache_every_call_runs_and_those_of_a_row_in_order(toolbox, log):
    log.write_text("")
    with ToolRunner(toolbox, workers=2, cache=False) as runner:
        runner.run([call("note", text=t) for t in "acbca"], rows=[0, 0, 1, 0, 0])
    lines = log.read_text().split()
    assert sorted(lines) == ["a", "a", "b", "c", "c"]
    assert [x for x in lines if x != "b"] == ["a", "c", "c", "a"]


def test_calls_run_again_past_the_cache(runner, log):
    log.write_text("")
    runner.start_step()
    for again in (False, True, False):
        futures = runner.submit([call("note", text="a"), call("square", n=2)], again=again)
        assert [future.result().text for future in futures] == ["a", "4"]
    assert log.read_text().split() == ["a", "a"]
    assert runner.cache_hit_rate == 0.5


def test_a_failing_worker_start_is_the_users_to_know(tmp_path):
    path = tmp_path / "gone.py"
    path.write_text('def f() -> str:\n    """F."""\nTOOL_FUNCTIONS = [f]\n')
    toolbox = load_tools(script=path)
    path.unlink()
    with (
        ToolRunner(toolbox, workers=1) as runner,
        pytest.raises(RuntimeError, match=r"did not start: .*gone\.py"),
    ):
        runner.run([call("f")])


def test_lax_reaches_the_workers(toolbox):
    with ToolRunner(toolbox, workers=1, lax=True) as runner:
        assert runner.run([call("square", n="4")])[0].text == "16"


def test_close_ends_the_workers(toolbox):
    runner = ToolRunner(toolbox, workers=1)
    pid = int(runner.run([call("where")])[0].text.split()[0])
    runner.close()
    assert not _alive(pid)
    with pytest.raises(RuntimeError, match="closed"):
        runner.run([call("where")])


def test_workers_end_when_the_parent_is_killed(toolbox):
    """A cluster kills with SIGKILL; a worker that lives on would hold the machine."""
    code = (
        "import os, signal\nfrom grpo_jax.tools import ToolRunner, load_tools\nfrom grpo_jax.types import ToolCall\n"
        f"runner = ToolRunner(load_tools(script={toolbox.script!r}), workers=1)\n"
        "print(runner.run([ToolCall('where', {})])[0].text, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(done.stdout.split()[0])
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.02)
    assert not _alive(pid)


# --- memory ----------------------------------------------------------------------------------------------

MEMORY = '''
import mmap, threading
from concurrent.futures import ThreadPoolExecutor

def threads(n: int) -> str:
    """Run n threads at once."""
    together = threading.Barrier(n)
    with ThreadPoolExecutor(n) as pool:
        return str(sum(pool.map(lambda i: together.wait(10) >= 0, range(n))))

def hold(megabytes: int) -> str:
    """Hold memory, after some threads."""
    threads(8)
    parts = [b"x" * 2**20 for _ in range(megabytes)]
    return str(len(parts))

def reserve(gigabytes: int) -> str:
    """Reserve address space, and use a page of it."""
    space = mmap.mmap(-1, gigabytes * 2**30)
    space[:4] = b"used"
    return space[:4].decode()

def in_thread(megabytes: int) -> str:
    """Hold memory in a thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(hold, megabytes).result()

TOOL_FUNCTIONS = [threads, hold, reserve, in_thread]
'''


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "memory_tools.py"
    path.write_text(MEMORY)
    with ToolRunner(load_tools(script=path), workers=1, limits=Limits(memory_mb=100)) as runner:
        yield runner


@pytest.mark.skipif(sys.platform != "linux", reason="tool_memory_limit needs Linux")
@pytest.mark.parametrize(
    "good, text",
    [
        (call("threads", n=100), "100"),  # 800 MB of stacks, of which little is used
        (call("hold", megabytes=60), "60"),
        (call("in_thread", megabytes=60), "60"),
        (call("reserve", gigabytes=2), "used"),
    ],
)
def test_the_memory_limit_is_on_memory_in_use(small, good, text):
    assert small.run([good])[0].text == text


@pytest.mark.skipif(sys.platform != "linux", reason="tool_memory_limit needs Linux")
@pytest.mark.parametrize("bad", [call("hold", megabytes=400), call("in_thread", megabytes=400)])
def test_a_tool_that_holds_more_than_the_limit_is_said_so(small, bad):
    (result,) = small.run([bad])
    assert result.text == f"Error: {bad.name} ran out of memory; tool_memory_limit is 100 MB"
    assert result.outcome is Outcome.CRASH


# --- event loops -----------------------------------------------------------------------------------------

ASYNC = '''
import asyncio

LIMIT = asyncio.Semaphore(1)
QUEUE = asyncio.Queue()
SERVER = None

async def one_by_one(n: int) -> str:
    """Wait for the semaphore n times at once."""
    async def wait():
        async with LIMIT:
            await asyncio.sleep(0.001)
            return 1
    return str(sum(await asyncio.gather(*[wait() for _ in range(n)])))

async def background(n: int) -> str:
    """Ask a task that lives as long as the process."""
    global SERVER
    async def serve():
        while True:
            number, answer = await QUEUE.get()
            answer.set_result(2 * number)
    if SERVER is None:
        SERVER = asyncio.create_task(serve())
    answer = asyncio.get_running_loop().create_future()
    await QUEUE.put((n, answer))
    return str(await answer)

def plain(n: int) -> str:
    """Use the current loop, as older libraries do."""
    return asyncio.get_event_loop().run_until_complete(one_by_one(n))

def runs(n: int) -> str:
    """Run a loop of its own, as a dependency does."""
    return str(asyncio.run(asyncio.sleep(0, n)))

def closes(n: int) -> str:
    """Make a loop the current one and close it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    result = loop.run_until_complete(asyncio.sleep(0, n))
    loop.close()
    return str(result)

TOOL_FUNCTIONS = [one_by_one, background, plain, runs, closes]
'''
_MIX = [
    *(call(name, n=n) for n in (3, 4) for name in ("one_by_one", "background", "plain", "runs")),
    *(call(name, n=5) for name in ("closes", "plain", "one_by_one", "runs", "background", "plain")),
]
_MIXED = ["3", "6", "3", "3", "4", "8", "4", "4", "5", "5", "5", "5", "10", "5"]


@pytest.fixture
def asynchronous(tmp_path):
    path = tmp_path / "async_tools.py"
    path.write_text(ASYNC)
    return load_tools(script=path)


@pytest.mark.parametrize("executor", ["process", "inline"])
def test_what_async_tools_keep_works_in_the_next_call(asynchronous, executor):
    with ToolRunner(asynchronous, executor, workers=1, cache=False) as runner:
        assert [r.text for r in runner.run(_MIX, [0] * len(_MIX))] == _MIXED


def test_an_async_tool_that_hangs_inline_is_cancelled_and_its_loop_stays(tmp_path):
    (tmp_path / "stuck.py").write_text(ASYNC.replace("asyncio.sleep(0.001)", "asyncio.sleep(n - 3)"))
    runner = ToolRunner(load_tools(tmp_path / "stuck.py"), "inline", Limits(seconds=0.3), cache=False)
    calls = [call("one_by_one", n=3), call("one_by_one", n=60), call("one_by_one", n=3)]
    with runner:
        results = runner.run(calls, [0, 0, 0])
    assert [r.text for r in results] == ["3", "Error: one_by_one did not finish within 0.3 s", "3"]


def test_a_notebooks_running_loop_rests_for_a_call(asynchronous):
    """Its task and its loop are current again afterwards; a tool may itself run tools."""

    async def cell():
        before = asyncio.current_task(), asyncio.get_running_loop()
        texts = [run_tool({"name": c.name, "arguments": c.arguments}, asynchronous) for c in _MIX]
        assert (asyncio.current_task(), asyncio.get_running_loop()) == before
        await asyncio.sleep(0)
        return texts

    async def nested(n: int) -> str:
        """Run a tool in a tool."""
        return run_tool({"name": "runs", "arguments": {"n": n}}, asynchronous)

    assert asyncio.run(cell()) == _MIXED
    assert run_tool({"name": "nested", "arguments": {"n": 3}}, [nested]) == "3"


@pytest.mark.parametrize("executor", ["process", "inline"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_tool_may_use_a_process_pool(tmp_path, executor, method):
    (tmp_path / "helper.py").write_text("def double(n):\n    return 2 * n\n")
    (tmp_path / "pool_tools.py").write_text(
        "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\nfrom helper import double\n"
        "def triple(n):\n    return 3 * n\n"
        'def both(n: int) -> str:\n    """Use a pool."""\n'
        f"    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context({method!r})) as pool:\n"
        "        return f'{pool.submit(double, n).result()} {pool.submit(triple, n).result()}'\n"
        "TOOL_FUNCTIONS = [both]\n"
    )
    with ToolRunner(
        load_tools(tmp_path / "pool_tools.py"), executor, limits=Limits(seconds=60), workers=1
    ) as runner:
        assert runner.run([call("both", n=2)])[0].text == "4 6"


# --- functions given in Python ---------------------------------------------------------------------------


def test_functions_given_in_python_run_in_workers():
    """A closure goes by value, a function of a module by its name."""
    base = 40

    def add_base(n: int) -> str:
        """Add."""
        return f"{base + n} in {os.getpid() == PARENT}"

    with ToolRunner(tools_of([add_base, math_tools.add]), workers=1) as runner:
        texts = [r.text for r in runner.run([call("add_base", n=2), call("add", a=15, b=27)])]
    assert texts == ["42 in False", "Sum: 42"]


PARENT = os.getpid()


def test_functions_of_a_programs_main_run_in_workers():
    code = (
        "from grpo_jax.tools import ToolRunner, tools_of\nfrom grpo_jax.types import ToolCall\n"
        "UNIT = 'm'\ndef size(n: int) -> str:\n    'Size.'\n    return f'{n} {UNIT}'\n"
        "with ToolRunner(tools_of([size]), workers=1) as runner:\n"
        "    print(runner.run([ToolCall('size', {'n': 3})])[0].text)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "3 m\n", done.stderr


def test_a_function_that_cannot_be_copied_is_named():
    lock = threading.Lock()

    def locked(n: int) -> str:
        """Lock."""
        with lock:
            return str(n)

    with pytest.raises(
        ValueError, match=r'the tool locked cannot be copied .*lock.* set tool_executor="inline"'
    ):
        ToolRunner(tools_of([math_tools.add, locked]))
    with ToolRunner(tools_of([locked]), "inline") as runner:
        assert runner.run([call("locked", n=1)])[0].text == "1"


@pytest.mark.parametrize(
    "functions, message",
    [
        ([], "tools must be a list with at least one function"),
        (None, "tools must be a list with at least one function"),
        ([math_tools.add, math_tools.add], "tools contains the name 'add' twice"),
        ([lambda n: n], r"tools\[0\] must be a function defined with `def`, got a lambda"),
        ([int], r"tools\[0\] must be a function defined with `def`, got <class 'int'>"),
    ],
)
def test_what_is_no_list_of_tools_is_an_error(functions, message):
    with pytest.raises(ValueError, match=message):
        tools_of(functions)


# --- inline ----------------------------------------------------------------------------------------------


def test_inline_gives_every_row_its_own_object_until_the_step_ends(account):
    calls = [call("deposit", amount=a) for a in (1, 10, 2, 2)]
    with ToolRunner(account, executor="inline", workers=2) as runner:
        texts = [r.text for r in runner.run(calls, rows=["x", "y", "x", "x"])]
        assert texts == ["Balance: 1", "Balance: 10", "Balance: 3", "Balance: 5"]
        assert runner.run(calls[:1], rows=["y"])[0].text == "Balance: 11"
        runner.start_step()
        assert runner.run(calls[:1], rows=["y"])[0].text == "Balance: 1"


def test_inline_leaves_a_hanging_tool_behind(account):
    with ToolRunner(account, executor="inline", limits=Limits(seconds=0.1)) as runner:
        results = runner.run(
            [call("wait"), call("deposit", amount=1), call("deposit", amount="1")], rows=[0, 0, 0]
        )
    assert [r.outcome for r in results] == [Outcome.TIMEOUT, Outcome.OK, Outcome.ERROR]
    assert results[1].text == "Balance: 1"


def test_an_inline_tool_cannot_change_the_call(tmp_path):
    def spoil(values: list) -> str:
        """Spoil."""
        values.clear()
        raise KeyboardInterrupt

    spoiled = call("spoil", values=[1])
    toolbox = Toolbox(functions={"spoil": spoil}, schemas=[], source="a test")
    with ToolRunner(toolbox, executor="inline") as runner:
        assert runner.run([spoiled])[0].text.startswith("Error: KeyboardInterrupt")
    assert spoiled.arguments == {"values": [1]}


LEAK = '''
import dataclasses, weakref

ALIVE = weakref.WeakSet()

class State:
    pass

def make_tools():
    state = State()
    ALIVE.add(state)

    @dataclasses.dataclass
    class Local:
        n: int
        def own(self):
            return state

    def closure(local: Local) -> str:
        """Use the state, and say how many there are."""
        return str(len(ALIVE)) if local.own() is state else "?"

    async def later(n: int) -> str:
        """Use it later."""
        return str(len(ALIVE)) if state else "?"

    return [closure, later]
'''


def test_the_state_of_a_trajectory_ends_with_it(tmp_path):
    """Not with a table of ours that is keyed by its functions or classes. One state is the toolbox's own."""
    path = tmp_path / "leak.py"
    path.write_text(LEAK)
    with ToolRunner(load_tools(script=path), "inline") as runner:
        for _ in range(4):
            runner.start_step()
            gc.collect()
            calls = [call("closure", local={"n": 1}), call("later", n=1)]
            texts = [r.text for i in range(3) for r in runner.run(calls, [i, i])]
            assert texts == ["2", "2", "3", "3", "4", "4"]


def test_make_tools_sees_a_copy_of_its_row(tmp_path):
    path = tmp_path / "shop.py"
    path.write_text(
        "def make_tools(row):\n    stock = row.get('stock', {})\n"
        '    def take(item: str) -> str:\n        """Take an item."""\n'
        "        stock[item] -= 1\n        return f'{stock[item]} left'\n    return [take]\n"
    )
    rows = [{"stock": {"tea": 5}, "answer": "4 left"}, {"stock": {"tea": 9}}]
    with ToolRunner(load_tools(script=path), "inline") as runner:
        for _ in range(2):
            runner.start_step([rows[0], rows[0], rows[1]])
            calls = [call("take", item="tea")] * 4
            texts = [r.text for r in runner.run(calls, [0, 1, 2, 2])]
            assert texts == ["4 left", "4 left", "8 left", "7 left"]
    assert rows[0]["stock"] == {"tea": 5}


def test_make_tools_that_needs_its_row_says_so_when_it_is_loaded_without(tmp_path):
    path = tmp_path / "shop.py"
    path.write_text(
        'def make_tools(row):\n    stock = row["stock"]\n    def f() -> str:\n        "F."\n        return str(stock)\n'
        "    return [f]\n"
    )
    with pytest.raises(
        ValueError, match=r"with an empty row, to read the schemas: use row\.get\) failed: KeyError"
    ):
        load_tools(script=path)
    assert run_tool({"name": "f"}, load_tools(script=path, row={"stock": 3})) == "3"


def test_an_inline_tool_leaves_the_runs_folder_alone(tmp_path):
    def move(to: str) -> str:
        """Move."""
        os.chdir(to)
        return os.getcwd()

    before = os.getcwd()
    with ToolRunner(tools_of([move]), "inline") as runner:
        assert runner.run([call("move", to=str(tmp_path))])[0].text == str(tmp_path)
    assert run_tool({"name": "move", "arguments": {"to": str(tmp_path)}}, [move]) == str(tmp_path)
    assert os.getcwd() == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "have state, which worker processes do not share; set tool_executor to inline"),
        ({"executor": "thread"}, "tool_executor must be one of process, inline, got 'thread'"),
    ],
)
def test_options_that_cannot_work_are_errors(account, options, message):
    with pytest.raises(ValueError, match=message):
        ToolRunner(account, **options)


# --- fuzz ------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.sampled_from(["square", "echo", "long", "note", "later", "", "\ud800"]) | st.text(max_size=5)


@settings(max_examples=100, deadline=2000)
@given(
    st.lists(
        st.builds(ToolCall, _NAMES, st.dictionaries(st.sampled_from(["n", "value", "x"]), _JSON)), max_size=8
    )
)
def test_no_call_makes_the_runner_raise(runner, calls):
    results = runner.run(calls)
    assert len(results) == len(calls)
    assert not {r.outcome for r in results} & {Outcome.TIMEOUT, Outcome.CRASH}
    json.dumps([r.text for r in results], ensure_ascii=False).encode()
