"""The multi-turn tool loop: decode a turn, parse it, run its calls, feed the responses, again.

All rows of a batch take their turns together; the conversation continues on the
same key/value cache, so that every token passes through the model once. A row
speaks until its turn ends; then its calls run while others still speak, or it is finished.

With several hosts each keeps its share of the prompts, with all generations of them. They decode
together; after a turn's tools one all-gather of four numbers tells each of them how to go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import jax
import numpy as np

from grpo_jax import hosts
from grpo_jax.models.qwen import Level, Params
from grpo_jax.rollout.conversation import Conversation
from grpo_jax.rollout.parsing import Schema
from grpo_jax.rollout.sampler import PARTS, Cache, Sampler, Trunk, row_keys
from grpo_jax.tools import ToolRunner
from grpo_jax.types import PARSER_NAME, Message, Outcome, Status, ToolCall, ToolResult, Trajectory
from grpo_jax.update.batch import Tree, response_bucket, trunk_arrays


@dataclasses.dataclass(frozen=True)
class ToolLoop:
    """What a rollout needs besides weights and prompts.

    Args:
        sampler: its jitted functions.
        conversation: tokenizer and template.
        schemas: of all tools.
        runner: runs the calls.
        tree: the data set's preamble and buckets.
        max_iterations: tool turns per row; None for no limit but the budget.
        malformed_feedback: tell the model why a call did not parse instead of ending the row.
    """

    sampler: Sampler
    conversation: Conversation
    schemas: list[Schema]
    runner: ToolRunner
    tree: Tree
    max_iterations: int | None = None
    malformed_feedback: bool = False


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What `run_rollout` sampled, and the work that took.

    Args:
        trajectories: B = P·G, a group's rows next to each other, without rewards; of all hosts.
        row_steps: decode steps times the rows that took part in each.
        stop: a host was asked to stop before the last turn ended; the same on all of them.
    """

    trajectories: list[Trajectory]
    row_steps: int
    stop: bool = False

    @property
    def wasted_decode(self) -> float:
        """Share of the row-steps that sampled nothing: their row had ended its turn."""
        sampled = sum(t.sampled_tokens for t in self.trajectories)
        return 1 - sampled / self.row_steps if self.row_steps else 0.0


