"""The loop of the whole process: its end, and the threads around it. How rewards use it: test_rewards.py."""

import asyncio
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from grpo_jax.scoring.event_loop import EventLoop


def test_the_process_ends_quietly_with_a_background_task_left():
    """Its `finally` runs; nothing is said of tasks destroyed while pending or of a loop left open."""
    code = """
        import asyncio
        from grpo_jax.scoring.event_loop import EventLoop

        async def forever():
            try:
                await asyncio.sleep(1000)
            finally:
                print("ended")

        async def start():
            asyncio.create_task(forever())
            await asyncio.sleep(0)

        loop = EventLoop()
        for _ in range(2):
            with loop.in_this_thread():
                loop.run(start())
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\nended\n", "")


def test_other_threads_keep_their_own_loops():
    theirs, found = asyncio.new_event_loop(), {}
    ready, leave = threading.Event(), threading.Event()

    def other():
        asyncio.set_event_loop(theirs)
        ready.set()
        leave.wait(timeout=5)
        found["set before"] = asyncio.get_event_loop()

    def without():
        try:
            found["never set"] = asyncio.get_event_loop()
        except RuntimeError:
            found["never set"] = None

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait(timeout=5)
    with EventLoop().in_this_thread():
        leave.set()
        thread.join(timeout=5)
        second = threading.Thread(target=without)
        second.start()
        second.join(timeout=5)
    assert found == {"set before": theirs, "never set": None}
    theirs.close()


def test_an_error_in_the_block_puts_the_callers_loop_back():
    async def notebook():
        with pytest.raises(KeyError), EventLoop().in_this_thread():
            raise KeyError
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    policy = asyncio.get_event_loop_policy()
    assert asyncio.run(notebook()) is not None
    assert asyncio.get_event_loop_policy() is policy


def test_ctrl_c_ends_what_was_running():
    loop, ended = EventLoop(), []

    async def interrupted():
        try:
            asyncio.get_running_loop().call_soon(press)
            await asyncio.sleep(1000)
        finally:
            ended.append(True)

    def press():
        raise KeyboardInterrupt

    async def after():
        await asyncio.sleep(0)

    with loop.in_this_thread():
        with pytest.raises(KeyboardInterrupt):
            loop.run(interrupted())
        loop.run(after())
    assert ended == [True]
