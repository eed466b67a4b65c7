"""Rows: reading, checking, gold calls, order and cursor."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.rows import Cursor, epoch_order, gold_calls, load_examples, next_batch, row_tools
from grpo_jax.types import Example, ToolCall

GOOD = '{"prompt": "What is 15 plus 27?", "answer": "Sum: 42"}'


@pytest.fixture
def rows_file(tmp_path):
    """Writes the lines to rows.jsonl and gives its path."""

    def write(*lines: str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="module", autouse=True)
def tfds_cache(tmp_path_factory):
    """TFDS must not write into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


# Reading


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
    with pytest.raises(ValueError, match=r"rows.jsonl:1: lacks the column 'query' of the mapping; it has"):
        load_examples(path, columns={"prompt": "query"})


def test_byte_order_mark_windows_line_ends_and_blank_lines_at_the_end_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n\r\n  \n".encode())
    assert [e.source for e in load_examples(str(path))] == [f"{path}:1", f"{path}:2"]


def test_a_line_separator_inside_a_string_does_not_end_the_row(rows_file):
    (example,) = load_examples(rows_file('{"prompt": "a\u2028b", "answer": "x\x85"}'))
    assert (example.messages[0]["content"], example.answer) == ("a\u2028b", "x\x85")


def test_a_whole_surrogate_pair_is_its_character(rows_file):
    (example,) = load_examples(rows_file(r'{"prompt": "\ud83d\ude00", "answer": "x"}'))
    assert example.messages[0]["content"] == "😀"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "not JSON: .*; write one JSON object a line, got \"{'prompt': 1}\""),
        (
            r'{"prompt": "a", "answer": "b", "x": "\ud83d"}',
            "not JSON: a string holds half of a surrogate pair",
        ),
        ('{"prompt": "a", "answer": "b", "x": NaN}', "not JSON: NaN is not JSON; write null or a number"),
        ("[" * 100_000, "not JSON: "),
        ("", "empty line between rows; delete it"),
        ('["a", "b"]', r"a row must be a JSON object like .*, got \[\"a\", \"b\"\]"),
        ('{"answer": "b"}', "lacks the column 'prompt'; it has 'answer'"),
        ('{"prompt": "a", "label": "b"}', "lacks the column 'answer'; it has 'prompt', 'label'"),
        ("{}", "lacks the column 'prompt'; it has none"),
        ('{"prompt": "a", "answer": 42}', "'answer' must be text, as the tool returns it, got 42"),
        ('{"prompt": "a", "answer": null}', "'answer' must be text, .*, got null"),
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
            "the last message of 'prompt' must be a user's or a tool's, got role 'assistant'",
        ),
        (
            '{"prompt": "a", "answer": "b", "completions": []}',
            "column 'completions' is a keyword that rewards get from the trainer; rename it",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(rows_file, line, message):
    path = rows_file(GOOD, line, GOOD)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {message}"):
        load_examples(path)


def test_text_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "answer": "x"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: not UTF-8 after line .*; save it as UTF-8"):
        load_examples(str(path))


@pytest.mark.parametrize("part", ["", "[:50%]"])
def test_a_file_without_rows_is_an_error(rows_file, part):
    with pytest.raises(ValueError, match=r"holds no rows; write one JSON object a line"):
        load_examples(rows_file("", "") + part)


@pytest.mark.parametrize("part", ["", "[:50%]"])
def test_a_missing_file_names_the_nearest_one(rows_file, part):
    path = rows_file(GOOD)
    with pytest.raises(FileNotFoundError, match=rf"row\.jsonl does not exist; nearest: {path}"):
        load_examples(path.replace("rows", "row") + part)


def test_a_missing_file_with_nothing_near_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data set rows does not exist; there is no \.jsonl file"):
        load_examples("rows")


@given(
    st.lists(
        st.fixed_dictionaries(
            {"prompt": st.text(min_size=1).filter(str.strip), "answer": st.text()},
            optional={"more": st.recursive(st.none() | st.integers() | st.text(), st.lists)},
        ),
        min_size=1,
    ),
    st.booleans(),
)
def test_what_json_writes_is_read_back(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    for i, (row, example) in enumerate(zip(rows, load_examples(str(path)), strict=True), start=1):
        assert example.messages == [{"role": "user", "content": row["prompt"]}]
        assert {"answer": example.answer, **example.extra, "prompt": row["prompt"]} == row
        assert example.source == f"{path}:{i}"


# Slices, TFDS, the hub


def numbered(count: int) -> list[str]:
    return [f'{{"prompt": "question {i} ü\\u2028", "answer": "{i}"}}' for i in range(count)]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (":95%", range(0, 38)),
        ("95%:", range(38, 40)),
        ("3:7", range(3, 7)),
        ("-2:", range(38, 40)),
    ],
)
def test_a_slice_holds_the_rows_of_the_whole_file_with_their_lines(rows_file, part, expected):
    path = rows_file(*numbered(40))
    whole = load_examples(path)
    sliced = load_examples(f"{path}[{part}]")
    assert sliced == [whole[i] for i in expected]


