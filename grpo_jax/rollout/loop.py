"""The multi-turn tool loop: decode, parse the turns that have ended, run their calls, feed the responses, again.

Each completion takes its turns at its own pace, on the same key/value cache, so that every token passes
through the model once. Decode returns when some turns have ended: their calls run, and the results that are due are
fed, while the other turns continue. Which results are due depends on the tokens and on `ToolLoop.delays`, never on
how long a call happens to take: batch shapes decide the last bits of what is sampled.

With several hosts each keeps its share of the prompts, with all completions of them. They decode
together; at each return one all-gather of seven numbers tells each of them how to continue.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax import hosts
from grpo_jax.data.gold import CallAndResult
from grpo_jax.models.level import Level
from grpo_jax.models.qwen import Params
from grpo_jax.rollout.conversation import Conversation
from grpo_jax.rollout.drafts import known_texts, pays
from grpo_jax.rollout.sampler import Cache, Decoded, Sampler, Trunk
from grpo_jax.rollout.sampling import row_keys
from grpo_jax.tools import ToolRunner
from grpo_jax.types import (
    PARSER_NAME,
    Outcome,
    ParsedTurn,
    Prompt,
    Status,
    ToolCall,
    ToolResult,
    Trajectory,
)
from grpo_jax.update.batch import Tree, preamble_level, prompts_level, response_bucket

# Decode returns once one in RETURN_AT of the decoding completions has ended its turn: sooner costs more returns, later
# more steps in which they only wait (docs/log.md).
RETURN_AT = 8


@dataclasses.dataclass(frozen=True)
class ToolLoop:
    """What a rollout needs in addition to weights and prompts.

    Args:
        max_iterations: tool turns per completion; None for no limit but the budget.
        malformed_feedback: report to the model why a call did not parse instead of ending the completion.
        stop_after_tools: end a completion when the results of its first turn of calls are in.
        final_tools: tools whose call ends a completion -> the parameter that is its answer.
        limit: tokens that a completion may have, where that is less than the sampler's budget.
        max_turn: tokens that one turn may have; None for no limit but the budget.
        drafts: verify drafts where `drafts.pays`.
        delays: slow tools -> decode steps that others may take before its results are waited for; see `ToolDelays`.
    """

    sampler: Sampler
    conversation: Conversation
    runner: ToolRunner
    tree: Tree
    max_iterations: int | None = None
    malformed_feedback: bool = False
    stop_after_tools: bool = False
    final_tools: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    max_turn: int | None = None
    drafts: bool = True
    delays: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def budget(self) -> int:
        """Tokens that a completion may have."""
        return min(self.limit or self.sampler.budget, self.sampler.budget)

    def left(self, flight: _Flight) -> int:
        """Tokens that a completion may still sample in its turn; 0 while its turn is not decoded."""
        if not flight.decoding:
            return 0
        end = self.budget if self.max_turn is None else min(self.budget, flight.turn_start + self.max_turn)
        return end - len(flight.trajectory.completion_ids)


class Policy(NamedTuple):
    """Weights as the rollout runs them, and the preamble's keys and values under them."""

    params: Params
    preamble: Trunk


def make_policy(loop: ToolLoop, params: Params) -> Policy:
    """What `roll_out` samples from, once per weight version.

    Args:
        params: rollout weights, from `sampler.export`.
    """
    return Policy(params, _prefill(loop.sampler, params, (), preamble_level(loop.tree)))


@dataclasses.dataclass(frozen=True)
class Work:
    """What decode passes did.

    Args:
        row_steps: passes times the rows that took part in each.
        live_steps: those of rows whose turn had not ended.
        sampled: tokens that they sampled.
    """

    row_steps: int = 0
    live_steps: int = 0
    sampled: int = 0

    @property
    def wasted(self) -> float:
        """Share of the row-steps whose completion had ended its turn."""
        return 1 - self.live_steps / self.row_steps if self.row_steps else 0.0

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens that a pass adds to a completion, 1 without drafts; None before the first pass."""
        return self.sampled / self.live_steps if self.live_steps else None

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What `roll_out` sampled, and the decode passes that took.

    Args:
        trajectories: those of all hosts, a group's completions next to each other, without rewards.
        step_seconds: median time of a decode step on the slowest host.
        interrupted: a host was asked to stop before the last turn ended, and completions may be missing; the same on all
            of them.
    """

    trajectories: list[Trajectory]
    work: Work = Work()
    step_seconds: float = 0.0
    interrupted: bool = False


