"""Opens a model, a checkpoint or adapters for conversations, in a terminal or for clients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from grpo_jax import hosts
from grpo_jax.rollout.chat import Chat, Limits
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.run.compiling import watch_compiles
from grpo_jax.run.config import ResolvedConfig
from grpo_jax.run.console import Console
from grpo_jax.run.job import SCRATCH, Inputs, Job, open_job
from grpo_jax.run.log import PhaseTimer
from grpo_jax.tools import load_tools
from grpo_jax.update.batch import make_tree

LONGEST = 131_072  # tokens of a conversation with a model that names no limit


@contextlib.contextmanager
def open_chat(
    command: str, resolved: ResolvedConfig, console: Console
) -> Iterator[tuple[Job, Chat, Sampling]]:
    """A conversation with the model and the tools that the options name, and how it is sampled.

    The job's `sampler` makes others for the same conversation.

    Raises:
        ValueError, FileNotFoundError: bad input; says what, where, and the fix.
    """
    given = resolved.config
    if not hosts.alone():
        raise ValueError(
            f"{command} runs in one process; start it on one host, without a cluster's variables"
        )
    if given.required("model_name_or_path") == SCRATCH:
        raise ValueError("model_name_or_path must be a trained model to chat with, got 'scratch'")
    # a person may ask the same twice and expect a tool to look again
    config = dataclasses.replace(given, tool_cache=False, verify_purity=False)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p or 0.0)
    if not resolved.by_flag("temperature"):  # a run's file has that of its training
        sampling = dataclasses.replace(sampling, temperature=0)
    timer = PhaseTimer()
    toolbox = load_tools(config.tools_script, config.tool_functions_module)
    job = open_job(config, console, timer, Inputs(toolbox, [], [], None))
    with watch_compiles(console, timer), job.runner:
        schemas, system = toolbox.schemas, config.system_prompt
        opening = [] if system is None else [{"role": "system", "content": system}]
        prompts = [
            job.conversation.prompt_ids([*opening, {"role": "user", "content": text}], schemas)
            for text in "ab"
        ]
        longest = job.model.positions or LONGEST
        job = dataclasses.replace(job, config=dataclasses.replace(config, max_grpo_completion_length=longest))
        loop = job.tool_loop(job.sampler(sampling), make_tree(prompts, longest, job.row_devices))
        limits = Limits(config.max_grpo_completion_length, job.model.positions)
        params = loop.sampler.export(job.load_params())
        yield job, Chat(loop, params, schemas, system, limits, config.seed), sampling
