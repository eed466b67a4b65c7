"""A conversation: its tokens are the template's, pass through the model once, and arrive as they are sampled."""

import contextlib
import functools
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import helpers
import launch
import pytest
from helpers import FREE, SCHEMAS, Script, call_ids, conversation, text_ids

from grpo_jax.rollout import chat as chat_module
from grpo_jax.rollout.chat import Called, Chat, Limits, Malformed, Piece, Reply
from grpo_jax.run.console import Console
from grpo_jax.types import Status

LONGEST = 600  # tokens of a conversation here


@functools.cache
def script():
    return Script(temperature=1)


def new_chat(*turns, answer=80, positions=None, system=None, **settings):
    """A conversation whose model says the given turns, in order."""
    made = script()
    made.load([[token for turn in turns for token in turn]])
    loop = helpers.tool_loop(helpers.dataclasses.replace(made.sampler, budget=LONGEST), **settings)
    params = loop.sampler.export(helpers.weights())
    return Chat(loop, params, SCHEMAS, system, Limits(answer, positions))


def said(chat, prompt, **settings):
    """(text, calls with results, the reply) of an answer."""
    events = list(chat.say(prompt, **settings))
    text = "".join(e.text for e in events if isinstance(e, Piece))
    calls = [(e.call.name, e.result.text) for e in events if isinstance(e, Called)]
    assert isinstance(events[-1], Reply)
    return text, calls, events[-1]


def test_each_token_of_a_conversation_passes_once_and_is_the_templates():
    chat = new_chat(call_ids("add", a=3, b=4), text_ids("It is 7."), text_ids("You are welcome."))
    text, calls, reply = said(chat, "What is 3 plus 4?")
    assert (text, calls) == ("It is 7.", [("add", "Sum: 7")])
    assert [m["role"] for m in reply.messages] == ["assistant", "tool", "assistant"]
    assert (reply.status, reply.tokens) == (
        "answered",
        len(call_ids("add", a=3, b=4)) + len(text_ids("It is 7.")),
    )
    text, calls, reply = said(chat, "Thanks.")
    assert (text, calls, reply.messages) == (
        "You are welcome.",
        [],
        [{"role": "assistant", "content": "You are welcome."}],
    )
    # the template renders the conversation and the question that could follow as the cache holds it
    rendered = conversation().prompt_ids([*chat.messages, {"role": "user", "content": "?"}], SCHEMAS)
    own = script().fed
    T0 = len(chat._loop.tree.preamble)
    last = max(position for position, _ in own)
    assert own == {(at, rendered[at]): 1 for at in range(T0, last + 1)}
    assert rendered[last + 1] == conversation().stop_ids[0]  # pending


def test_an_answer_is_sampled_as_a_rollout_samples_it_after_the_same_messages():
    """`roll_out` meets the first answer as part of a prompt, the conversation as what its cache holds."""
    chat = new_chat(text_ids("Hello."), [FREE] * 12)
    said(chat, "Hi!")
    ids = conversation().prompt_ids([*chat.messages, *helpers.messages("What is 3 plus 4?")], SCHEMAS)
    _, _, reply = said(chat, "What is 3 plus 4?")
    loop = helpers.tool_loop(helpers.new_sampler(temperature=1))
    loop = helpers.dataclasses.replace(
        loop, tree=helpers.make_tree([ids, *helpers.prompts()], helpers.BUDGET)
    )
    (rolled,) = helpers.rollout(loop, [ids], draws=[1])
    sampled = conversation().decode(rolled.completion_ids[:12])
    assert reply.messages[0]["content"].startswith(sampled.rstrip("\ufffd")) and len(sampled) > 5


def test_a_cache_that_grows_changes_no_token():
    """The conversation outgrows the first 128 slots within an answer, and again while a message is fed."""
    turns = [[FREE] * 90, [FREE] * 60, text_ids("Yes.")]

    def contents(slots):
        chat = new_chat(*turns, answer=90)
        begin = chat._loop.sampler.begin
        sampler = helpers.dataclasses.replace(
            chat._loop.sampler, begin=lambda *args, **known: begin(*args, slots, **known)
        )
        chat._loop = helpers.dataclasses.replace(chat._loop, sampler=sampler)
        messages = [said(chat, text)[2].messages for text in ("Hi!", "Go on.")]
        return messages, chat._cache.room + 1

    grown, slots = contents(None)
    plain, _ = contents(LONGEST + 1)
    assert grown == plain and slots == 256


