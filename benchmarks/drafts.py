"""Decode with drafts and without: passes and seconds of a job's gold conversations, written again by the sampler.

    python benchmarks/drafts.py                            # the default job: 8 tools, some 6,000 preamble tokens
    python benchmarks/drafts.py --job maths --prompts 4    # the quickstart's job

The model is the narrow one of benchmarks/step.py with random weights; the sampler's own decode program runs, and each
drawn token is replaced by that of the gold conversation: calls, what the real tools return, and the answer. All
completions of a prompt write the same at the same time, so that none can copy from another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import scripted
from job import MODELS, VOCABULARY, compute_dtype, narrow, random_weights

from grpo_jax.data.gold import run_gold_calls
from grpo_jax.data.rows import load_examples
from grpo_jax.models.qwen import ModelConfig
from grpo_jax.models.scratch import Sizes, make_tiny_checkpoint
from grpo_jax.models.sharding import Layout, make_mesh
from grpo_jax.rollout import loop as loop_module
from grpo_jax.rollout import sampler as sampler_module
from grpo_jax.rollout.conversation import Conversation, load_conversation
from grpo_jax.rollout.loop import ToolLoop, make_policy, roll_out
from grpo_jax.rollout.sampler import make_sampler
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.tools import Toolbox, ToolRunner, load_tools
from grpo_jax.types import Prompt
from grpo_jax.update.batch import make_tree

JOBS = {
    "financial": ("data/financial_test.jsonl", "tools_funcs.financial_tools_complex"),
    "maths": ("data/math_test.jsonl", "tools_funcs.math_tools"),
}


@dataclasses.dataclass(frozen=True)
class Gold:
    """A job's first rows, and what follows each prompt in its gold conversation."""

    prompts: list[Prompt]
    script: list[list[int]]
    toolbox: Toolbox


def gold(conversation: Conversation, name: str, rows: int, generations: int) -> Gold:
    """The gold conversations of a job, each once for every completion."""
    path, module = JOBS[name]
    toolbox, examples = load_tools(module=module), load_examples(path)[:rows]
    with ToolRunner(toolbox) as runner:
        calls = run_gold_calls(examples, toolbox.functions, runner)
    prompts, script = [], []
    for draw, (example, pairs) in enumerate(zip(examples, calls, strict=True)):
        ids = conversation.prompt_ids(example.messages, toolbox.schemas)
        prompts.append(Prompt(example, ids, toolbox.schemas, draw))
        written = conversation.assistant_ids("", [call for call, _ in pairs])
        written += conversation.response_ids([(call.name, result.text) for call, result in pairs])
        written += conversation.assistant_ids(example.answer, [])
        script += [written] * generations
    return Gold(prompts, script, toolbox)


def tokenizer_of(folder: str | None, name: str) -> Conversation:
    """The tokenizer in a folder, or a fresh one of the job's texts."""
    if folder is not None:
        return load_conversation(folder)
    path, module = JOBS[name]
    toolbox, examples = load_tools(module=module), load_examples(path)
    texts = [json.dumps(toolbox.schemas)] * 8
    texts += [message["content"] for example in examples for message in example.messages]
    with tempfile.TemporaryDirectory() as made:
        return load_conversation(make_tiny_checkpoint(Path(made) / "model", texts, Sizes(vocab_size=4096)))


def measure(cfg: ModelConfig, conversation: Conversation, job: Gold, repeats: int) -> dict[str, Any]:
    """Median seconds of a rollout and of a decode pass, and tokens that a pass adds to a row, with drafts and without."""
    G, budget = len(job.script) // len(job.prompts), max(map(len, job.script)) + 16
    # one prompt alone would be all preamble
    tree = make_tree([*(prompt.ids for prompt in job.prompts), [*job.prompts[0].ids[:-40], 0]], budget)
    made = make_sampler(
        cfg,
        Layout(make_mesh(), rollout=True),
        dtype=compute_dtype(),
        sampling=Sampling(),
        stop_ids=conversation.stop_ids,
        budget=budget,
    )
    params = made.export(random_weights(cfg))
    found: dict[str, list[tuple[float, ...]]] = {"with": [], "without": []}
    force = mock.patch.object(sampler_module, "sample", scripted.forced(job.prompts, job.script))
    with force, ToolRunner(job.toolbox) as runner:
        loop = ToolLoop(made, conversation, runner, tree)
        policy = jax.block_until_ready(make_policy(loop, params))
        for repeat in range(repeats + 1):
            for kind, measured in found.items():
                with mock.patch.object(loop_module, "pays", lambda rows, known, kind=kind: kind == "with"):
                    began = time.perf_counter()
                    rollout = roll_out(loop, policy, job.prompts, generations=G)
                    seconds = time.perf_counter() - began
                got = [trajectory.completion_ids for trajectory in rollout.trajectories]
                assert got == job.script, "a completion left its script"
                if repeat:  # the first compiles
                    measured.append((seconds, rollout.step_seconds, rollout.work.tokens_per_pass or 0.0))
    names = ("seconds", "pass_seconds", "tokens_per_pass")
    return {
        kind: dict(zip(names, map(statistics.median, zip(*measured, strict=True)), strict=True))
        for kind, measured in found.items()
    } | {"sampled": sum(trajectory.sampled_tokens for trajectory in rollout.trajectories)}


def main(argv: list[str] | None = None) -> None:
    """Roll the gold conversations out with drafts and without, in turn, and print passes and seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", choices=JOBS, default="financial", help="(default financial)")
    parser.add_argument("--prompts", type=int, default=1, help="P (default 1)")
    parser.add_argument("--generations", type=int, default=8, help="G (default 8)")
    parser.add_argument("--model", choices=MODELS, help="a model of this published size instead")
    parser.add_argument("--layers", type=int, default=4, help="of width 128 (default 4)")
    parser.add_argument("--tokenizer", help="folder of a published tokenizer, instead of a fresh one")
    parser.add_argument("--repeats", type=int, default=3, help="timed rollouts of each kind (default 3)")
    args = parser.parse_args(argv)
    conversation = tokenizer_of(args.tokenizer, args.job)
    job = gold(conversation, args.job, args.prompts, args.generations)
    cfg = MODELS[args.model] if args.model else narrow(VOCABULARY, args.layers)
    found = measure(cfg, conversation, job, args.repeats)
    print(
        f"{args.job}: {args.prompts} × {args.generations} completions, {found['sampled']} sampled tokens, prompts of "
        f"{max(len(prompt.ids) for prompt in job.prompts)} tokens"
    )
    for kind in ("with", "without"):
        of = found[kind]
        print(
            f"{kind} drafts: {of['tokens_per_pass']:.2f} tokens a pass, {of['pass_seconds'] * 1000:.2f} ms a pass, "
            f"rollout {of['seconds']:.2f} s"
        )
    print(f"without over with: {found['without']['seconds'] / found['with']['seconds']:.2f}")


if __name__ == "__main__":
    main()