@dataclasses.dataclass
class _Flight:
    """A completion that is being sampled.

    Args:
        trajectory: grows; its status is set when it is finished.
        decoding: its turn is being decoded; else its calls run, or it is finished.
        tool_turns: turns whose calls were answered.
        turn_start: where its turn begins in `completion_ids`.
        running: the turn's calls, with their results to come.
        feedback: what the model gets instead, when its call did not parse.
        due: decode steps of the rollout after which it is answered.
    """

    trajectory: Trajectory
    decoding: bool = True
    tool_turns: int = 0
    turn_start: int = 0
    running: list[tuple[ToolCall, Future[ToolResult]]] = dataclasses.field(default_factory=list)
    feedback: str | None = None
    due: int = 0

    @property
    def waiting(self) -> bool:
        """Its turn has ended and is to be answered."""
        return bool(self.running) or self.feedback is not None

    def append(self, ids: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """Sampled tokens with their log-probabilities, or given ones (None)."""
        self.trajectory.completion_ids.extend(ids)
        self.trajectory.sampled_mask.extend([logprobs is not None] * len(ids))
        self.trajectory.logprobs.extend([0.0] * len(ids) if logprobs is None else logprobs)

    def finish(self, status: Status) -> None:
        self.decoding = False
        self.trajectory = dataclasses.replace(self.trajectory, status=status)


def roll_out(
    loop: ToolLoop,
    policy: Policy,
    prompts: Sequence[Prompt | None],
    *,
    generations: int = 1,
    seed: int = 0,
    on_progress: Callable[..., None] = lambda finished, **fields: None,
    stop: Callable[[], bool] = lambda: False,
) -> Rollout:
    """Sample G trajectories for each prompt, tools included; all hosts call it with the same arguments.

    Args:
        prompts: P of them, at least one a prompt; None fills up a batch of one shape and gives no trajectory.
        generations: G.
        on_progress: called at every return of decode with the number of completions that were finished since, and
            as keywords with what to show: completions still running, tokens a second, tool turns so far.
        stop: whether this host was asked to stop; asked first and at every return, and ends the rollout early.

    Raises:
        HostError: a tool worker of some host does not start; with one host its RuntimeError.
    """
    if hosts.agree([stop()]).any():  # before it compiles anything
        return Rollout([], interrupted=True)
    sampler, put, G = loop.sampler, loop.sampler.layout.put_rows, generations
    filler = next(prompt for prompt in prompts if prompt is not None)
    filled = [filler if prompt is None else prompt for prompt in prompts]
    own = list(zip(hosts.share(filled), hosts.share(prompts), strict=True))
    flights = [_Flight(Trajectory(prompt), given is not None) for prompt, given in own for _ in range(G)]
    draws = np.repeat([-1 if given is None else prompt.draw for prompt, given in own], G)
    keys = row_keys(seed, draws, np.tile(np.arange(G), len(own)))

    # The prompts' levels are prefilled on all hosts; each row begins with its prompt's last token pending.
    level = prompts_level(loop.tree, [prompt.ids for prompt in filled])
    trunk = policy.preamble + _prefill(sampler, policy.params, policy.preamble, level)
    pending = np.array([[prompt.ids[-1], len(prompt.ids) - 1] for prompt, _ in own], np.int32)
    token, position = np.repeat(pending, G, 0).T
    put_keys, cache = put(keys), sampler.begin(put(token), put(position))
    decoder = _Decoder(loop, policy.params, trunk, cache, put_keys, [prompt for prompt, _ in own])
    loop.runner.start_step([f.trajectory.prompt.example.columns for f in flights])
    began, turns, failure = time.perf_counter(), 0, hosts.Failure()
    now = _Agreed(decoding=sum(prompt is not None for prompt in prompts) * G)

    while now.running and not now.interrupted:
        # 1. Decode until some turns have ended; parse these and start their calls.
        before, steps = now.running, math.inf  # where none is decoding, all results are waited for
        if now.decoding:
            left = np.array([loop.left(f) for f in flights], np.int32)
            turn = decoder.decode(left, now)
            steps = decoder.steps
            for i in np.flatnonzero(left).tolist():
                n = turn.count[i]
                flights[i].append(turn.tokens[i, :n].tolist(), turn.logprobs[i, :n].tolist())
                if turn.stopped[i] or n == left[i]:
                    with failure:
                        _end_turn(loop, flights[i], i, bool(turn.stopped[i]), steps)
        # 2. Wait for the results that are due, and append them to their completions.
        responses: list[list[int]] = [[] for _ in flights]
        with failure:
            responses = [_respond(loop, f) if f.waiting and f.due <= steps else [] for f in flights]
        # 3. Exchange the counts with the other hosts, and feed the responses into the caches.
        now, turns = _agree(flights, responses, failure, stop()), turns + now.fed
        if now.fed and not now.interrupted:
            decoder.feed(flights, responses, now)
        speed = decoder.work.sampled / (time.perf_counter() - began)
        on_progress(before - now.running, running=now.running, tokens_per_s=speed, tool_turns=turns)

    def found() -> tuple[list[Trajectory], float]:
        """What this host sampled, without what fills up, and its time of a step."""
        finished = [f.trajectory for f in flights if f.trajectory.status is not None]
        return finished, statistics.median(decoder.step_seconds or [0.0])

    trajectories, seconds = zip(*hosts.gather(found), strict=True)
    return Rollout(
        [t for of_host in trajectories for t in of_host], decoder.work, max(seconds), now.interrupted
    )


def _end_turn(loop: ToolLoop, flight: _Flight, i: int, stopped: bool, steps: int) -> None:
    """Read completion i's turn: its calls start to run, or it gets feedback on its call, or it is finished.

    Args:
        steps: decode steps of the rollout so far.
    """
    flight.decoding, flight.due = False, steps
    trajectory = flight.trajectory
    ids = trajectory.completion_ids[flight.turn_start :]
    if not stopped:
        trajectory.messages.append({"role": "assistant", "content": loop.conversation.decode(ids)})
        return flight.finish(Status.OVERLONG)
    parsed = loop.conversation.parse(ids, trajectory.prompt.schemas)
    trajectory.messages.append(loop.conversation.assistant_message(parsed))
    status, flight.feedback = after_turn(loop, parsed, flight.tool_turns, trajectory.calls)
    if status is not None:
        flight.finish(status)
    elif flight.feedback is None:
        results = loop.runner.submit(parsed.calls, [i] * len(parsed.calls))
        flight.running = list(zip(parsed.calls, results, strict=True))
        flight.due += max(loop.delays.get(call.name, 0) for call in parsed.calls)


def after_turn(
    loop: ToolLoop, turn: ParsedTurn, tool_turns: int, calls: Sequence[CallAndResult]
) -> tuple[Status | None, str | None]:
    """What a closed turn means: (the status that it ends with, what the model is told of a call that does not parse).

    Both are None where the turn's calls are to run.

    Args:
        tool_turns: earlier turns whose calls were answered.
        calls: those of earlier turns.
    """
    final = bool(turn.calls) and all(call.name in loop.final_tools for call in turn.calls)
    # one turn of final calls may follow the last of the others
    spent = loop.max_iterations is not None and tool_turns >= loop.max_iterations + final
    if turn.error and loop.malformed_feedback and not spent:
        return None, f"Error: the tool call does not parse: {turn.error}"
    if turn.error:
        return Status.MALFORMED_CALL, None
    if not turn.calls:
        return answered(calls), None
    return Status.TOOL_LIMIT if spent else None, None


def after_calls(
    loop: ToolLoop, done: Sequence[CallAndResult], calls: Sequence[CallAndResult]
) -> tuple[list[CallAndResult], str | None, Status | None]:
    """What a turn's results mean: (those that the model is told, its answer, the status that they end with).

    The argument of an accepted final call is the answer, the last one's of several; its result is not told.

    Args:
        done: the turn's calls.
        calls: those of earlier turns.
    """

    def accepted(pair: CallAndResult) -> bool:
        return pair[0].name in loop.final_tools and pair[1].outcome is Outcome.OK

    told = [pair for pair in done if not accepted(pair)]
    final = [call for call, _ in filter(accepted, done)]
    if not final:
        return told, None, Status.TOOLS_DONE if loop.stop_after_tools else None
    answer = answer_text(final[-1].arguments[loop.final_tools[final[-1].name]])
    return told, answer, answered([*calls, *told], loop.final_tools)


def answer_text(answer: Any) -> str:
    """The argument of a final call as the text of its message."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def answered(calls: Sequence[CallAndResult], without: Container[str] = ()) -> Status:
    """The status after the answer; it depends on the outcome of the last call, of those to tools not named."""
    outcomes = [result.outcome for call, result in calls if call.name not in without]
    last = outcomes[-1] if outcomes else Outcome.OK
    if last is Outcome.TIMEOUT:
        return Status.TOOL_TIMEOUT
    return Status.ANSWERED if last is Outcome.OK else Status.TOOL_ERROR


def _respond(loop: ToolLoop, flight: _Flight) -> list[int]:
    """Append what answers a completion's turn as the template writes it, if that fits the budget.

    Returns:
        Its ids, [] where the completion is finished.
    """
    trajectory = flight.trajectory
    if flight.feedback is not None:
        results, flight.feedback, ended = [(PARSER_NAME, flight.feedback)], None, None
    else:
        done = [(call, result.result()) for call, result in flight.running]
        told, answer, ended = after_calls(loop, done, trajectory.calls)
        if answer is not None:
            trajectory.messages[-1]["content"] = answer
        trajectory.calls.extend(told)
        results, flight.running = [(call.name, result.text) for call, result in told], []
    flight.tool_turns += 1
    for name, text in results:
        refused = {"final": True} if name in loop.final_tools else {}
        trajectory.messages.append({"role": "tool", "name": name, "content": text} | refused)
    if ended is not None:
        flight.finish(ended)
        return []
    ids = loop.conversation.response_ids(results)
    if len(trajectory.completion_ids) + len(ids) >= loop.budget:  # at least one token must follow
        flight.finish(Status.OVERLONG_TOOL_RESPONSE)
        return []
    flight.append(ids, None)
    flight.decoding, flight.turn_start = True, len(trajectory.completion_ids)
    return ids


class _Agreed(NamedTuple):
    """Where a rollout stands, counted over all hosts.

    Args:
        waiting: completions whose turn has ended and is still to be answered.
        fed: completions that get a response now.
        longest: tokens of the longest of these responses.
        held: tokens of the longest completion that is being decoded.
        interrupted: some host was asked to stop.
    """

    decoding: int
    waiting: int = 0
    fed: int = 0
    longest: int = 0
    held: int = 0
    interrupted: bool = False

    @property
    def running(self) -> int:
        """Completions that are not finished."""
        return self.decoding + self.waiting


def _agree(
    flights: Sequence[_Flight], responses: Sequence[list[int]], failure: hosts.Failure, stop: bool
) -> _Agreed:
    """The one exchange of a return: the same result on all hosts."""
    lengths = [len(ids) for ids in responses]
    held = [len(f.trajectory.completion_ids) for f in flights if f.decoding]
    summed = [len(held), sum(f.waiting for f in flights), sum(n > 0 for n in lengths)]
    greatest = [max(lengths), max(held, default=0), stop]
    figures = hosts.agree([*summed, *greatest, failure.error is not None])
    if figures[:, -1].any():
        failure.raise_everywhere()
    decoding, waiting, fed = figures[:, :3].sum(0).tolist()
    longest, most, interrupted = figures[:, 3:6].max(0).tolist()
    return _Agreed(decoding, waiting, fed, longest, most, bool(interrupted))


@dataclasses.dataclass
class _Decoder:
    """The part of a rollout that runs on the devices, and what was measured of it.

    Args:
        trunk: keys and values of preamble and prompts.
        cache: the rows' own keys and values.
        keys: [B, 2] the rows' random keys.
        prompts: this host's, one for each group of rows.
        known: what each row's drafts may be copied from; None until drafts pay.
        work: what all passes did.
        drafted: what the passes with drafts did.
        steps: passes so far.
        step_seconds: seconds that a pass took, one number for each return.
    """

    loop: ToolLoop
    params: Params
    trunk: Trunk
    cache: Cache
    keys: jax.Array
    prompts: Sequence[Prompt]
    known: jax.Array | None = None
    work: Work = Work()
    drafted: Work = Work()
    steps: int = 0
    step_seconds: list[float] = dataclasses.field(default_factory=list)

    def decode(self, left: np.ndarray, now: _Agreed) -> Decoded:
        """Decode until some turns have ended; what this host's rows sampled.

        Args:
            left: [b] tokens that each row may still sample.
        """
        sampler, trunk = self.loop.sampler, self.trunk
        put = sampler.layout.put_rows
        # 1. Give the cache its texts for drafts, where these pay, and the room that the longest row needs.
        rows = sampler.rows_for(now.decoding, self.cache, trunk)
        drafting = (
            self.loop.drafts and sampler.draftable(now.held) and pays(rows, self.drafted.tokens_per_pass)
        )
        if drafting:
            if self.known is None:
                width = self.loop.tree.T0 + self.loop.tree.T1 + 1
                texts = known_texts(self.loop.conversation, self.prompts, width)
                self.known = put(np.repeat(texts, len(left) // len(self.prompts), 0))
            self.cache = self.cache._replace(known=self.known)
        self.cache = sampler.fit(self.cache, now.held + 1 + self.cache.drafted)
        rows = sampler.rows_for(now.decoding, self.cache, trunk)  # again: a cache that grew may allow fewer
        # 2. Decode.
        return_at = now.decoding - max(1, now.decoding // RETURN_AT)
        began = time.perf_counter()
        self.cache, turn = sampler.decode(
            self.params, trunk, self.cache, self.keys, put(left), np.int32(return_at), rows=rows
        )
        turn = sampler.layout.get_rows(turn)
        # 3. Count what was done.
        done = Work(int(turn.row_steps), int(turn.live_steps), int(turn.sampled))
        steps = done.row_steps // rows
        self.step_seconds.append((time.perf_counter() - began) / steps)
        self.work, self.steps = self.work + done, self.steps + steps
        if drafting:
            self.drafted += done
            self.known, self.cache = self.cache.known, self.cache._replace(known=self.cache.known[:, :0])
        return turn

    def feed(self, flights: Sequence[_Flight], responses: Sequence[list[int]], now: _Agreed) -> None:
        """Put the responses, which the completions end with, into the cache; [] for a row that has none."""
        # A row's pending token goes before its response, whose last token is pending next.
        tokens = np.zeros((len(flights), response_bucket(now.longest)), np.int32)
        for row, flight, ids in zip(tokens, flights, responses, strict=True):
            if ids:
                row[: len(ids)] = flight.trajectory.completion_ids[-len(ids) - 1 : -1]
        count = np.array([len(ids) for ids in responses], np.int32)
        last = np.array([ids[-1] if ids else 0 for ids in responses], np.int32)
        sampler = self.loop.sampler
        self.cache = sampler.fit(self.cache, now.held + 1)
        arrays = map(sampler.layout.put_rows, (tokens, count, last))
        rows = sampler.rows_fed(self.cache, self.trunk)
        self.cache = sampler.append(self.params, self.trunk, self.cache, *arrays, rows=rows)


def _prefill(sampler: Sampler, params: Params, above: Trunk, level: Level) -> Trunk:
    """Keys and values of a shared level; () where it has no tokens."""
    if not level.tokens.shape[1]:
        return ()
    layout = sampler.layout
    arrays = (layout.put(x, layout.replicated) for x in (level.tokens, level.positions, level.valid))
    level = Level(*arrays, shared=True)
    return ((sampler.prefill(params, above, level), level.valid),)