def test_an_answer_that_is_cut_is_closed_before_the_next_message():
    chat = new_chat([FREE] * 20, text_ids("Yes."), answer=16)
    assert said(chat, "Hi!")[2].status == Status.OVERLONG
    script().load([text_ids("Yes.")])
    said(chat, "Still there?")
    cut = conversation().following_ids(helpers.messages("Still there?"))
    assert chat._ids[-len(cut) - len(text_ids("Yes.")) - 1] == conversation().stop_ids[0]

    chat = new_chat([FREE] * 100)
    asked = iter([False, False, True, True, True])
    _, _, reply = said(chat, "Hi!", stop=lambda: next(asked))
    assert (reply.status, reply.tokens) == ("interrupted", 2 * chat_module.PIECE)


def test_text_comes_before_its_turn_ends_and_a_call_is_no_text():
    long = "The sum of these two numbers is certainly something that one may compute."
    chat = new_chat(call_ids("add", "Let me see.", a=1, b=2), text_ids(long), answer=150)
    events = list(chat.say("What is 1 plus 2?"))
    at = next(i for i, e in enumerate(events) if isinstance(e, Called))
    assert "".join(e.text for e in events[:at]).strip() == "Let me see."
    pieces = [e.text for e in events[at + 1 : -1]]
    assert "".join(pieces) == long and len(pieces) > 2

    def before(text):
        return chat_module.before_marks(text, "<tool_call>", "END")

    assert before("I say <tool") == "I say " == before("I say END or not")
    assert before("caf\ufffd") == "caf" == before("cafEN")
    assert before("a < b") == "a < b"


def test_why_an_answer_ended_is_said():
    chat = new_chat(text_ids("<tool_call>\n{]\n</tool_call>"))
    events = list(chat.say("Hi!"))
    assert isinstance(events[-2], Malformed) and events[-2].reason.startswith("not JSON")
    assert events[-1].status == Status.MALFORMED_CALL
    chat = new_chat(*[call_ids("add", a=1, b=2)] * 2, max_iterations=1)
    assert said(chat, "Hi!")[2].status == Status.TOOL_LIMIT
    chat = new_chat(call_ids("echo", text="long " * 60), answer=80)
    assert said(chat, "Hi!")[2].status == Status.OVERLONG
    chat = new_chat(call_ids("echo", text="long " * 9), answer=len(call_ids("echo", text="long " * 9)) + 10)
    assert said(chat, "Hi!")[2].status == Status.OVERLONG_TOOL_RESPONSE


def test_a_conversation_longer_than_the_models_positions_is_refused_and_stays():
    T0 = len(new_chat()._loop.tree.preamble)
    chat = new_chat(text_ids("Hello."), positions=T0 + 60)
    said(chat, "Hi!")
    before = list(chat.messages)
    with pytest.raises(ValueError, match=rf"it has \d+ tokens, the model was made for {T0 + 60}; .*/reset"):
        said(chat, "long " * 60)
    assert chat.messages == before
    chat.reset()
    assert chat.messages == []
    with pytest.raises(ValueError, match="the conversation is full"):
        said(chat, [{"role": "system", "content": "Be brief."}, *helpers.messages("long " * 60)])
    script().load([text_ids("Hello.")])
    said(chat, helpers.messages("Hi!"))
    assert chat._start == T0  # the shared beginning is used again


def test_messages_begin_a_new_conversation_whatever_their_system_message():
    chat = new_chat(text_ids("Hello."), system="Be brief.")
    said(chat, "Hi!")
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    other = [{"role": "system", "content": "Be long."}, *helpers.messages("Hi!")]
    script().load([text_ids("Yes.")])
    assert said(chat, other)[0] == "Yes."
    assert chat.messages[:2] == other
    assert chat._ids[: len(conversation().prompt_ids(other, SCHEMAS))] == conversation().prompt_ids(
        other, SCHEMAS
    )
    script().load([text_ids("No.")])
    said(chat, helpers.messages("Hi!"))
    assert [m["content"] for m in chat.messages] == ["Hi!", "No."]


def test_an_answer_that_is_left_in_the_middle_leaves_the_conversation_whole():
    """As by a second Ctrl-C: the next message continues from what is in the cache."""
    chat = new_chat([FREE] * 40, text_ids("Bye."))
    answer = chat.say("Hi")
    next(answer)
    answer.close()
    assert int(chat._cache.length[0]) == len(chat._ids) - 1
    list(chat.say("Again"))
    assert int(chat._cache.length[0]) == len(chat._ids) - 1


def test_a_thought_that_mentions_a_call_is_text():
    thought = "<think>I write <tool_call> now.</think>"
    chat = new_chat([*text_ids(thought)[:-1], *call_ids("add", a=3, b=4)], text_ids("It is 7."))
    text, calls, _ = said(chat, "What is 3 plus 4?")
    assert calls == [("add", "Sum: 7")]
    assert thought in text


