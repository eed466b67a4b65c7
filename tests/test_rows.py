"""Rows: what is read of them, and what is refused."""

import json

import pytest

from grpo_jax.data.rows import load_examples, row_tools
from grpo_jax.types import Example

GOOD = '{"prompt": "What is 15 plus 27?", "answer": "Sum: 42"}'


def test_text_prompt_becomes_a_user_message_and_other_columns_are_kept(rows_file):
    path = rows_file(GOOD, '{"prompt": "Hi", "answer": "x", "tool_call": null, "level": 3}')
    assert load_examples(path) == [
        Example([{"role": "user", "content": "What is 15 plus 27?"}], "Sum: 42", {}, f"{path}:1"),
        Example([{"role": "user", "content": "Hi"}], "x", {"tool_call": None, "level": 3}, f"{path}:2"),
    ]


def test_message_prompts_are_kept_as_they_are(rows_file):
    messages = [
        {"role": "user", "content": "Add 1 and 2."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
        },
        {"role": "tool", "name": "add", "content": "Sum: 3"},
        {"role": "user", "content": "And 4?"},
    ]
    (example,) = load_examples(rows_file(json.dumps({"prompt": messages, "answer": "Sum: 7"})))
    assert example.messages == messages


TOOL = {"role": "tool", "content": "Sum: 3"}


def called(*calls) -> dict:
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}', ' {"a":1}\n'])
def test_recorded_calls_become_what_templates_read(rows_file, arguments):
    """OpenAI's form has the arguments as text, which Qwen2.5's template would quote once more."""
    openai = {"id": "x", "type": "function", "function": {"name": "add", "arguments": arguments}}
    bare = {"name": "add", "arguments": arguments}
    prompt = [{"role": "user", "content": "Add."}, called(openai, bare), TOOL]
    (example,) = load_examples(rows_file(json.dumps({"prompt": prompt, "answer": "Sum: 3"})))
    read = [
        {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
        {"name": "add", "arguments": {"a": 1}},
    ]
    assert example.messages == [prompt[0], called(*read), TOOL]


@pytest.mark.parametrize(
    "calls",
    [
        "add",
        {"name": "add", "arguments": {}},
        ["add"],
        [{"name": "add"}],
        [{"arguments": {}}],
        [{"function": None}],
        [{"function": {"name": "add", "arguments": "{"}}],
        [{"function": {"name": "add", "arguments": "[]"}}],
        [{"function": {"name": "add", "arguments": None}}],
    ],
)
def test_a_bad_recorded_call_is_named_by_line_and_message(rows_file, calls):
    prompt = [{"role": "user", "content": "Add."}, {**called(), "tool_calls": calls}, TOOL]
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1: 'prompt' message 2: (a tool call|tool_calls) must be"
    ):
        load_examples(rows_file(json.dumps({"prompt": prompt, "answer": "x"})))


def test_system_prompt_is_added_only_where_a_row_lacks_one(rows_file):
    own = {"role": "system", "content": "Own."}
    prompt = [own, {"role": "user", "content": "Hi"}]
    path = rows_file(GOOD, json.dumps({"prompt": prompt, "answer": ""}))
    without, with_own = load_examples(path, system_prompt="Use the tools.")
    assert without.messages == [
        {"role": "system", "content": "Use the tools."},
        {"role": "user", "content": "What is 15 plus 27?"},
    ]
    assert with_own.messages == prompt


def test_columns_can_be_mapped(rows_file):
    path = rows_file('{"question": "Hi", "answer": "long", "final": "x", "level": 1}')
    (example,) = load_examples(path, columns={"prompt": "question", "answer": "final"})
    assert example.messages == [{"role": "user", "content": "Hi"}]
    assert (example.answer, example.extra) == ("x", {"level": 1})
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: has no column 'query', which dataset_columns names; it has"
    ):
        load_examples(path, columns={"prompt": "query"})


