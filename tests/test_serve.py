"""The server: OpenAI's forms as the `openai` library reads them, its errors, and one conversation at a time."""

import asyncio
import itertools
import json
import os
import signal
import socket
import sys
import threading
from types import SimpleNamespace as Parts

import helpers
import launch
import openai
import pytest
import test_chat
from helpers import FREE, call_ids, text_ids
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

from grpo_jax import serve
from grpo_jax.rollout.chat import PIECE, Piece, Reply
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.run.openai_api import _said, make_app, read_messages

ASKED = helpers.messages("What is 3 plus 4?")
ADD = {
    "type": "function",
    "function": {
        "description": "Add, elsewhere.",
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


class Server:
    """A server whose model says the given turns; `samplings` are those that it was asked for."""

    def __init__(self, *, system=None, stopping=lambda: False, **limits):
        self.chat, self.samplings = test_chat.new_chat(system=system, **limits), []
        job = Parts(config=Parts(system_prompt=system), sampler=self.sampler)
        app = make_app(job, self.chat, Sampling(0), "tiny", serve.IN_URLS, stopping)
        self.client = TestClient(app, base_url="http://127.0.0.1:8000")

    def sampler(self, sampling):
        self.samplings.append(sampling)
        return self.chat._loop.sampler

    def post(self, *turns, messages=ASKED, **parameters):
        test_chat.script().load([[token for turn in turns for token in turn]])
        return self.client.post("/v1/chat/completions", json={"messages": messages, **parameters})

    def answer(self, *turns, **parameters):
        response = self.post(*turns, **parameters)
        assert response.status_code == 200, response.text
        return ChatCompletion.model_validate_json(response.text, strict=True)

    def stream(self, *turns, **parameters):
        response = self.post(*turns, stream=True, **parameters)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [ChatCompletionChunk.model_validate_json(event.removeprefix("data: ")) for event in events]


def test_the_servers_own_tools_are_run_and_its_answer_comes_back():
    server = Server(system="Be brief.")
    answer = server.answer(call_ids("add", a=3, b=4), text_ids("It is 7."), temperature=0.5, top_p=0.9)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("It is 7.", "stop")
    assert choice.message.tool_calls is None and answer.model == "tiny"
    assert answer.grpo_jax["status"] == "answered"
    assert [m.get("content") for m in answer.grpo_jax["messages"]] == ["", "Sum: 7", "It is 7."]
    sampled = len(call_ids("add", a=3, b=4)) + len(text_ids("It is 7."))
    prompt = helpers.conversation().prompt_ids(
        [{"role": "system", "content": "Be brief."}, *ASKED], helpers.SCHEMAS
    )
    response = helpers.conversation().response_ids([("add", "Sum: 7")])
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (
        sampled,
        len(prompt) + len(response),
    )
    assert server.samplings == [Sampling(0.5, top_p=0.9)]


def test_calls_of_the_clients_tools_are_returned_and_their_results_continue():
    server = Server()
    first = server.answer(call_ids("add", "Let me see.", a=3, b=4), tools=[ADD])
    (choice,) = first.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 3, "b": 4})
    said = choice.message.model_dump()  # with what the library adds, as `refusal: None`
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "seven"}]}
    second = server.answer(text_ids("It is seven."), messages=[*ASKED, said, result], tools=[ADD])
    assert second.choices[0].message.content == "It is seven."
    own = [
        *ASKED,
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}],
        },
        {"role": "tool", "name": "add", "content": "seven"},
    ]
    order = ("name", "description", "parameters")  # that of schemas in training
    ours = {"type": "function", "function": {key: ADD["function"][key] for key in order}}
    rendered = helpers.conversation().prompt_ids(own, [ours])
    assert server.chat._ids[: len(rendered)] == rendered

    none = server.answer(text_ids("Seven."), tools=[ADD], tool_choice="none")
    assert none.usage.prompt_tokens == len(helpers.conversation().prompt_ids(ASKED, []))


def test_a_stream_says_in_parts_what_an_answer_says_at_once():
    server = Server(answer=150)
    long = "The sum of these two numbers is certainly something that one may compute."
    turns = call_ids("add", "Let me see.", a=3, b=4), text_ids(long)
    whole, chunks = server.answer(*turns), server.stream(*turns)
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == whole.choices[0].message.content == f"Let me see.\n\n{long}"
    assert sum(map(bool, parts)) > 3 and chunks[0].choices[0].delta.role == "assistant"
    last = chunks[-1]
    assert (last.choices[0].finish_reason, last.usage, last.grpo_jax) == ("stop", whole.usage, whole.grpo_jax)

    chunks = server.stream(call_ids("add", a=3, b=4), call_ids("add", a=1, b=1), tools=[ADD])
    (call,) = chunks[-2].choices[0].delta.tool_calls
    assert (call.index, call.function.arguments) == (0, '{"a": 3, "b": 4}')
    assert (chunks[-2].choices[0].finish_reason, chunks[-1].choices[0].finish_reason) == (None, "tool_calls")


