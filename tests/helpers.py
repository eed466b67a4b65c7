"""Small pieces that several test files share: a two-layer model, a tool loop, a scripted sampler."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.lora import LoraConfig, init_adapters
from grpo_jax.models.qwen import ModelConfig, Params, abstract_params
from grpo_jax.models.scratch import Sizes, make_tiny_checkpoint
from grpo_jax.models.sharding import Layout, make_mesh
from grpo_jax.rollout import sampler as sampler_module
from grpo_jax.rollout.conversation import Conversation, load_conversation
from grpo_jax.rollout.loop import Rollout, ToolLoop, make_policy, roll_out
from grpo_jax.rollout.sampler import Sampler, make_sampler
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.tools import Limits, Toolbox, ToolRunner, get_schema
from grpo_jax.types import Example, Message, Prompt, Schema, Status, ToolCall, Trajectory
from grpo_jax.update.batch import Tree, make_tree
from tools_funcs.math_tools import add, multiply

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
BUDGET = 256
FREE = -1  # in a script: the token is left to the sampler
QUESTIONS = ["What is 3 plus 4?", "Multiply 12 by 30 and add 7 to the product, please.", "Add 5 and 6."]


def echo(text: str) -> str:
    """Say a text back.

    Args:
        text: What to say.
    """
    return text


def fail(why: str) -> str:
    """Fail.

    Args:
        why: The reason.
    """
    raise RuntimeError(why)


def nap(seconds: float) -> str:
    """Sleep.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "rested"


TOOLS = (add, multiply, echo, fail, nap)
SCHEMAS = [get_schema(f) for f in TOOLS]


def messages(question: str) -> list[Message]:
    """A prompt of one user message."""
    return [{"role": "user", "content": question}]


@functools.cache
def _tiny() -> tuple[Conversation, ModelConfig]:
    texts = [json.dumps(SCHEMAS), *QUESTIONS, "You may call one or more functions. assistant user system"] * 3
    with tempfile.TemporaryDirectory() as folder:
        shape = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64}
        model = make_tiny_checkpoint(Path(folder) / "model", texts, Sizes(vocab_size=512, **shape))
        config = json.loads((model / "config.json").read_text())
        return load_conversation(model), ModelConfig.from_hf(config)


def conversation() -> Conversation:
    """Tokenizer and template of a tiny checkpoint, made once."""
    return _tiny()[0]


def config() -> ModelConfig:
    """The sizes of that checkpoint."""
    return _tiny()[1]


def random_weights(cfg: ModelConfig, seed: int) -> Params:
    """Stacked float32 weights, large enough that no distribution is all but uniform."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean, std = (1, 0.1) if path[-1].key == "scale" else (0, leaf.shape[-1] ** -0.5)
        return jnp.asarray(rng.normal(mean, std, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def random_adapters(layers: Params, lora: LoraConfig, seed: int = 0) -> Params:
    """Stacked float32 adapters, B not zero, whose product is about as large as the weights."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)

    return jax.tree.map(draw, jax.eval_shape(lambda: init_adapters(layers, lora, seed=0)))


@functools.cache
def weights() -> Params:
    """The weights of the tiny model."""
    return random_weights(config(), seed=1)


@functools.cache
def layouts() -> tuple[Layout, Layout]:
    """(training, rollout) on one device."""
    mesh = make_mesh()
    return Layout(mesh), Layout(mesh, rollout=True)


@functools.cache
def prompts() -> tuple[list[int], ...]:
    """The token ids of `QUESTIONS`, tools included."""
    return tuple(conversation().prompt_ids(messages(q), SCHEMAS) for q in QUESTIONS)


@functools.cache
def tree() -> Tree:
    """The prefix tree of `prompts`."""
    return make_tree(prompts(), BUDGET)


def new_sampler(dtype=FLOAT32, compact=False, **sampling) -> Sampler:
    """A sampler of the tiny model."""
    return make_sampler(
        config(),
        layouts()[1],
        dtype=dtype,
        sampling=Sampling(**sampling),
        stop_ids=conversation().stop_ids,
        budget=BUDGET,
        compact=compact,
    )


def tool_loop(sampler: Sampler, drafts: bool = False, **settings) -> ToolLoop:
    """A tool loop with `TOOLS`, run in this process with 0.2 s for a call."""
    toolbox = Toolbox({f.__name__: f for f in TOOLS}, SCHEMAS, "tests/helpers.py")
    runner = ToolRunner(toolbox, "inline", Limits(seconds=0.2))
    return ToolLoop(sampler, conversation(), runner, tree(), drafts=drafts, **settings)


def prompt(ids: Sequence[int], draw: int = 0, schemas: Sequence[Schema] = SCHEMAS) -> Prompt:
    """A prompt of given tokens."""
    return Prompt(Example([], ""), list(ids), list(schemas), draw)