def test_a_whole_surrogate_pair_is_its_character(rows_file):
    (example,) = load_examples(rows_file(r'{"prompt": "\ud83d\ude00", "answer": "x"}'))
    assert example.messages[0]["content"] == "😀"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "not JSON: .*; write one JSON object per line, got \"{'prompt': 1}\""),
        (
            r'{"prompt": "a", "answer": "b", "x": "\ud83d"}',
            "a string contains half of a surrogate pair, which no file can represent; write the whole character",
        ),
        ('{"prompt": "a", "answer": "b", "x": NaN}', "not JSON: NaN is not JSON; write null or a number"),
        ("[" * 100_000, "not JSON: "),
        ("", "empty line between rows; delete it"),
        ('["a", "b"]', r"a row must be a JSON object like .*, got \[\"a\", \"b\"\]"),
        ('{"answer": "b"}', "has no column 'prompt'; it has 'answer'"),
        ('{"prompt": "a", "label": "b"}', "has no column 'answer'; it has 'prompt', 'label'"),
        ("{}", "has no column 'prompt'; it has none"),
        (
            '{"prompt": "a", "answer": null}',
            "'answer' must be text, .* without null, got null; write it as text",
        ),
        ('{"prompt": "a", "answer": [{"b": null}]}', "'answer' must be text, .*, got .{.b.: null}"),
        ('{"prompt": 42, "answer": "b"}', "'prompt' must be text or a list of chat messages, got 42"),
        ('{"prompt": " ", "answer": "b"}', "'prompt' is empty"),
        ('{"prompt": [], "answer": "b"}', "'prompt' is empty"),
        ('{"prompt": ["a"], "answer": "b"}', "'prompt' message 1 must be .*, got \"a\""),
        (
            '{"prompt": [{"role": "human", "content": "a"}], "answer": "b"}',
            "'prompt' message 1: role must be one of system, user, assistant, tool, got .human.",
        ),
        (
            '{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "b"}',
            "'prompt' message 1: content must be text, got ",
        ),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "c"}',
            "the last message of 'prompt' must have the role user or tool, got 'assistant'",
        ),
        (
            '{"prompt": "a", "answer": "b", "completions": []}',
            "column 'completions' has the name of an argument that rewards get from the trainer; rename it",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(rows_file, line, message):
    path = rows_file(GOOD, line, GOOD)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {message}"):
        load_examples(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("42", "42"),
        ('["é", 1.5, {"a": false}]', '["é", 1.5, {"a": false}]'),
        ("42.0", "42.0"),
        ("true", "true"),
        ('""', ""),
        ('"true"', "true"),
    ],
)
def test_an_answer_that_is_no_text_is_its_json_text(rows_file, value, text):
    (example,) = load_examples(rows_file(f'{{"prompt": "Hi", "answer": {value}}}'))
    assert example.answer == text


@pytest.mark.parametrize("answer", [float("inf"), {1, 2}, object()])
def test_an_answer_that_json_cannot_write_is_an_error(answer):
    with pytest.raises(
        ValueError, match=r"row 1 of the given list: 'answer' must be text, .*; write it as text"
    ):
        load_examples([{"prompt": "Hi", "answer": answer}])


# The tools of a row


def with_columns(**extra) -> Example:
    return Example([], "", extra, "rows.jsonl:7")


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({}, ["a", "b", "c"]),
        ({"tools": None}, ["a", "b", "c"]),
        ({"tools": ["c", "a"]}, ["a", "c"]),
        ({"tools": ["b", "b"]}, ["b"]),
        ({"tools": '["b"]'}, ["b"]),  # a CSV cell
    ],
)
def test_a_row_sees_the_tools_it_names_in_the_loaded_order(extra, names):
    assert row_tools(with_columns(**extra), ["a", "b", "c"]) == names


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("convert", 'must be a list of tool names, as ["convert"], or null for all, got "convert"'),
        ([], 'must be a list of tool names, as ["convert"], or null for all, got []'),
        ({}, 'must be a list of tool names, as ["convert"], or null for all, got {}'),
        (["convert", 3], 'must be a list of tool names, as ["convert"], or null for all, got ["convert", 3]'),
        (["convrt"], ": unknown tool 'convrt'; nearest: convert"),
    ],
)
def test_a_bad_list_of_tools_is_named_by_row(tools, message):
    with pytest.raises(ValueError) as raised:
        row_tools(with_columns(tools=tools), ["convert", "anything"])
    assert str(raised.value).replace("tools': ", "tools' : ") == f"rows.jsonl:7: column 'tools' {message}"
