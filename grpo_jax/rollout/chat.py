"""A conversation with a person: each message is answered by turns and tool calls that arrive as they are sampled.

What all conversations begin with (system message and tools) is prefilled once. The rest goes through the row's own
cache, a user's message as a tool response does in a rollout, so that every token passes through the model once.
The cache grows with the conversation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from grpo_jax.models.qwen import Params
from grpo_jax.rollout.drafts import known_texts, pays
from grpo_jax.rollout.loop import ToolLoop, after_calls, after_turn, make_policy
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.sampling import row_keys
from grpo_jax.types import (
    PARSER_NAME,
    Example,
    Message,
    ParsedTurn,
    Prompt,
    Schema,
    Status,
    ToolCall,
    ToolResult,
)
from grpo_jax.update.batch import response_bucket

PIECE = 8  # tokens that are decoded between two looks at the text
FED_AT_ONCE = 512  # tokens; longer messages take several passes, so that few lengths compile
INTERRUPTED = "interrupted"
CALLING = "calling"
_CALL = "<tool_call>"


@dataclasses.dataclass(frozen=True)
class Piece:
    """More text of the turn that is being sampled, without its calls."""

    text: str


@dataclasses.dataclass(frozen=True)
class Called:
    """A call that was run, and what it returned."""

    call: ToolCall
    result: ToolResult


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A turn held a call that does not parse, and why."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """The end of an answer.

    Args:
        messages: those that follow the user's: assistant turns and tool results.
        status: a `Status`, "interrupted", or "calling" where whoever asked runs the last message's calls.
        tokens: how many were sampled.
    """

    messages: list[Message]
    status: str
    tokens: int


Event = Piece | Called | Malformed | Reply


@dataclasses.dataclass(frozen=True)
class Limits:
    """What ends an answer or a conversation.

    Args:
        answer: tokens that follow a user's message at most, tool responses included.
        positions: what the model has; None for a model that names no limit.
    """

    answer: int
    positions: int | None


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is particular to one answer; None leaves it to the conversation.

    Args:
        sampler: one of the same model and budget.
        seed: the same messages get the same answer with it.
        tokens: in place of `Limits.answer`.
        schemas: tools that whoever asks runs, so that their calls end the answer, in place of the conversation's
            own; with chat messages only.
    """

    sampler: Sampler | None = None
    seed: int | None = None
    tokens: int | None = None
    schemas: list[Schema] | None = None


