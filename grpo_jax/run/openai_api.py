"""The OpenAI chat API over a `Chat`: requests are read strictly, answers sent whole or as server-sent events.

A request holds its whole conversation, so each begins a new one. One is answered at a time, in a thread: others wait
for the lock, the event loop for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Literal

import jinja2
from pydantic import BaseModel, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from grpo_jax.data.rows import read_prompt, show_json
from grpo_jax.rollout.chat import CALLING, Asked, Chat, Piece, Reply, before_marks
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.run.job import Job
from grpo_jax.types import Message, Status

CUT = (Status.OVERLONG, Status.OVERLONG_TOOL_RESPONSE, Status.TOOL_LIMIT)
FINISHED = {CALLING: "tool_calls"} | dict.fromkeys(CUT, "length")  # of other statuses: stop
_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.S)


class Function(BaseModel):
    """Of a client; written in the order of our own schemas, which is what models have learnt."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    returned: dict[str, Any] = Field({}, alias="return")

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class Tool(BaseModel):
    """A function that the client runs."""

    type: Literal["function"]
    function: Function


class Body(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """The parameters of a request that are supported."""

    messages: list[Any]
    model: str | None = None
    stream: bool = False
    tools: list[Tool] | None = Field(None, min_length=1)
    tool_choice: Literal["auto", "none"] = "auto"
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**31)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] = []
    # some clients always send these, at values that hold anyway
    n: Literal[1] = 1
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    stream_options: Any = None  # the last chunk always has the usage
    user: Any = None


def read_body(data: Any, model: str) -> Body:
    """The body of a request for a chat completion, in which null is as good as nothing.

    Raises:
        ValueError: a parameter is unknown, wrong or not supported; says which, and what it is.
    """
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if value is not None}
    try:
        body = Body.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise ValueError(f"{place}: {first['msg']}, got {show_json(first['input'])}") from None
    if body.model not in (None, model):
        raise ValueError(f"model: the only one is {model}, got {body.model}")
    return body


def read_messages(given: list[Any], system: str | None) -> list[Message]:
    """Chat messages as the template takes them: text in one piece, without what is null or only for OpenAI.

    Args:
        system: message that comes first where there is no other.
    """
    messages = []
    for message in _in_order_of_calls(given):
        if isinstance(message, dict):
            named = ("role", "content", "name", "reasoning_content", "tool_calls")
            message = {"content": ""} | {name: message[name] for name in named if message.get(name)}
            parts: Any = message["content"]
            with contextlib.suppress(TypeError, KeyError):  # not a list of texts
                message["content"] = "".join(part["text"] for part in parts)
            for call in calls if isinstance(calls := message.get("tool_calls"), list) else ():
                with contextlib.suppress(TypeError, KeyError):  # not a call
                    if call["function"]["arguments"] == "":  # some clients write no arguments so
                        call["function"]["arguments"] = "{}"
            if message.get("role") == "developer":
                message["role"] = "system"
        messages.append(message)
    messages = read_prompt(messages, "messages")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _in_order_of_calls(given: list[Any]) -> list[Any]:
    """Messages with the results of a turn in the order of its calls, as the template tells whose they are.

    Raises:
        ValueError: a result's `tool_call_id` is not among those of the turn before it.
    """
    ordered = list(given)
    for i, message in enumerate(given):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        calls = calls if isinstance(calls, list) else []
        ids = [call.get("id") for call in calls if isinstance(call, dict)]
        results = list(
            itertools.takewhile(lambda m: isinstance(m, dict) and m.get("role") == "tool", given[i + 1 :])
        )
        named = [result.get("tool_call_id") for result in results]
        if None in ids or None in named:
            continue  # answered in their order
        for name in named:
            if ids and name not in ids:
                raise ValueError(
                    f"messages: tool_call_id {show_json(name)} is none of the calls before it: {show_json(ids)}"
                )
        if ids:
            in_order = sorted(results, key=lambda result: ids.index(result["tool_call_id"]))
            ordered[i + 1 : i + 1 + len(results)] = in_order
    return ordered


