"""Times the tool layer: 512 distinct financial calls, and a batch with one hanging call.

    python benchmarks/tools.py

Limits on 2 cores: the calls in under 0.3 s, the hanging call's batch in at most its time limit + 0.6 s.
"""

import json
import tempfile
import time
from pathlib import Path

from grpo_jax.tools import Limits, ToolRunner, load_tools
from grpo_jax.types import Outcome, ToolCall

DATA = Path(__file__).resolve().parents[1] / "data" / "financial_train.jsonl"
CALLS = 512
TIME_LIMIT = 1.0  # seconds
HANGING = '''
def double(n: int) -> str:
    """Double a number."""
    return str(2 * n)

def hang() -> str:
    """Never answer."""
    while True:
        pass

TOOL_FUNCTIONS = [double, hang]
'''


def gold_calls(count: int) -> list[ToolCall]:
    """The first distinct gold calls of the default job's training data."""
    gold = [json.loads(line)["tool_call"] for line in DATA.read_text().splitlines()]
    distinct = {json.dumps(call): ToolCall(call["name"], call["arguments"]) for call in gold}
    return list(distinct.values())[:count]


def time_batch(runner: ToolRunner, calls: list[ToolCall], outcome: Outcome) -> float:
    """Seconds for one batch; the first call must have the given outcome, the others be fine."""
    start = time.perf_counter()
    results = runner.run(calls)
    seconds = time.perf_counter() - start
    outcomes = [r.outcome for r in results]
    if outcomes != [outcome] + [Outcome.OK] * (len(calls) - 1):
        raise RuntimeError(f"calls ended as {set(outcomes)}")
    return seconds


def financial() -> None:
    """Print the seconds of 512 distinct calls, with and without the workers' start."""
    calls = gold_calls(CALLS)
    with ToolRunner(load_tools(module="tools_funcs.financial_tools_complex")) as runner:
        cold = time_batch(runner, calls, Outcome.OK)
        warm = []
        for _ in range(5):
            runner.start_step()
            warm.append(time_batch(runner, calls, Outcome.OK))
    print(
        f"{len(calls)} distinct financial calls: {min(warm):.3f} to {max(warm):.3f} s; first batch {cold:.3f} s"
    )


def hanging() -> None:
    """Print how long one hanging call among 256 delays its batch, and the batch after it."""
    calls = [ToolCall("double", {"n": n}) for n in range(256)]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "hanging_tools.py"
        script.write_text(HANGING)
        with ToolRunner(load_tools(script=script), limits=Limits(seconds=TIME_LIMIT)) as runner:
            time_batch(runner, calls, Outcome.OK)
            runner.start_step()
            delayed = time_batch(runner, [ToolCall("hang", {}), *calls], Outcome.TIMEOUT)
            runner.start_step()
            after = time_batch(runner, calls, Outcome.OK)
    print(
        f"one hanging call, limit {TIME_LIMIT:g} s: limit + {delayed - TIME_LIMIT:.3f} s; next batch {after:.3f} s"
    )


if __name__ == "__main__":
    financial()
    hanging()