# The command


@functools.cache
def model(folder):
    texts = [json.dumps(SCHEMAS), *helpers.QUESTIONS] * 3
    shape = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 32}
    return helpers.make_tiny_checkpoint(folder, texts, helpers.Sizes(vocab_size=400, **shape))


TOOLS = ("--tools_script", str(launch.ROOT / "tools_funcs" / "math_tools.py"))


@pytest.mark.slow
def test_from_a_pipe_each_line_is_answered_by_a_line(tmp_path):
    twice = [{"role": role, "content": "x"} for role in ("user", "system", "user")]
    deep = functools.reduce(lambda inner, _: [inner], range(600), 1)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": deep}}}
    nested = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        twice[0],
    ]
    asked = [{"prompt": "What is 1 plus 2?", "answer": "Sum: 3"}, {"prompt": "Hi", "reset": True}, {"ask": 1}]
    asked += [{"prompt": twice}, {"prompt": nested}]
    folder = model(tmp_path / "model")
    settings = folder / "tokenizer_config.json"
    strict = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('No.') }}{% endif %}{% endfor %}"
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps(told | {"chat_template": strict + told["chat_template"]}))
    flags = ["--model_name_or_path", folder, *TOOLS, "--max_completion_length", 12]
    done = subprocess.run(
        [sys.executable, "-m", "grpo_jax.chat", *map(str, flags)],
        input="".join(json.dumps(one) + "\n" for one in asked).encode()
        + b'no JSON\n{"prompt":"\xff"}\n{"prompt":"Hi"}\n',
        env={**launch.os.environ, **launch.ENVIRONMENT, "PYTHONIOENCODING": "utf-8:strict"},
        cwd=tmp_path,
        capture_output=True,
    )
    first, second, third, refused, too_deep, fourth, no_text, last = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1, done.stderr.decode()
    assert refused == {"error": "the model's chat template does not take this conversation: No."}
    assert "recursion" in too_deep["error"]
    assert "'utf-8' codec can't decode byte 0xff" in no_text["error"]
    for reply in (first, second, last):
        assert reply.keys() == {"messages", "status", "tokens"}
        assert reply["messages"][0]["role"] == "assistant" and reply["tokens"] <= 12
    assert third == {"error": 'a line must be an object like {"prompt": "…"}, got {"ask": 1}'}
    assert fourth["error"].startswith("a line must be JSON")
    assert b"Loaded 2 tool functions" in done.stderr


