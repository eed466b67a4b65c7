"""Tools that answer an equal call differently are found, and reported once."""

from concurrent.futures import Future

import pytest

from grpo_jax.tools import PurityCheck, Toolbox, ToolRunner
from grpo_jax.tools.runner import PURITY_SAMPLE
from grpo_jax.types import Outcome, ToolCall, ToolResult

ran = []


def pure(n: int) -> str:
    """Double."""
    ran.append("pure")
    return str(2 * n)


def counting(n: int) -> str:
    """Count the calls."""
    ran.append("counting")
    return f"call {ran.count('counting')} with {n} " + "x" * 300


def fickle(n: int) -> str:
    """Work once, then fail."""
    ran.append("fickle")
    if ran.count("fickle") > 1:
        raise RuntimeError("not again")
    return "fine"


def leaving(n: int) -> str:
    """Work once, then leave."""
    ran.append("leaving")
    if ran.count("leaving") > 1:
        raise SystemExit(1)
    return "fine"


class Account:
    def put(self, n: int) -> str:
        """Put."""
        return str(n)


@pytest.fixture
def check():
    """Runs a step's calls and checks them; returns the count of that step and the lines so far."""
    ran.clear()
    tools = Toolbox({f.__name__: f for f in (pure, counting, fickle, leaving)}, [], "a test")
    lines = []
    with ToolRunner(tools, "inline") as runner:
        purity = PurityCheck(tools, runner, lines.append)

        def step(*names, n=1):
            runner.start_step()
            calls = [ToolCall(name, {"n": n}) for name in names]
            purity.start(zip(calls, runner.run(calls), strict=True))
            return purity.finish(), lines

        yield step


def test_functions_that_differ_are_counted_each_step_and_reported_once(check):
    assert check("pure", "counting", "pure", "fickle")[0] == 2
    assert check("counting", "pure")[0] == 1
    count, lines = check("pure")
    assert count == 0 and len(lines) == 2
    assert lines[0].startswith(
        'Warning: the tool counting is not pure: with {"n": 1} it returned \'call 1 with 1 xxx'
    )
    assert "and then 'call 2 with 1 xxx" in lines[0] and len(lines[0]) < 700
    assert "tool fickle is not pure" in lines[1] and "'fine' and then 'Error: fickle raised" in lines[1]


def test_one_good_call_of_each_function_is_run_again(check):
    check("pure", "pure", "counting", "unknown")
    assert sorted(ran) == ["counting", "counting", "pure", "pure"]  # equal calls ran once before
    ran.clear()
    check("pure", n="no number")
    assert ran == []


def test_a_second_run_that_crashes_proves_nothing(check):
    assert check("leaving") == (0, [])


def test_the_sample_is_small():
    class Runner:
        def submit(self, calls, again):
            self.calls = calls
            futures = [Future() for _ in calls]
            for future in futures:
                future.set_result(ToolResult("x", Outcome.OK, 0.0))
            return futures

    runner = Runner()
    purity = PurityCheck(Toolbox({}, [], "a test"), runner, None)
    purity.start((ToolCall(f"f{i}", {}), ToolResult("x", Outcome.OK, 0.0)) for i in range(100))
    assert purity.finish() == 0
    assert [call.name for call in runner.calls] == [f"f{i}" for i in range(PURITY_SAMPLE)]


def test_tools_with_state_are_refused():
    tools = Toolbox({"put": Account().put}, [], "account.py")
    with pytest.raises(
        ValueError, match=r"verify_purity needs tools without state, and those of account\.py"
    ):
        PurityCheck(tools, None, None)
