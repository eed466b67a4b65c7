"""A rollout whose completions take unequal turns: decode steps and wall time, with quick tools and with slow ones.

    python benchmarks/turns.py        # about a minute on 2 idle cores

64 completions (8 × 8) of 1 to 6 turns whose lengths are log-normal. What they sample is scripted: the sampler's
own decode program runs, and each drawn token is replaced by one from a table. Steps are compared with the tokens
that the longest completion samples, which no schedule can undercut; slow tools sleep in a quarter of the turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import scripted
from job import compute_dtype, narrow, random_weights

from grpo_jax.models.scratch import Sizes, make_tiny_checkpoint
from grpo_jax.models.sharding import Layout, make_mesh
from grpo_jax.rollout import sampler as sampler_module
from grpo_jax.rollout.conversation import Conversation, load_conversation
from grpo_jax.rollout.delays import ToolDelays
from grpo_jax.rollout.loop import Policy, Rollout, ToolLoop, make_policy, roll_out
from grpo_jax.rollout.sampler import make_sampler
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.tools import Toolbox, ToolRunner, get_schema
from grpo_jax.types import Example, Prompt, ToolCall
from grpo_jax.update.batch import make_tree

P, G, BUDGET = 8, 8, 1024
MOST_TURNS, MEDIAN, SIGMA = (
    6,
    40,
    0.8,
)  # turns of a completion; tokens of a turn, and the spread of their logarithm
SLOW_TURNS = 0.25
WORKERS = 16  # sleeping tools need no core


def look_up(key: int) -> str:
    """Look a key up.

    Args:
        key: The key.
    """
    return f"The value of key {key} is {7 * key}."


def fetch(key: int) -> str:
    """Fetch a key from far away.

    Args:
        key: The key.
    """
    return look_up(key)


def slow_fetch(seconds: float) -> Callable[[int], str]:
    """`fetch` that takes so long."""

    def fetch(key: int) -> str:
        time.sleep(seconds)
        return f"The value of key {key} is {7 * key}."

    return fetch


SCHEMAS = [get_schema(look_up), get_schema(fetch)]


def tiny_conversation() -> Conversation:
    """Tokenizer and template of a fresh model."""
    texts = [json.dumps(SCHEMAS), "The value of key 12345 is 67890. What is the value of key 1?"] * 3
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_checkpoint(Path(folder) / "model", texts, Sizes(vocab_size=600))
        return load_conversation(model)


def script_of(conversation: Conversation, seed: int) -> list[list[int]]:
    """What follows each prompt, responses included, as [P·G] lists of tokens."""
    rng = np.random.default_rng(seed)
    filler, rows = conversation.encode_plain("a")[0], []
    for row in range(P * G):
        ids: list[int] = []
        turns = int(rng.integers(1, MOST_TURNS + 1))
        for turn in range(turns):
            name = "fetch" if rng.random() < SLOW_TURNS else "look_up"
            key, length = 100 + MOST_TURNS * row + turn, int(rng.lognormal(np.log(MEDIAN), SIGMA))
            calls = [ToolCall(name, {"key": key})] if turn < turns - 1 else []
            call = conversation.assistant_ids("", calls)
            ids += [filler] * max(length - len(call), 0) + call
            if calls:
                ids += conversation.response_ids([(name, look_up(key))])
        rows.append(ids)
    return rows


class Workload:
    """The scripted rollout on one sampler, run again and again."""

    def __init__(self, layers: int, seed: int):
        self.conversation = tiny_conversation()
        self.script = script_of(self.conversation, seed)
        questions = [f"What is the value of key {i}?" for i in range(P)]
        ids = [self.conversation.prompt_ids([{"role": "user", "content": q}], SCHEMAS) for q in questions]
        self.prompts = [Prompt(Example([], ""), one, SCHEMAS, draw) for draw, one in enumerate(ids)]
        self.tree = make_tree(ids, BUDGET)
        cfg = narrow(4096, layers)
        self.sampler = make_sampler(
            cfg,
            Layout(make_mesh(), rollout=True),
            dtype=compute_dtype(),
            sampling=Sampling(),
            stop_ids=self.conversation.stop_ids,
            budget=BUDGET,
        )
        self.params = self.sampler.export(random_weights(cfg))
        self.steps = 0

    def run(self, runner: ToolRunner, delays: ToolDelays) -> tuple[float, Rollout]:
        """(seconds, rollout); adds its decode steps to `steps`."""

        def decode(*args: Any, rows: int) -> Any:
            cache, turn = self.sampler.decode(*args, rows=rows)
            self.steps += int(turn.row_steps) // rows
            return cache, turn

        counting = dataclasses.replace(self.sampler, decode=decode)
        loop = ToolLoop(counting, self.conversation, runner, self.tree, drafts=False, delays=delays.steps)
        with mock.patch.object(sampler_module, "sample", scripted.forced(self.prompts, self.script)):
            policy: Policy = jax.block_until_ready(make_policy(loop, self.params))
            began = time.perf_counter()
            rollout = roll_out(loop, policy, self.prompts, generations=G)
            seconds = time.perf_counter() - began
        for trajectory, ids in zip(rollout.trajectories, self.script, strict=True):
            assert trajectory.completion_ids == ids, "a completion left its script"
        return seconds, rollout


def runner_of(seconds: float) -> ToolRunner:
    """Runs the tools, `fetch` with a sleep."""
    functions = {"look_up": look_up, "fetch": slow_fetch(seconds)}
    return ToolRunner(Toolbox(functions, SCHEMAS, "benchmarks/turns.py"), workers=WORKERS)


def main(argv: list[str] | None = None) -> None:
    """Run the workload with quick tools and with slow ones, in turn, and print steps and seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="of width 128 (default 4)")
    parser.add_argument("--sleep", type=float, default=0.2, help="seconds of a slow tool (default 0.2)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rollouts of each kind (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the script (default 0)")
    args = parser.parse_args(argv)
    work = Workload(args.layers, args.seed)
    times: dict[str, list[float]] = {"quick": [], "slow": []}
    with runner_of(0.0) as quick, runner_of(args.sleep) as slow:
        runners = {"quick": quick, "slow": slow}
        delays = dict.fromkeys(runners, ToolDelays())
        steps: dict[str, int] = {}
        for repeat in range(args.repeats + 1):
            for kind, runner in runners.items():
                work.steps = 0
                seconds, rollout = work.run(runner, delays[kind])
                delays[kind] = delays[kind].after(rollout)
                steps[kind] = work.steps
                if repeat:  # the first compiles
                    times[kind].append(seconds)
    sampled = [t.sampled_tokens for t in rollout.trajectories]
    print(f"{P} × {G} completions, {sum(sampled)} sampled tokens, the longest {max(sampled)}")
    for kind in runners:
        known = {name: n for name, n in delays[kind].steps.items() if n}
        print(
            f"{kind} tools: {steps[kind]} decode steps, {steps[kind] / max(sampled):.2f} times the longest's tokens; "
            f"{statistics.median(times[kind]):.2f} s ({min(times[kind]):.2f} to {max(times[kind]):.2f}); "
            f"wasted_decode {rollout.work.wasted:.2f}; delays {known}"
        )
    print(f"slow over quick: {statistics.median(times['slow']) / statistics.median(times['quick']):.3f}")


if __name__ == "__main__":
    main()