def test_the_librarys_own_stream_sees_every_call_complete():
    server = Server()
    test_chat.script().load([[*call_ids("add", a=3, b=4)]])
    client = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:8000/v1", http_client=server.client)
    with client.chat.completions.stream(model="tiny", messages=ASKED, tools=[ADD]) as stream:
        kinds = [event.type for event in stream]
    assert kinds.count("tool_calls.function.arguments.done") == 1


def test_null_and_empty_text_are_no_arguments():
    tool = {"type": "function", "function": {"name": "now", "description": None, "parameters": None}}
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": ""}}
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "1", "content": "noon"})
    server = Server()
    assert (
        server.answer(text_ids("Noon."), messages=messages, tools=[tool]).choices[0].message.content
        == "Noon."
    )
    assert read_messages(messages, None)[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_tokens_seeds_and_stops_are_kept():
    server = Server()
    cut = server.answer([FREE] * 40, max_tokens=5)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 5)

    def said(**seed):
        return server.answer([FREE] * 20, max_tokens=20, **seed).choices[0].message.content

    assert said(seed=1) == said(seed=1) != said(seed=2)
    assert said() != said()
    stopped = server.answer(
        text_ids("One, two, three, four."), call_ids("add", a=3, b=4), stop=["four", ", th"]
    )
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("One, two", "stop")
    assert stopped.usage.completion_tokens < len(text_ids("One, two, three, four."))