def make_app(
    job: Job,
    chat: Chat,
    sampling: Sampling,
    name: str,
    hosts: Sequence[str],
    stopping: Callable[[], bool] = lambda: False,
) -> Starlette:
    """The routes.

    Args:
        job, chat, sampling: from `open_chat`.
        hosts: names that clients may call the server by, ["*"] for any. A web page can give its own name the
            address 127.0.0.1, so a local server has few.
        stopping: whether running answers are to end as they are.
    """
    lock, began = asyncio.Lock(), int(time.time())

    async def answer(body: Body) -> AsyncGenerator[dict[str, Any], None]:
        """What differs from chunk to chunk of a stream."""
        messages = read_messages(body.messages, job.config.system_prompt)
        given = body.model_dump(include={"temperature", "top_p"}, exclude_none=True)
        how = dataclasses.replace(sampling, **given)
        tools: Any = body.tools and [
            tool.model_dump(exclude_unset=True, by_alias=True) for tool in body.tools
        ]
        tokens = body.max_completion_tokens or body.max_tokens
        asked = Asked(job.sampler(how), body.seed, tokens, [] if body.tool_choice == "none" else tools)
        stops = [stop for stop in ([body.stop] if isinstance(body.stop, str) else body.stop) if stop]
        text, sent, stopped = "", dict[str, str](), False
        async with lock:
            events = chat.say(messages, lambda: stopped or stopping(), asked)
            async for event in iterate_in_threadpool(events):
                text = text + event.text if isinstance(event, Piece) else text.rstrip() + "\n\n"
                said, stopped = _said(text, stops, growing=not isinstance(event, Reply))
                new: dict[str, Any] = {k: v.removeprefix(sent.get(k, "")) for k, v in said.items()}
                sent, finish, more = said, None, {}
                if isinstance(event, Reply):
                    if event.status == CALLING:
                        calls = event.messages[-1]["tool_calls"]
                        new["tool_calls"] = [_openai_call(*numbered) for numbered in enumerate(calls)]
                    finish, total = FINISHED.get(event.status, "stop"), chat.tokens
                    used = {"prompt_tokens": total - event.tokens, "completion_tokens": event.tokens}
                    more["usage"] = used | {"total_tokens": total}
                    more["grpo_jax"] = {"status": event.status, "messages": event.messages}
                delta = {k: v for k, v in new.items() if v}
                if finish and delta:  # a client takes what comes with the end as not yet complete
                    yield {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                    delta = {}
                yield {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}

    async def completions(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0]
        if kind != "application/json":  # browsers send other kinds to a foreign server unasked
            raise ValueError(f"Content-Type must be application/json, got {kind!r}")
        body = read_body(await request.json(), name)
        same = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        chunks = answer(body)
        chunk = await anext(chunks)  # raises before a stream begins

        async def lines() -> AsyncIterator[str]:
            kind = {"object": "chat.completion.chunk"}
            async with contextlib.aclosing(chunks):
                yield f"data: {json.dumps(same | kind | chunk)}\n\n"
                async for one in chunks:
                    yield f"data: {json.dumps(same | kind | one)}\n\n"
            yield "data: [DONE]\n\n"

        if body.stream:
            return StreamingResponse(lines(), media_type="text/event-stream")
        message: dict[str, Any] = {"role": "", "content": ""}
        async with contextlib.aclosing(chunks):
            while True:
                (choice,) = chunk["choices"]
                for key, value in choice.pop("delta").items():
                    message[key] = message[key] + value if key in message else value
                if choice["finish_reason"] or await request.is_disconnected():
                    break
                chunk = await anext(chunks)
        chunk["choices"] = [choice | {"message": message}]
        return _json(same | {"object": "chat.completion"} | chunk)

    model = {"id": name, "object": "model", "created": began, "owned_by": "grpo_jax"}
    routes = [
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/models", lambda _: _json({"object": "list", "data": [model]})),
        Route("/health", lambda _: _json({"status": "ok"})),
    ]
    errors = (ValueError, RecursionError, jinja2.TemplateError, HTTPException)
    named = Middleware(TrustedHostMiddleware, allowed_hosts=[*hosts])
    return Starlette(routes=routes, middleware=[named], exception_handlers=dict.fromkeys(errors, _refused))


def _said(text: str, stops: list[str], growing: bool) -> tuple[dict[str, str], bool]:
    """The message of an answer's text, up to the first of the stops, and whether there was one.

    Args:
        growing: more may follow, so that what could become a mark is held back.
    """
    parts = _THOUGHT.split(text)
    content, thoughts = "".join(parts[::2]).strip(), "\n".join(map(str.strip, parts[1::2])).strip()
    stopped = any(stop in content for stop in stops)
    for stop in stops:
        content = content.partition(stop)[0]
    if growing and not stopped:
        content, thoughts = before_marks(content, *stops, "<think>"), before_marks(thoughts, "</think>")
    return {"role": "assistant", "content": content, "reasoning_content": thoughts}, stopped


def _openai_call(index: int, call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["function"]["name"], "arguments": json.dumps(call["function"]["arguments"])}
    return {"index": index, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    text, status = getattr(error, "detail", str(error)), getattr(error, "status_code", 400)
    about = {"message": text, "type": "invalid_request_error", "param": None, "code": None}
    return _json({"error": about}, status)