class Chat:
    """One conversation at a time.

    Args:
        loop: its tree's preamble is what all conversations begin with, its sampler's budget what one may hold
            after that.
        params: rollout weights, from `sampler.export`.
        system: text of the system message; None for none.
    """

    def __init__(
        self,
        loop: ToolLoop,
        params: Params,
        schemas: list[Schema],
        system: str | None,
        limits: Limits,
        seed: int = 0,
    ):
        self._loop, self._schemas, self._limits, self._seed = loop, schemas, limits, seed
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._policy = make_policy(self._loop, params)
        self._known = np.zeros(0, np.int32)  # what drafts may be copied from
        if loop.drafts and pays(1, None):
            opening = Prompt(Example([], ""), list(loop.tree.preamble), schemas)
            self._known = known_texts(loop.conversation, [opening], len(opening.ids))[0]
        self._started = 0
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages: list[Message] = []
        self._ids: list[int] = []  # all that follows the shared beginning
        self._trunk = self._policy.preamble
        self._start = len(self._loop.tree.preamble)  # position of the first of `_ids`
        self._closed = True  # the last turn ended with a token that ends turns
        self._cache: Any = None  # a Cache once something was fed
        self._started += 1

    @property
    def tokens(self) -> int:
        """Of the conversation, tools included."""
        return self._start + len(self._ids)

    def say(
        self,
        prompt: str | list[Message],
        stop: Callable[[], bool] = lambda: False,
        asked: Asked = Asked(),
    ) -> Iterator[Event]:
        """Answer a message.

        Args:
            prompt: the user's text, which continues the conversation; or chat messages, which begin a new one.
            stop: asked after every few tokens; True ends the answer, and the conversation may continue.

        Yields:
            What happens, in order; last a `Reply`.

        Raises:
            ValueError: the message does not fit into the model's positions; the conversation stays as it was.
        """
        if isinstance(prompt, list) or not self.messages:
            messages = prompt if isinstance(prompt, list) else [*self._opening, _user(prompt)]
            schemas = self._schemas if asked.schemas is None else asked.schemas
            ids = self._loop.conversation.prompt_ids(messages, schemas)
            # the second after a conversation with another beginning that was too long
            if self.messages or self._trunk is not self._policy.preamble:
                self.reset()
            if tuple(ids[: self._start]) == self._loop.tree.preamble:
                ids = ids[self._start :]
            else:  # it has a system message of its own
                self._trunk, self._start = (), 0
        else:
            messages = [_user(prompt)]
            unclosed = [] if self._closed else [self._loop.conversation.stop_ids[0]]
            ids = unclosed + self._loop.conversation.following_ids(messages)
        budget = self._room(len(ids), asked.tokens or self._limits.answer)
        if not self.messages:
            self._loop.runner.start_step([{"prompt": messages, "answer": ""}])
        self.messages += messages
        self._feed(ids)
        yield from self._answer(budget, stop, asked)

    def _room(self, new: int, wanted: int) -> int:
        """Tokens that the answer to `new` tokens may have, at most those wanted."""
        used, positions = len(self._ids) + new, self._limits.positions
        budget = min(wanted, self._loop.sampler.budget - used)
        if positions is not None:
            budget = min(budget, positions - self._start - used)
        if budget < 1:
            raise ValueError(
                f"the conversation is full: with this message it has {self._start + used} tokens, the model was "
                f"made for {positions or self._loop.sampler.budget}; begin a new one (in chat with /reset)"
            )
        return budget

    def _answer(self, budget: int, stop: Callable[[], bool], asked: Asked) -> Iterator[Event]:
        """Turns and the results of their calls, until a turn has no call or something ends the answer."""
        loop, begin, left, tokens, tool_turns = self._loop, len(self.messages), budget, 0, 0
        calls: list[tuple[ToolCall, ToolResult]] = []
        status: str | None = None
        while status is None:
            ids, turn = yield from self._turn(min(left, loop.max_turn or left), stop, asked)
            tokens, left = tokens + len(ids), left - len(ids)
            self.messages.append(loop.conversation.assistant_message(turn))
            status, feedback = after_turn(loop, turn, tool_turns, calls)
            results: list[tuple[str, str]] = []
            if stop():
                status = INTERRUPTED
            elif not self._closed:
                status = Status.OVERLONG
            elif turn.error:
                yield Malformed(turn.error)
                if feedback is not None:
                    results = [(PARSER_NAME, feedback)]
            elif turn.calls and asked.schemas is not None:
                status = CALLING
            elif status is None:
                running = loop.runner.submit(turn.calls, [0] * len(turn.calls))
                ran = [(call, future.result()) for call, future in zip(turn.calls, running, strict=True)]
                told, answer, status = after_calls(loop, ran, calls)
                yield from (Called(*pair) for pair in told)
                calls += told
                results = [(call.name, result.text) for call, result in told]
                if answer is not None:
                    self.messages[-1]["content"] = answer
                    yield Piece(answer)
            if results:
                tool_turns += 1
                said = [{"role": "tool", "name": name, "content": text} for name, text in results]
                self.messages += said
                ids = loop.conversation.following_ids(said)
                if len(ids) < left:
                    self._feed(ids)
                    left -= len(ids)
                    self._closed = status is None  # else the turn that these ids begin is to be closed
                elif status is None:  # at least one token must follow
                    status = Status.OVERLONG_TOOL_RESPONSE
        yield Reply(self.messages[begin:], str(status), tokens)

    def _turn(
        self, left: int, stop: Callable[[], bool], asked: Asked
    ) -> Generator[Event, None, tuple[list[int], ParsedTurn]]:
        """Sample to the end of a turn, yielding its text; returns its ids and what they say."""
        sampler, conversation = asked.sampler or self._loop.sampler, self._loop.conversation
        seed, draw = (self._seed, self._started) if asked.seed is None else (asked.seed, 0)
        keys = self._row(row_keys(seed, np.array([draw]), np.array([0]))[0])
        ids: list[int] = []
        text, shown, self._closed = "", 0, False
        while len(ids) < left and not self._closed and not stop():
            remaining = self._first(np.int32(min(PIECE, left - len(ids))))
            held = len(self._ids)
            if not sampler.draftable(held + PIECE):
                self._cache = self._cache._replace(known=self._cache.known[:, :0])
            self._cache = sampler.fit(self._cache, min(held + PIECE + self._cache.drafted, sampler.budget))
            self._cache, turn = sampler.decode(
                self._policy.params, self._trunk, self._cache, keys, remaining, np.int32(0)
            )
            turn = sampler.layout.get_rows(turn)
            new = turn.tokens[0, : turn.count[0]].tolist()
            ids += new
            self._ids += new  # at once: what is in the cache, if it is left here
            self._closed = bool(turn.stopped[0])
            text = "<think>" * conversation.opens_thinking + conversation.decode(ids)
            settled = before_marks(text, _CALL)
            if len(settled) > shown:
                yield Piece(settled[shown:])
                shown = len(settled)
        if self._closed:
            parsed = conversation.parse(ids, self._schemas if asked.schemas is None else asked.schemas)
        else:
            parsed = ParsedTurn(conversation.decode(ids), None, (), None)
        said = text[: parsed.spans[0][0]] if parsed.calls else text  # a thought may mention the tag
        if rest := said[shown:]:
            yield Piece(rest)
        return ids, parsed

    def _feed(self, ids: list[int]) -> None:
        """Put known tokens into the cache, the last of them pending."""
        self._ids += ids
        if self._cache is None:
            self._cache = self._loop.sampler.begin(
                self._row(np.int32(ids[0])), self._row(np.int32(self._start)), known=self._row(self._known)
            )
            pending, ids = ids[0], ids[1:]
        else:
            pending = self._ids[-len(ids) - 1]
        self._cache = self._loop.sampler.fit(self._cache, len(self._ids))
        for at in range(0, len(ids), FED_AT_ONCE):
            part = ids[at : at + FED_AT_ONCE]
            tokens = np.zeros(response_bucket(len(part)), np.int32)
            tokens[: len(part)] = [pending, *part[:-1]]
            pending = part[-1]
            fed = self._row(tokens), self._first(np.int32(len(part))), self._row(np.int32(pending))
            self._cache = self._loop.sampler.append(self._policy.params, self._trunk, self._cache, *fed)

    def _row(self, value: Any) -> Any:
        """A row's value, the same for as many rows as the mesh needs."""
        layout = self._loop.sampler.layout
        return layout.put_rows(np.repeat(np.asarray(value)[None], layout.mesh.shape["data"], 0))

    def _first(self, value: Any) -> Any:
        """A value of the first row, which is the conversation's, and zeros for those that fill up the mesh."""
        layout = self._loop.sampler.layout
        rows = np.zeros(layout.mesh.shape["data"], np.asarray(value).dtype)
        rows[0] = value
        return layout.put_rows(rows)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def before_marks(text: str, *marks: str) -> str:
    """The beginning of a growing text before any of the marks, and before what may become one or a character."""
    for mark in marks:
        text = text.partition(mark)[0]
        begun = (n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n]))
        text = text[: len(text) - next(begun, 0)]
    return text.rstrip("\ufffd")