def trajectory(prompt_ids, completion_ids, sampled_mask, logprobs, advantage=0.0, status=Status.ANSWERED):
    """A completion of given tokens."""
    of = prompt(prompt_ids)
    return Trajectory(of, completion_ids, sampled_mask, logprobs, status=status, advantage=advantage)


def roll_out_weights(
    loop: ToolLoop, params: Params, ids: Sequence[list[int] | None], draws, **settings
) -> Rollout:
    """A rollout of prompts given as token ids under training weights; None fills up."""
    policy = make_policy(loop, loop.sampler.export(params))
    prompts = [one and prompt(one, draw) for one, draw in zip(ids, draws, strict=True)]
    return roll_out(loop, policy, prompts, **settings)


def rollout(loop: ToolLoop, ids: Sequence[list[int] | None], draws=(0, 1), **settings) -> list[Trajectory]:
    """Export, preamble and rollout in one call."""
    return roll_out_weights(loop, weights(), ids, draws, **settings).trajectories


class Script:
    """Decides what each row samples, and counts what passes through `extend`.

    The sampler's own loop runs, with its cache, stops and log-probabilities; only the
    drawn token is replaced. A row whose script has ended samples the end-of-turn token.
    A row is known by its key: decode may put few rows into other places.
    """

    def __init__(self, **settings):
        self.load([])
        sampler_module._functions_of.cache_clear()  # new functions, so that what is patched is traced
        made = new_sampler(**settings)
        sampler_module._functions_of.cache_clear()
        self.sampler = dataclasses.replace(
            made,
            prefill=self._patched(made.prefill),
            decode=self._knowing_rows(self._patched(made.decode)),
            append=self._patched(made.append),
        )

    def load(self, rows: Sequence[Sequence[int]]) -> None:
        """Start over with the tokens of each row, all turns in one list."""
        self._rows = [list(row) for row in rows]
        self._given: dict[tuple[int, int], int] = {}
        self.shared: Counter = Counter()  # (rows of the level, row, position, token) of shared levels
        self.fed: Counter = Counter()  # (position, token) of the completions' level, whose rows change places

    def _patched(self, function):
        def call(*args, **kwargs):  # the names are looked up while tracing
            with (
                mock.patch.object(sampler_module, "sample", self._sample),
                mock.patch.object(sampler_module, "extend", self._extend),
            ):
                return function(*args, **kwargs)

        return call

    def _knowing_rows(self, decode):
        def call(params, trunk, cache, keys, *rest, **rows):
            self._row_of = {key.tobytes(): row for row, key in enumerate(np.asarray(keys))}
            return decode(params, trunk, cache, keys, *rest, **rows)

        return call

    def _sample(self, logits, keys, positions, sampling, constrain, sample=sampler_module.sample):
        token, logprob = sample(logits, keys, positions, sampling, constrain)
        shape = jax.ShapeDtypeStruct(positions.shape, jnp.int32)
        forced = jax.pure_callback(self._next, shape, keys, positions)
        table = jax.nn.log_softmax(logits / sampling.values[0])
        of_forced = jnp.take_along_axis(table, forced[:, None], 1)[:, 0]
        return jnp.where(forced == FREE, token, forced), jnp.where(forced == FREE, logprob, of_forced)

    def _next(self, keys, positions) -> np.ndarray:
        """A row that does not run asks again at its last position and gets the same token."""
        rows = [self._row_of[key.tobytes()] for key in np.asarray(keys)]
        keys = list(zip(rows, np.asarray(positions).tolist(), strict=True))
        for row, position in keys:
            if (row, position) not in self._given:
                left = self._rows[row] if row < len(self._rows) else []
                self._given[row, position] = left.pop(0) if left else conversation().stop_ids[0]
        return np.array([self._given[key] for key in keys], np.int32)

    def _extend(self, params, levels, *args, extend=sampler_module.extend, **kwargs):
        for level in levels:
            record = functools.partial(self._record, level.shared)
            jax.debug.callback(record, level.tokens, level.positions, level.valid)
        return extend(params, levels, *args, **kwargs)

    def _record(self, shared, *arrays) -> None:
        tokens, positions, valid = map(np.asarray, arrays)
        for row, at in zip(*np.nonzero(valid), strict=True):
            key = int(positions[row, at]), int(tokens[row, at])
            if shared:
                self.shared[len(tokens), int(row), *key] += 1
            else:
                self.fed[key] += 1


def call_ids(name: str, content: str = "", **arguments) -> list[int]:
    """The tokens of a model turn that calls one tool, end-of-turn token included."""
    return conversation().assistant_ids(content, [ToolCall(name, arguments)])


def text_ids(text: str) -> list[int]:
    """The tokens of a model turn that only says something."""
    return conversation().assistant_ids(text, [])
