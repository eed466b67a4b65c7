"""The data of a run on the host, ragged and plain Python, and the key to the dimension letters.

An `Example` is a row of the data; a `Prompt` is an example as the model sees it; a `Trajectory` is one
completion of a prompt, to which the rollout, the rewards and the advantages each add what they know.
What the device sees of trajectories is a `Batch` (see `update.batch`).

Dimensions: P prompts, G completions per prompt, B = P·G completions (those of a prompt, a group, lie next
to each other), T tokens, S keys, V vocabulary, D model width, F MLP width, N query heads, K key/value
heads, R = N/K query heads per key/value head, H head size, L layers, J loss positions per completion.
Levels: T0 preamble tokens, T1 prompt tokens, T2 completion tokens.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Schema = dict[str, Any]  # of one tool, as the chat template takes it

BUILT_IN_REWARDS = ("accuracy", "grounded")  # names that need no file
# the "tool" that tells the model why its call did not parse; no reward takes it for a result
PARSER_NAME = "tool_call_parser"


def tool_results(messages: Sequence[Message]) -> list[tuple[str | None, str]]:
    """Name and text of each result of a tool: not what answers a call that does not parse, nor a refused final call."""
    of_tools = (m for m in messages if m["role"] == "tool" and not m.get("final"))
    return [(m.get("name"), m["content"]) for m in of_tools if m.get("name") != PARSER_NAME]


class Status(enum.StrEnum):
    """How a trajectory ended; masks, rewards and metrics read it, nothing infers it again."""

    ANSWERED = "answered"  # the model closed a turn without a call, or called a final tool
    TOOL_LIMIT = "tool_limit"  # it still called after max_tool_calling_iterations
    OVERLONG = "overlong"  # the token budget ended inside a model turn
    OVERLONG_TOOL_RESPONSE = "overlong_tool_response"  # a tool response did not fit
    MALFORMED_CALL = "malformed_call"  # its last turn held a call that does not parse
    TOOL_ERROR = "tool_error"  # answered, but the last call's result was an error
    TOOL_TIMEOUT = "tool_timeout"  # answered, but the last call ran out of time
    TOOLS_DONE = "tools_done"  # stop_after_tools ended it at its first results

    @property
    def truncated(self) -> bool:
        """Ended by the token budget (what `mask_truncated_completions` drops)."""
        return self in (Status.OVERLONG, Status.OVERLONG_TOOL_RESPONSE)

    @property
    def closed(self) -> bool:
        """The model ended the conversation itself (the figure `turn_closed`)."""
        return self in (Status.ANSWERED, Status.TOOL_ERROR, Status.TOOL_TIMEOUT)


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a data set.

    Args:
        messages: the prompt, as chat messages.
        answer: what the last tool result should be.
        extra: every other column; passed on to the rewards.
        source: "file:line", for messages to the user.
    """

    messages: list[Message]
    answer: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""

    @property
    def columns(self) -> dict[str, Any]:
        """The row, as `make_tools(row)` gets it."""
        return {"prompt": self.messages, "answer": self.answer, **self.extra}

    @property
    def wants_error(self) -> bool:
        """Whether the answer is an error, which no tool result counts as: such rows have no figures."""
        return self.answer.startswith("Error:")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An example as the model sees it.

    Args:
        ids: token ids of the whole prompt, preamble included.
        schemas: the tools that it shows, the only ones that its completions may call.
        draw: global draw index, epoch · n + place in the epoch's order: with the run's seed, the
            completion's number and the position it decides what is sampled.
    """

    example: Example
    ids: list[int]
    schemas: list[Schema]
    draw: int = 0


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A parsed call: the tool's name and its keyword arguments."""

    name: str
    arguments: dict[str, Any]


class Outcome(enum.StrEnum):
    """What became of one tool call."""

    OK = "ok"
    ERROR = "error"  # the tool, or the check of its arguments, said `Error: …`
    TIMEOUT = "timeout"
    CRASH = "crash"  # the worker died: sys.exit, signal, out of memory


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """A call's answer.

    Args:
        text: what the model sees.
        seconds: wall time of the call, without waiting for a worker.
    """

    text: str
    outcome: Outcome
    seconds: float


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """One model turn, read strictly.

    Args:
        content: the text outside calls and reasoning; the raw text when a call does not parse.
        reasoning_content: the text inside `<think>`, None when there is none.
        calls: the calls in order; empty when `error` is set.
        error: None, or why a call does not parse ("unterminated: …", "not JSON: …").
        spans: where the calls begin and end in the text, in characters; with an error, where that call does.
    """

    content: str
    reasoning_content: str | None
    calls: tuple[ToolCall, ...]
    error: str | None
    spans: tuple[tuple[int, int], ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A tool call that went wrong, and the tokens that wrote it.

    Args:
        parses: False where it is not a call by the template's format; True where it is and its result is an
            error, a timeout or a crash.
        start, stop: in `completion_ids`.
    """

    parses: bool
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One completion of a prompt with all its tool turns, token in, token out.

    Args:
        completion_ids: everything after the prompt: sampled tokens and tool responses.
        sampled_mask: True where the policy sampled the token.
        logprobs: the sampler's log-probability in nats; 0.0 where not sampled.
        messages: the messages after the prompt, as rewards see them.
        calls: every call that was run, with its result, in order.
        status: how it ended; None while it is being sampled.
        rewards: one value per reward function; NaN where it does not apply.
        advantage: its reward minus the group's baseline, divided as `scale_rewards` says; see `group_advantages`.
        token_advantages: one per token, where turns are rewarded or bad calls penalised; None: every sampled token
            has `advantage`.
    """

    prompt: Prompt
    completion_ids: list[int] = dataclasses.field(default_factory=list)
    sampled_mask: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    messages: list[Message] = dataclasses.field(default_factory=list)
    calls: list[tuple[ToolCall, ToolResult]] = dataclasses.field(default_factory=list)
    status: Status = None  # pyright: ignore[reportAssignmentType]  # read where the completion is finished
    rewards: tuple[float, ...] = ()
    advantage: float = 0.0
    token_advantages: list[float] | None = None

    @property
    def turns(self) -> list[tuple[int, int]]:
        """Where each turn of the model begins and ends in `completion_ids`; tool responses separate them."""
        edges = [
            i for i, (a, b) in enumerate(itertools.pairwise([False, *self.sampled_mask, False])) if a != b
        ]
        return list(zip(edges[::2], edges[1::2], strict=True))

    @property
    def has_advantage(self) -> bool:
        """Whether the advantage, or that of some token, is not 0."""
        return any(self.token_advantages) if self.token_advantages is not None else self.advantage != 0

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.sampled_mask)