@dataclasses.dataclass
class _Row:
    """A trajectory that grows; frozen into a `Trajectory` at the end.

    Args:
        status: None until it is finished.
        speaking: its turn is being decoded; else its calls run, or it is finished.
        turn_start: where its turn begins in `completion_ids`.
        running: the turn's calls, with their results to come.
        feedback: what the model is told instead, when its call did not parse.
    """

    prompt_ids: list[int]
    schemas: list[Schema]
    completion_ids: list[int] = dataclasses.field(default_factory=list)
    sampled_mask: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    messages: list[Message] = dataclasses.field(default_factory=list)
    calls: list[tuple[ToolCall, ToolResult]] = dataclasses.field(default_factory=list)
    status: Status | None = None
    tool_turns: int = 0
    speaking: bool = True
    turn_start: int = 0
    running: list[tuple[ToolCall, Future[ToolResult]]] = dataclasses.field(default_factory=list)
    feedback: str | None = None

    def append(self, ids: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """Sampled tokens with their log-probabilities, or given ones (None)."""
        self.completion_ids += ids
        self.sampled_mask += [logprobs is not None] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs

    def frozen(self) -> Trajectory:
        return Trajectory(
            self.prompt_ids,
            self.completion_ids,
            self.sampled_mask,
            self.logprobs,
            self.messages,
            self.calls,
            self.status,
        )


def prefill_preamble(loop: ToolLoop, params: Params) -> Trunk:
    """Keys and values of the preamble, once per weight version; empty when nothing is shared."""
    if not loop.tree.T0:
        return ()
    arrays = trunk_arrays(loop.tree, [])
    tokens, valid = arrays["preamble"], arrays["preamble_valid"]
    positions = np.arange(loop.tree.T0, dtype=np.int32)[None]
    return _prefill(loop.sampler, params, (), tokens, positions, valid)


def run_rollout(
    loop: ToolLoop,
    params: Params,
    preamble: Trunk,
    prompts: Sequence[list[int]],
    draws: Sequence[int],
    *,
    generations: int = 1,
    seed: int = 0,
    schemas: Sequence[list[Schema]] | None = None,
    live: Sequence[bool] | None = None,
    on_turn: Callable[[int, int], None] = lambda finished, rows: None,
    stop: Callable[[], bool] = lambda: False,
) -> Rollout:
    """Sample G trajectories for each of P prompts, tools included; all hosts call it with the same arguments.

    Args:
        loop: sampler, tools and settings.
        params: rollout weights, from `sampler.export`.
        preamble: from `prefill_preamble` with the same weights.
        prompts: P lists of token ids.
        draws: [P] global draw index of each prompt, epoch · n + place in the epoch: with the
            seed, the generation and the position it decides a row's randomness.
        generations: G.
        seed: of the run.
        schemas: [P] of the tools that each prompt shows, the only ones that it may call; None for all.
        live: [P] False for prompts that only fill up the batch; they come back without tokens.
        on_turn: told (rows finished, rows) after every turn.
        stop: whether this host was asked to stop; asked after every turn.

    Raises:
        HostError: a tool worker of some host does not start; with one host its RuntimeError.
    """
    P, G = len(prompts), generations
    schemas = [loop.schemas] * P if schemas is None else schemas
    live = [True] * P if live is None else live
    own = hosts.share(list(zip(prompts, schemas, draws, live, strict=True)))
    rows = [_new_row(prompt, shown, is_live) for prompt, shown, _, is_live in own for _ in range(G)]
    own_draws = np.repeat([draw for _, _, draw, _ in own], G)
    put = loop.sampler.layout.put_rows
    trunk = preamble + _prefill_prompts(loop, params, preamble, prompts)
    keys = put(row_keys(seed, own_draws, np.tile(np.arange(G), len(own))))
    cache = loop.sampler.begin(
        put(np.array([r.prompt_ids[-1] for r in rows], np.int32)),
        put(np.array([len(r.prompt_ids) - 1 for r in rows], np.int32)),
    )
    loop.runner.start_step()
    row_steps, failure, stopped = 0, hosts.Failure(), False
    speaking = sum(map(bool, live)) * G  # on all hosts
    while speaking:
        cache, steps = _decode_turn(loop, params, trunk, cache, keys, rows, speaking, failure)
        responses: list[list[int]] = [[] for _ in rows]
        with failure:
            responses = [_respond(loop, row) for row in rows]
        speaking, longest, stopped = _agree(responses, failure, stop())
        if speaking:
            cache = _feed(loop.sampler, params, trunk, cache, rows, responses, longest)
        row_steps += steps
        on_turn(P * G - speaking, P * G)
    trajectories = hosts.gather(lambda: [r.frozen() for r in rows])
    return Rollout([t for of_host in trajectories for t in of_host], row_steps, stopped)


def _new_row(prompt: list[int], schemas: list[Schema], live: bool) -> _Row:
    row = _Row(list(prompt), schemas)
    row.status, row.speaking = (None, True) if live else (Status.ANSWERED, False)
    return row


def _agree(responses: Sequence[list[int]], failure: hosts.Failure, stop: bool) -> tuple[int, int, bool]:
    """Rows of all hosts that go on, the longest response of all, and whether any host was asked to stop."""
    lengths = [len(ids) for ids in responses]
    figures = hosts.agree([sum(n > 0 for n in lengths), max(lengths), failure.error is not None, stop])
    if figures[:, 2].any():
        failure.raise_everywhere()
    return int(figures[:, 0].sum()), int(figures[:, 1].max()), bool(figures[:, 3].any())


def _prefill(sampler, params, trunk, tokens, positions, valid) -> Trunk:
    layout = sampler.layout
    level = Level(*(layout.put(x, layout.replicated) for x in (tokens, positions, valid)), True)
    return ((sampler.prefill(params, trunk, level), level.valid),)


def _prefill_prompts(loop, params, preamble, prompts) -> Trunk:
    if not loop.tree.T1:
        return ()
    x = trunk_arrays(loop.tree, prompts)
    return _prefill(loop.sampler, params, preamble, x["prompts"], x["prompts_positions"], x["prompts_valid"])


def _decode_turn(
    loop: ToolLoop,
    params: Params,
    trunk: Trunk,
    cache: Cache,
    keys: jax.Array,
    rows: list[_Row],
    speaking: int,
    failure: hosts.Failure,
) -> tuple[Cache, int]:
    """Let every row that speaks come to the end of its turn; returns the cache and the row-steps.

    Decode comes back when half of all rows, and again when an eighth, still speak: the
    calls of those that have ended run while it goes on with the others. `speaking` counts
    the rows of all hosts, `rows` are this one's.
    """
    layout, row_steps = loop.sampler.layout, 0
    put, B = layout.put_rows, cache.length.shape[0]
    ends = [B // part for part in PARTS] + [0]
    while speaking:
        live = np.array([row.speaking for row in rows])
        left = np.array([loop.sampler.budget - len(row.completion_ids) for row in rows], np.int32)
        stop_at = np.int32(next(n for n in ends if n < speaking))
        cache, turn = loop.sampler.decode(params, trunk, cache, keys, put(live), put(left), stop_at)
        turn = layout.get_rows(turn)
        speaking, row_steps = int(turn.live), row_steps + int(turn.row_steps)
        for i in np.flatnonzero(live).tolist():
            n = turn.count[i]
            rows[i].append(turn.tokens[i, :n].tolist(), turn.logprobs[i, :n].tolist())
            if turn.stopped[i] or n == left[i]:
                with failure:
                    _end_turn(loop, rows[i], i, turn.stopped[i])
    return cache, row_steps


def _end_turn(loop: ToolLoop, row: _Row, i: int, stopped: bool) -> None:
    """Read row i's turn: its calls start to run, or it will be told why they do not parse, or it is finished."""
    row.speaking = False
    ids = row.completion_ids[row.turn_start :]
    if not stopped:
        row.status = Status.OVERLONG
        row.messages.append({"role": "assistant", "content": loop.conversation.decode(ids)})
        return
    parsed = loop.conversation.parse(ids, row.schemas)
    row.messages.append(loop.conversation.assistant_message(parsed))
    spent = loop.max_iterations is not None and row.tool_turns >= loop.max_iterations
    if parsed.error and loop.malformed_feedback and not spent:
        row.feedback = f"Error: the tool call does not parse: {parsed.error}"
    elif parsed.error:
        row.status = Status.MALFORMED_CALL
    elif not parsed.calls:
        row.status = answered(row.calls)
    elif spent:
        row.status = Status.TOOL_LIMIT
    else:
        results = loop.runner.submit(parsed.calls, [i] * len(parsed.calls))
        row.running = list(zip(parsed.calls, results, strict=True))


def answered(calls: Sequence[tuple[ToolCall, ToolResult]]) -> Status:
    """The status after a closed turn without a call; the last call's outcome says what it rests on."""
    last = calls[-1][1].outcome if calls else Outcome.OK
    if last is Outcome.TIMEOUT:
        return Status.TOOL_TIMEOUT
    return Status.ANSWERED if last is Outcome.OK else Status.TOOL_ERROR


def _results(row: _Row) -> list[tuple[str, str]]:
    """Wait for what answers a row's turn: (tool name, text) of each call."""
    if row.feedback is not None:
        feedback, row.feedback = row.feedback, None
        return [(PARSER_NAME, feedback)]
    done = [(call, result.result()) for call, result in row.running]
    row.calls += done
    row.running = []
    return [(call.name, result.text) for call, result in done]


def _respond(loop: ToolLoop, row: _Row) -> list[int]:
    """Append a row's tool responses as the template writes them, if they fit its budget.

    Returns:
        Their ids, [] where the row is finished.
    """
    if row.status is not None:
        return []
    results = _results(row)
    row.tool_turns += 1
    row.messages += [{"role": "tool", "name": name, "content": text} for name, text in results]
    ids = loop.conversation.response_ids(results)
    if len(row.completion_ids) + len(ids) >= loop.sampler.budget:  # at least one token must follow
        row.status = Status.OVERLONG_TOOL_RESPONSE
        return []
    row.append(ids, None)
    row.speaking, row.turn_start = True, len(row.completion_ids)
    return ids


def _feed(
    sampler: Sampler, params: Params, trunk: Trunk, cache: Cache, rows, responses, longest: int
) -> Cache:
    """Put the pending token and the responses, but for their last token, into the cache."""
    width = response_bucket(longest)
    tokens = np.zeros((len(rows), width), np.int32)
    for i, (row, ids) in enumerate(zip(rows, responses, strict=True)):
        if ids:  # the pending token is the one before the response
            tokens[i, : len(ids)] = row.completion_ids[-len(ids) - 1 : -1]
    count = np.array([len(ids) for ids in responses], np.int32)
    last = np.array([ids[-1] if ids else 0 for ids in responses], np.int32)
    put = sampler.layout.put_rows
    return sampler.append(params, trunk, cache, put(tokens), put(count), put(last))