def test_thoughts_stand_apart_and_no_part_is_taken_back():
    text = "<think>Hm <th</think>a <b <think>More</think>c STO STOP d"
    final, stopped = _said(text, ["STOP"], growing=False)
    assert (final["content"], final["reasoning_content"], stopped) == ("a <b c STO ", "Hm <th\nMore", True)
    for n in range(len(text)):
        for name, part in _said(text[:n], ["STOP"], growing=True)[0].items():
            assert final[name].startswith(part), text[:n]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2, got 3"),
        ({"seed": "one"}, 'seed: Input should be a valid integer, got "one"'),
        ({"n": 2}, "n: Input should be 1, got 2"),
        ({"top_k": 5}, "top_k: Extra inputs are not permitted, got 5"),
        ({"model": "gpt-4"}, "model: the only one is tiny, got gpt-4"),
        ({"messages": None}, "messages: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, '"image_url"'),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, '\'messages\' message 1: role must be one of'),
        ({"messages": helpers.messages("long " * 90)}, "it has"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name: Field required"),
        ({"tools": []}, "tools: List should have at least 1 item"),
        ({"tool_choice": "required"}, "tool_choice: Input should be 'auto' or 'none', got \"required\""),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_said_in_openais_form(change, message):
    for stream in (False, True):
        server = Server(positions=len(helpers.tree().preamble) + 60)
        response = server.post(text_ids("Hi"), stream=stream, **change)
        assert response.status_code == 400
        error = response.json()["error"]
        assert message in error["message"] and error["type"] == "invalid_request_error"
        assert server.answer(text_ids("Hi")).choices[0].message.content == "Hi"  # the next one is served


def test_what_only_a_web_page_would_send_is_refused():
    post = Server().client.post
    plain = post(
        "/v1/chat/completions",
        content=json.dumps({"messages": ASKED}),
        headers={"Content-Type": "text/plain"},
    )
    assert plain.status_code == 400 and "application/json, got 'text/plain'" in plain.text
    assert (
        post("/v1/chat/completions", json={"messages": ASKED}, headers={"Host": "evil.org"}).status_code
        == 400
    )
    names = ("127.0.0.1:8000", "localhost", "[::1]:8000", "[::1]", "[::2]", "::1.evil.org")
    found = {name: Server().client.get("/v1/models", headers={"Host": name}).status_code for name in names}
    assert [name for name, status in found.items() if status == 200] == [*names[:4]]
    assert (
        post("/v1/chat/completions", content="{", headers={"Content-Type": "application/json"}).status_code
        == 400
    )
    assert post("/v1/embeddings", json={}).json()["error"]["message"] == "Not Found"


def test_while_one_is_answered_others_wait_and_the_server_responds(monkeypatch):
    server, running, goes_on, said = Server(), threading.Event(), threading.Event(), []

    def say(messages, stop, asked):
        said.append(messages[-1]["content"])
        running.set()
        goes_on.wait(60)
        yield Piece("Yes.")
        yield Reply([], "answered", 1)

    monkeypatch.setattr(server.chat, "say", say)
    with server.client as client:
        asking = [
            threading.Thread(target=server.post, kwargs={"messages": helpers.messages(text)}) for text in "ab"
        ]
        for thread in asking:
            thread.start()
        assert running.wait(60)
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert len(said) == 1
        goes_on.set()
        for thread in asking:
            thread.join()
    assert sorted(said) == ["a", "b"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_reads_any_more_ends(monkeypatch, stream):
    server, said = Server(), []
    body = json.dumps({"messages": ASKED, "stream": stream}).encode()
    received = iter([{"type": "http.request", "body": body}])

    def say(messages, stop, asked):
        for i in range(1000):
            said.append(i)
            yield Piece("Yes. ")
        yield Reply([], "answered", 1)

    async def receive():
        return next(received, {"type": "http.disconnect"})

    async def send(message):
        pass

    monkeypatch.setattr(server.chat, "say", say)
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    path = {"path": "/v1/chat/completions", "query_string": b"", "root_path": ""}
    scope = {"type": "http", "method": "POST", "headers": headers, **path}
    asyncio.run(server.client.app(scope, receive, send))
    assert 1 <= len(said) < 100


def test_a_server_that_is_asked_to_end_ends_its_answers_as_they_are():
    asked = itertools.chain([False, False], itertools.repeat(True))
    server = Server(stopping=lambda: next(asked))
    answer = server.answer(text_ids("It is 7. " * 6))
    (choice,) = answer.choices
    assert (answer.grpo_jax["status"], choice.finish_reason) == ("interrupted", "stop")
    assert 0 < answer.usage.completion_tokens <= 2 * PIECE


def test_without_the_packages_or_the_port_there_is_one_line(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port), "--model_name_or_path", "none"]) == 2
    assert f"Error: --host 127.0.0.1 --port {port} cannot be used" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve.main(["--model_name_or_path", "none"]) == 2
    assert capsys.readouterr().err == 'Error: serve needs the package uvicorn: pip install -e ".[serve]"\n'


@pytest.mark.slow
def test_the_command_serves_the_openai_library():
    name = os.path.relpath(launch.small_model(), launch.ROOT)
    flags = ["--model_name_or_path", name, *test_chat.TOOLS, "--max_completion_length", 24]
    process = launch.start("serve", [*flags, "--port", 0, "--compilation_cache_dir", launch.XLA_CACHE])
    try:
        url = next(line for line in process.stdout if line.startswith("Serving http")).split()[1]
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        (model,) = client.models.list().data
        assert model.id == name
        whole = client.chat.completions.create(model=model.id, messages=ASKED)
        assert whole.usage.completion_tokens > 0 and whole.grpo_jax["messages"]
        with client.chat.completions.create(model=model.id, messages=ASKED, stream=True) as stream:
            parts = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(parts) == whole.choices[0].message.content  # greedy
        with client.chat.completions.create(model=model.id, messages=ASKED, stream=True) as stream:
            next(iter(stream))  # and leaves
        assert client.chat.completions.create(model=model.id, messages=ASKED, max_tokens=2)
        with pytest.raises(openai.BadRequestError, match=r"temperature: .* got 9"):
            client.chat.completions.create(model=model.id, messages=ASKED, temperature=9)
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "Interrupted.\n"), out


def test_results_are_told_apart_by_the_ids_of_their_calls():
    """Clients that run calls side by side append the results as they come."""
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call | {"id": "1"}, call | {"id": "2"}]}
    results = [{"role": "tool", "tool_call_id": of, "content": f"of {of}"} for of in "21"]
    asked = {"role": "user", "content": "Where is it warmer?"}
    read = read_messages([asked, turn, *results], None)
    assert [m["content"] for m in read if m["role"] == "tool"] == ["of 1", "of 2"]
    without = [{k: v for k, v in result.items() if k != "tool_call_id"} for result in results]
    read = read_messages([asked, turn, *without], None)
    assert [m["content"] for m in read if m["role"] == "tool"] == ["of 2", "of 1"]
    with pytest.raises(ValueError, match=r'tool_call_id "3" is none of the calls before it: \["1", "2"\]'):
        read_messages([asked, turn, results[0] | {"tool_call_id": "3"}], None)