TALK = """
import sys
sys.path.insert(0, {tests!r})
import test_chat, grpo_jax.chat as command
from types import SimpleNamespace as Parts
from grpo_jax.rollout.chat import PIECE
from grpo_jax.run.console import Console
from helpers import FREE, TOOLS, call_ids, text_ids

command.HISTORY = command.Path({history!r})
chat = test_chat.new_chat(call_ids("add", a=3, b=4), text_ids("It is 7."), text_ids("Bye \\x1b[31m."))
job = Parts(console=Console(), toolbox=Parts(functions=dict((f.__name__, f) for f in TOOLS)))
command.talk(job, chat)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork")
def test_at_a_terminal_a_person_sees_calls_results_and_answers(tmp_path):
    pexpect = pytest.importorskip("pexpect")
    code = TALK.format(tests=str(launch.ROOT / "tests"), history=str(tmp_path / "history"))
    environment = {**launch.os.environ, **launch.ENVIRONMENT, "TERM": "dumb"}
    shell = pexpect.spawn(
        sys.executable, ["-c", code], env=environment, encoding="utf-8", timeout=240, dimensions=(40, 100)
    )
    shell.expect("> ")
    shell.sendline("What is 3 plus 4?")
    shell.expect(r"→ add\(a=3, b=4\)\r\n← Sum: 7\r\nIt is 7\.\r\n\[answered; \d+ tokens\]\r\n")
    shell.sendline("/tols")
    shell.expect("No command /tols; nearest: /tools")
    shell.sendline("/tools")
    shell.expect(r"add\(a: int, b: int\) -> str\r\n    Add two")
    shell.sendline("Bye")
    shell.expect(r"Bye �\[31m\.\r\n\[answered")  # a model's escape sequence is shown, not obeyed
    shell.sendline("/history")
    shell.expect('"role": "tool", "name": "add", "content": "Sum: 7"')
    shell.sendline("/reset")
    shell.expect("A new conversation.")
    shell.expect("> ")
    for _ in range(10):  # a terminal that changes its mode while it prompts may drop what was typed
        shell.sendintr()
        if not shell.expect(["> ", pexpect.TIMEOUT], timeout=10):
            break
    shell.sendeof()
    shell.expect(pexpect.EOF)
    shell.wait()
    assert shell.exitstatus == 0
    assert "/tools" in (tmp_path / "history").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "scratch"], "model_name_or_path must be a trained model to chat with"),
        (["--tools_script", "broken.py"], "broken.py"),
        (["--tools_script", "none.py"], "none.py"),
        (["--model_name_or_path", "mute"], "writes no <tool_call>"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, flags, message):
    from grpo_jax import chat as command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    mute = model(tmp_path / "mute") / "tokenizer_config.json"
    mute.write_text(mute.read_text().replace("<tool_call>", "<call>"))
    given = {"--model_name_or_path": str(mute.parent), "--tools_script": TOOLS[1]} | dict([flags])
    assert command.main([word for pair in given.items() for word in pair]) == 2
    said = capsys.readouterr().err
    error = said[said.index("Error: ") :]
    assert message in error and error.count("\n") <= 2  # a tool file's own line follows


def test_a_final_call_ends_the_answer_as_in_training():
    final = {"final_tools": {"echo": "text"}, "max_iterations": 1}
    chat = new_chat(call_ids("add", a=3, b=4), call_ids("echo", text="It is 7."), text_ids("Bye."), **final)
    text, calls, reply = said(chat, "What is 3 plus 4?")
    assert (text, calls, reply.status) == ("It is 7.", [("add", "Sum: 7")], "answered")
    assert [(m["role"], m["content"]) for m in reply.messages[1:]] == [
        ("tool", "Sum: 7"),
        ("assistant", "It is 7."),
    ]
    assert said(chat, "Thanks.")[0] == "Bye."


def test_an_answer_may_end_with_its_tool_results():
    chat = new_chat(call_ids("add", a=3, b=4), text_ids("Bye."), stop_after_tools=True)
    _, calls, reply = said(chat, "What is 3 plus 4?")
    assert (calls, reply.status) == ([("add", "Sum: 7")], Status.TOOLS_DONE)
    assert said(chat, "Thanks.")[0] == "Bye."
    shown = conversation().decode(chat._ids)
    assert (
        "Sum: 7" in shown
        and shown.count("<|im_start|>assistant") == shown.count("<|im_end|>\n<|im_start|>user") + 1
    )


def test_a_turn_of_an_answer_has_its_own_limit():
    _, _, reply = said(new_chat([FREE] * 40, max_turn=8), "Hi!")
    assert (reply.status, reply.tokens) == (Status.OVERLONG, 8)


def test_a_temperature_of_training_is_none_of_a_conversation(tmp_path):
    """A run's resolved_config.yaml holds every option."""
    from grpo_jax.run.chat import open_chat
    from grpo_jax.run.config import parse_config

    config = tmp_path / "resolved_config.yaml"
    config.write_text("temperature: 0.7\ntool_functions_module: tools_funcs.math_tools\n")
    flags = ["--config", str(config), "--model_name_or_path", str(model(tmp_path / "model"))]
    for more, temperature in (([], 0), (["--temperature", "0.3"], 0.3)):
        resolved = parse_config(flags + more, prog="test")
        with open_chat("chat", resolved, Console(io.StringIO())) as (_, _, sampling):
            assert sampling.temperature == temperature


def test_sigterm_ends_a_conversation_and_ctrl_c_a_line(monkeypatch):
    from grpo_jax import chat as command
    from grpo_jax.run.stopping import Terminated

    raised = iter([KeyboardInterrupt, Terminated])

    def nothing_typed(_):
        raise next(raised)

    monkeypatch.setattr("builtins.input", nothing_typed)
    monkeypatch.setattr(command, "_typed_before", contextlib.nullcontext)
    with pytest.raises(Terminated):
        command.talk(SimpleNamespace(console=Console(io.StringIO())), None)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_answer_that_the_output_cannot_write_is_escaped(monkeypatch, encoding):
    from grpo_jax import chat as command

    asked = [{"prompt": [{"role": "\ud83d", "content": "x"}]}, {"prompt": [{"role": "é", "content": "x"}]}]
    lines = io.BytesIO("".join(json.dumps(one) + "\n" for one in asked).encode())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=lines))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written := io.BytesIO(), encoding=encoding))
    assert command.answer_lines(None) == 1
    first, second = (json.loads(line)["error"] for line in written.getvalue().decode(encoding).splitlines())
    assert "\ud83d" in first and "é" in second
