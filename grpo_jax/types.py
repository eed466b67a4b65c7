"""The shared data types, and the key to the dimension letters.

Dimensions: P prompts, G completions per prompt, B = P·G rows (the rows of a
group lie next to each other), T tokens, S keys, V vocabulary, D model width,
F MLP width, N query heads, K key/value heads, R = N/K query heads per
key/value head, H head size, L layers, J loss positions per row.
Levels: T0 preamble tokens, T1 prompt tokens, T2 completion tokens.

The host side is ragged and plain Python; the device side has fixed shapes.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax

Message = dict[str, Any]

# the "tool" that tells the model why its call did not parse; no reward takes it for a result
PARSER_NAME = "tool_call_parser"


class Status(enum.StrEnum):
    """How a trajectory ended; masks, rewards and metrics read it, nothing infers it again."""

    ANSWERED = "answered"  # the model closed a turn without a call
    TOOL_LIMIT = "tool_limit"  # it still called after max_tool_calling_iterations
    OVERLONG = "overlong"  # the token budget ended inside a model turn
    OVERLONG_TOOL_RESPONSE = "overlong_tool_response"  # a tool response did not fit
    MALFORMED_CALL = "malformed_call"  # its last turn held a call that does not parse
    TOOL_ERROR = "tool_error"  # answered, but the last call's result was an error
    TOOL_TIMEOUT = "tool_timeout"  # answered, but the last call ran out of time

    @property
    def truncated(self) -> bool:
        """Ended by the token budget (what `mask_truncated_completions` drops)."""
        return self in (Status.OVERLONG, Status.OVERLONG_TOOL_RESPONSE)


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
        outcome: what became of the call.
        seconds: wall time of the call.
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
    """

    content: str
    reasoning_content: str | None
    calls: tuple[ToolCall, ...]
    error: str | None


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One completion with all its tool turns, token in, token out.

    Args:
        prompt_ids: the whole prompt, preamble included.
        completion_ids: everything after the prompt: sampled tokens and tool responses.
        sampled_mask: True where the policy sampled the token.
        logprobs: the sampler's log-probability in nats; 0.0 where not sampled.
        messages: the messages after the prompt, as rewards see them.
        calls: every call that was run, with its result, in order.
        status: how it ended.
        rewards: one value per reward function; None where it does not apply.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    sampled_mask: list[bool]
    logprobs: list[float]
    messages: list[Message]
    calls: list[tuple[ToolCall, ToolResult]]
    status: Status
    rewards: tuple[float | None, ...] = ()

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.sampled_mask)


def pytree_dataclass(*static: str):
    """Frozen dataclass that is a pytree; `static` fields are part of its structure."""

    def wrap(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        return jax.tree_util.register_dataclass(cls, [n for n in names if n not in static], list(static))

    return wrap


@pytree_dataclass("loss_positions")
class StepBatch:
    """What one update sees: the three levels of the prefix tree and what is learned on them.

    The completion level holds the prompt's last token and a completion but for its last, so that position
    t of it predicts token t of the completion, which is target t.

    Args:
        preamble: [1, T0] token ids.
        preamble_valid: [1, T0] bool, a prefix.
        prompts: [P, T1] token ids, without the prompt's last token.
        prompts_positions: [P, T1] int32 logical positions.
        prompts_valid: [P, T1] bool, a prefix of each row.
        completions: [B, T2] token ids.
        completions_positions: [B, T2] int32.
        completions_valid: [B, T2] bool, a prefix of each row.
        targets: [B, T2] token ids that follow those of `completions`.
        sampled_mask: [B, T2] bool, target t was sampled and is learned.
        sampler_logprobs: [B, T2] float32 nats, the sampler's; 0 where not sampled.
        old_logprobs: [B, T2] float32 nats of the policy before this batch's first
            update; None means the current ones (one update per batch).
        ref_logprobs: [B, T2] float32 nats of the frozen reference; None when beta = 0.
        advantages: [B] float32.
        loss_tokens: int32 scalar, learned tokens of the whole batch: groups that teach nothing may be
            missing here, and still count in what the loss divides by.
        loss_rows: int32 scalar, rows of the whole batch.
        loss_positions: J, a bucket that no row's count of sampled tokens exceeds.
        dropout_keys: [B, 2] uint32 a key per row for the adapters' dropout; None drops nothing.
    """

    preamble: jax.Array
    preamble_valid: jax.Array
    prompts: jax.Array
    prompts_positions: jax.Array
    prompts_valid: jax.Array
    completions: jax.Array
    completions_positions: jax.Array
    completions_valid: jax.Array
    targets: jax.Array
    sampled_mask: jax.Array
    sampler_logprobs: jax.Array
    old_logprobs: jax.Array | None
    ref_logprobs: jax.Array | None
    advantages: jax.Array
    loss_tokens: jax.Array
    loss_rows: jax.Array
    loss_positions: int
    dropout_keys: jax.Array | None = None


@pytree_dataclass()
class TrainState:
    """All that an update changes.

    Args:
        step: int32 scalar, updates done (skipped ones included).
        params: what is trained: master weights in `param_dtype`, layers stacked [L, …], or float32
            adapters beside frozen weights.
        opt_state: optax state.
    """

    step: jax.Array
    params: Any
    opt_state: Any