def test_columns_of_a_slice_can_be_mapped(rows_file):
    path = rows_file(*(line.replace("prompt", "q") for line in numbered(4)))
    examples = load_examples(f"{path}[2:]", columns={"prompt": "q"})
    assert [e.messages[0]["content"] for e in examples] == ["question 2 ü\u2028", "question 3 ü\u2028"]
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:3: lacks the column 'x' of the mapping; it has 'q', 'an"
    ):
        load_examples(f"{path}[2:]", columns={"prompt": "x"})


def test_a_slice_sees_a_changed_file(rows_file):
    assert load_examples(rows_file(*numbered(4)) + "[:50%]")[-1].answer == "1"
    assert load_examples(rows_file(*numbered(8)) + "[:50%]")[-1].answer == "3"


def test_a_bad_row_of_a_slice_is_named_by_its_line(rows_file):
    path = rows_file(*numbered(9), "{}")
    assert len(load_examples(f"{path}[:9]")) == 9
    with pytest.raises(ValueError, match=r"rows\.jsonl:10: lacks the column 'prompt'"):
        load_examples(f"{path}[5:]")


@pytest.mark.parametrize("part", ["many", ":0%", "3:3", ":41"])
def test_a_slice_without_rows_or_sense_is_an_error(rows_file, part):
    path = rows_file(*numbered(40))
    with pytest.raises(ValueError, match=r"selects no rows: .*; write \[:95%\], \[95%:\] or \[100:200\]"):
        load_examples(f"{path}[{part}]")


def test_processes_that_start_together_share_one_cache(rows_file, tmp_path):
    path = rows_file(*numbered(200))
    code = f"from grpo_jax.data import load_examples; print(len(load_examples('{path}[:50%]')))"
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path / "cache")}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in running] == [b"100\n", b"100\n"]


def test_a_plain_file_is_read_without_tfds(rows_file):
    path = rows_file(GOOD)
    code = (
        "import sys; from grpo_jax.data import load_examples; "
        f"load_examples('{path}'); print('tensorflow_datasets' in sys.modules, 'transformers' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code]) == b"False False\n"


def test_a_registered_tfds_data_set_is_read_with_config_split_and_mapping():
    import tensorflow_datasets as tfds

    class LittleQuiz(tfds.core.GeneratorBasedBuilder):
        """Three questions per level."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=n) for n in ("easy", "hard")]  # noqa: RUF012

        def _info(self):
            text = tfds.features.Text()
            features = {
                "question": text,
                "answer": text,
                "marks": np.int64,
                "names": tfds.features.Sequence(text),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

        def _generate_examples(self, split):
            for i in range(3):
                question = f"{self.builder_config.name} {split} ü {i}"
                yield i, {"question": question, "answer": str(i), "marks": i, "names": ["add"]}

    columns = {"prompt": "question", "tools": "names"}
    examples = load_examples("tfds:little_quiz/hard:test[1:]", columns=columns)
    assert examples == [
        Example(
            [{"role": "user", "content": f"hard test ü {i}"}],
            str(i),
            {"marks": i, "tools": ["add"]},
            f"tfds:little_quiz/hard:test[1:]:{i}",
        )
        for i in (1, 2)
    ]
    assert len(load_examples("tfds:little_quiz", columns={"prompt": "question"})) == 3
    with pytest.raises(ValueError, match=r"little_quiz:dev cannot be loaded: .*local \.jsonl file"):
        load_examples("tfds:little_quiz:dev")


def test_an_unknown_tfds_data_set_is_an_error():
    with pytest.raises(ValueError, match=r"tfds:no_such_set cannot be loaded: Dataset no_such_set not found"):
        load_examples("tfds:no_such_set")


def test_a_hub_id_without_the_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"owner/name is no file here, .* pip install datasets"):
        load_examples("owner/name")


def test_a_hub_id_is_read_through_the_library(monkeypatch):
    def load_dataset(name, split):
        if name != "owner/name":
            raise ConnectionError("offline\nlong advice")
        return [{"question": f"{name} {split}", "answer": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (example,) = load_examples("owner/name", columns={"prompt": "question"})
    assert example.messages[0]["content"] == "owner/name train"
    assert example.source == "owner/name:1"
    with pytest.raises(ValueError, match=r"cannot be loaded from the hub: offline; or give the path of a"):
        load_examples("owner/other")


# Gold calls


def convert(amount: float, fees: dict, parts: list, limit: int | None) -> str:
    """Four parameters of its own."""
    return ""


def anything(**values: str) -> str:
    """Takes every keyword."""
    return ""


TOOLS = {"convert": convert, "anything": anything}


def with_columns(**extra) -> Example:
    return Example([], "", extra, "rows.jsonl:7")


def test_tool_call_is_taken_as_it_is():
    arguments = {"amount": 5.0, "limit": None, "fees": {"fixed": None}, "strange": None}
    call = {"name": "convert", "arguments": arguments}
    assert gold_calls(with_columns(tool_call=call), TOOLS) == [ToolCall("convert", arguments)]
    assert gold_calls(with_columns(tool_call=[call, call]), None) == [ToolCall("convert", arguments)] * 2


def test_ground_truth_loses_its_padding():
    padded = {
        "amount": 5.0,
        "limit": None,
        "fees": {"fixed": None, "rate": 0.25, "deep": {"x": None, "y": 2.0}},
        "parts": [{"size": 3.0, "colour": None}, None, True],
        "age": None,
        "state": "CA",
    }
    expected = {
        "amount": 5,
        "limit": None,
        "fees": {"rate": 0.25, "deep": {"y": 2}},
        "parts": [{"size": 3}, None, True],
    }
    (call,) = gold_calls(with_columns(ground_truth={"name": "convert", "arguments": padded}), TOOLS)
    assert call == ToolCall("convert", expected)
    assert isinstance(call.arguments["amount"], int)
    assert call.arguments["parts"][2] is True


def test_ground_truth_without_functions_drops_every_null():
    row = with_columns(ground_truth=[{"name": "x", "arguments": {"a": None, "b": 2.0}}])
    assert gold_calls(row, None) == [ToolCall("x", {"b": 2})]


def test_ground_truth_of_a_function_with_free_keywords_keeps_what_has_a_value():
    row = with_columns(ground_truth={"name": "anything", "arguments": {"a": None, "b": "c"}})
    assert gold_calls(row, TOOLS) == [ToolCall("anything", {"b": "c"})]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tool_call": None},
        {"tool_call": []},
        {"ground_truth": None},
        {"tool_call": [], "ground_truth": None},
    ],
)
def test_a_row_may_have_no_gold_call(extra):
    assert gold_calls(with_columns(**extra), TOOLS) == []


def test_tool_call_comes_before_ground_truth():
    call = {"name": "anything", "arguments": {}}
    assert gold_calls(with_columns(tool_call=[], ground_truth=call), TOOLS) == []
    assert gold_calls(with_columns(tool_call=None, ground_truth=call), TOOLS) == [ToolCall("anything", {})]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("add(1, 2)", 'a call must be {"name": text, "arguments": object}, got "add(1, 2)"'),
        ({"name": "convert"}, "a call must be"),
        ({"name": 3, "arguments": {}}, "a call must be"),
        ({"name": "convert", "arguments": "{}"}, "a call must be"),
        ([[]], "a call must be"),
        ({"name": "divide", "arguments": {}}, "unknown tool 'divide'; the tools are convert, anything"),
    ],
)
def test_a_bad_gold_call_is_named_by_row_and_column(call, message):
    with pytest.raises(ValueError) as raised:
        gold_calls(with_columns(tool_call=call), TOOLS)
    assert str(raised.value).startswith(f"rows.jsonl:7: column 'tool_call': {message}")


# The tools of a row


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({}, ["a", "b", "c"]),
        ({"tools": None}, ["a", "b", "c"]),
        ({"tools": ["c", "a"]}, ["a", "c"]),
        ({"tools": ["b", "b"]}, ["b"]),
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
        row_tools(with_columns(tools=tools), TOOLS)
    assert str(raised.value).replace("tools': ", "tools' : ") == f"rows.jsonl:7: column 'tools' {message}"


def test_a_gold_call_that_the_row_does_not_see_is_named_by_row():
    gold = {"name": "anything", "arguments": {}}
    assert gold_calls(with_columns(tool_call=gold, tools=["anything"]), TOOLS) == [ToolCall("anything", {})]
    with pytest.raises(ValueError) as raised:
        gold_calls(with_columns(tool_call=gold, tools=["convert"]), TOOLS)
    assert str(raised.value) == (
        "rows.jsonl:7: column 'tool_call': the row does not see the tool 'anything', only convert; "
        "add it to the column 'tools'"
    )


# Order


def test_epoch_order_is_fixed_by_seed_and_epoch():
    """The literals hold a run's resume together: another order would repeat and skip rows."""
    assert epoch_order(0, 0, 8).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert epoch_order(0, 1, 8).tolist() == [2, 0, 4, 1, 7, 5, 3, 6]
    assert epoch_order(1, 0, 8).tolist() == [0, 5, 4, 1, 2, 6, 3, 7]


@given(st.integers(1, 40), st.data())
def test_every_row_is_drawn_at_most_once_per_epoch_and_draws_are_unique(n, data):
    size = data.draw(st.integers(1, n))
    seed = data.draw(st.integers(0, 2**32))
    cursor, draws = Cursor(), []
    for _ in range(2 * (n // size)):
        batch, cursor = next_batch(n, size, cursor, seed)
        assert len(batch) == size
        draws += batch
    assert cursor == Cursor(2, 0)
    half = n // size * size
    for epoch in range(2):
        rows, keys = zip(*draws[epoch * half : (epoch + 1) * half], strict=True)
        assert len(set(rows)) == half
        assert set(rows) <= set(range(n))
        assert keys == tuple(range(epoch * n, epoch * n + half))


def test_an_incomplete_last_batch_is_dropped():
    batch, cursor = next_batch(5, 2, Cursor(epoch=3, next_index=2), seed=9)
    assert [key for _, key in batch] == [17, 18]
    assert cursor == Cursor(epoch=4, next_index=0)


def test_a_cursor_of_a_smaller_batch_moves_on_when_no_full_batch_is_left():
    batch, cursor = next_batch(10, 4, Cursor(epoch=0, next_index=8), seed=0)
    assert [key for _, key in batch] == [10, 11, 12, 13]
    assert cursor == Cursor(epoch=1, next_index=4)


@given(st.integers(1, 30), st.integers(0, 9), st.data())
def test_a_stored_cursor_continues_the_same_draws(n, seed, data):
    size, done = data.draw(st.integers(1, n)), data.draw(st.integers(0, 7))
    cursor = Cursor()
    for _ in range(done):
        _, cursor = next_batch(n, size, cursor, seed)
    restored = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
    assert restored == cursor
    assert next_batch(n, size, restored, seed) == next_batch(n, size, cursor, seed)


@pytest.mark.parametrize("size", [0, -1, 6])
def test_a_batch_that_the_data_cannot_fill_is_an_error(size):
    with pytest.raises(ValueError, match=f"between 1 prompt and the data set's 5 rows, got {size}"):
        next_batch(5, size, Cursor(), seed=0)
