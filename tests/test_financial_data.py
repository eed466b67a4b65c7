"""The committed data files: reproducible, solvable, and train and test separate."""

import collections
import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from tools_funcs import two_step_tools
from tools_funcs.financial_tools_complex import TOOL_FUNCTIONS

ROOT = Path(__file__).resolve().parent.parent
TOOLS = {tool.__name__: tool for tool in TOOL_FUNCTIONS}
TWO_STEP_TOOLS = {tool.__name__: tool for tool in two_step_tools.TOOL_FUNCTIONS}
sys.path.insert(0, str(ROOT / "scripts"))
import financial_phrases  # noqa: E402
import make_two_step_data  # noqa: E402


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]


FINANCIAL = {split: read(f"financial_{split}.jsonl") for split in ("train", "test")}
TWO_STEP = {split: read(f"two_step_{split}.jsonl") for split in ("train", "test")}


def question(row: dict) -> str:
    return row["prompt"][1]["content"]


@pytest.mark.parametrize("job", ["financial", "two_step"])
def test_the_script_reproduces_the_committed_bytes(job, tmp_path):
    # Put before the installed packages, so that this checkout's tools are used.
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    command = [sys.executable, f"scripts/make_{job}_data.py", "--output_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    for split in ("train", "test"):
        name = f"{job}_{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()


def test_sizes_and_columns():
    assert len(FINANCIAL["train"]) >= 1_000 and len(FINANCIAL["test"]) >= 100
    assert sum((ROOT / "data" / f"financial_{split}.jsonl").stat().st_size for split in FINANCIAL) < 5_000_000
    rows = FINANCIAL["train"] + FINANCIAL["test"]
    assert all(list(row) == ["prompt", "answer", "tool_call"] for row in rows)
    assert all([message["role"] for message in row["prompt"]] == ["system", "user"] for row in rows)
    # One system message for all, or the shared preamble would be short.
    assert len({row["prompt"][0]["content"] for row in rows}) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_calls_reproduce_the_answers(split):
    for row in FINANCIAL[split]:
        tool = TOOLS[row["tool_call"]["name"]]
        assert list(row["tool_call"]["arguments"]) == list(inspect.signature(tool).parameters)
        assert tool(**row["tool_call"]["arguments"]) == row["answer"]
        assert not row["answer"].startswith("Error")


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_tool_enum_value_and_boolean_occurs(split):
    rows_of = collections.defaultdict(list)
    for row in FINANCIAL[split]:
        rows_of[row["tool_call"]["name"]].append(row["tool_call"]["arguments"])
    for name, tool in TOOLS.items():
        assert len(rows_of[name]) >= 12
        for parameter, hint in typing.get_type_hints(tool).items():
            seen = [arguments[parameter] for arguments in rows_of[name]] if parameter != "return" else []
            for part in (hint, *typing.get_args(hint)):
                if typing.get_origin(part) is typing.Literal:
                    assert set(typing.get_args(part)) <= set(seen), parameter
                if part is bool:
                    assert {True, False} == set(seen), parameter


def test_no_question_is_in_both_files_or_twice():
    train = [question(row) for row in FINANCIAL["train"]]
    test = [question(row) for row in FINANCIAL["test"]]
    assert len(set(train)) == len(train) and len(set(test)) == len(test)
    assert not {_skeleton(text) for text in train} & {_skeleton(text) for text in test}


def test_no_phrase_serves_both_files():
    for phrases in _all_phrases(vars(financial_phrases)):
        assert phrases.train and phrases.test
        assert not {_plain(text) for text in phrases.train} & {_plain(text) for text in phrases.test}


def test_asking_sentences_of_the_test_file_do_not_occur_in_the_training_file():
    text = "\n".join(_plain(question(row)) for row in FINANCIAL["train"])
    for entries in financial_phrases.PHRASES.values():
        for ask in entries["ask"].test:
            longest = max(re.split(r"\{\w+\}", _plain(ask)), key=len)
            assert longest.strip() not in text


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_number_is_in_the_question_or_documented(split):
    """Reads the numbers back out of the text, independently of the code that wrote them."""
    for row in FINANCIAL[split]:
        defaults = _documented(TOOLS[row["tool_call"]["name"]])
        found = _numbers(question(row))
        for parameter, value in row["tool_call"]["arguments"].items():
            if value == defaults.get(parameter, "required"):
                continue
            for number in _numbers_in(value):
                # An amount may be stated per month where the parameter is per year, or the reverse.
                told = {round(abs(number) * factor, 6) for factor in (1, 100, 12, 1 / 12)}
                spoken_zero = number == 0 and parameter in ("child_current_age", "spouse_income")
                assert spoken_zero or told & found, (parameter, number, question(row))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_enum_value_is_said_or_documented(split):
    for row in FINANCIAL[split]:
        name = row["tool_call"]["name"]
        defaults = _documented(TOOLS[name])
        text = _plain(question(row))
        for parameter, value in row["tool_call"]["arguments"].items():
            said = financial_phrases.PHRASES[name].get(parameter)
            if value == defaults.get(parameter, "required") or not isinstance(value, str):
                continue
            if parameter in ("state", "property_state", "state_residency"):
                phrases = (value, financial_phrases.STATE_NAMES[value])
            elif parameter.endswith("currency"):
                phrases = getattr(financial_phrases.CURRENCIES[value], split)
            else:
                phrases = getattr(said[value], split)
            assert any(_plain(phrase) in text for phrase in phrases), (parameter, value, text)


@pytest.mark.parametrize("split", ["train", "test"])
def test_two_step_calls_chain_to_the_answer(split):
    assert len(TWO_STEP[split]) >= {"train": 200, "test": 40}[split]
    for row in TWO_STEP[split]:
        first, second = row["tool_call"]
        intermediate = TWO_STEP_TOOLS[first["name"]](**first["arguments"])
        assert TWO_STEP_TOOLS[second["name"]](**second["arguments"]) == row["answer"]
        # The second call takes the number that the first one printed, which the question does not tell.
        printed = float(re.sub(r"[^\d.]", "", intermediate.split(": ")[1]))
        assert second["arguments"]["amount"] == printed
        assert printed not in _numbers(question(row))


def test_two_step_files_share_no_question_and_use_every_tool():
    skeletons = {split: {_skeleton(question(row)) for row in TWO_STEP[split]} for split in TWO_STEP}
    assert not skeletons["train"] & skeletons["test"]
    for split in TWO_STEP:
        assert {call["name"] for row in TWO_STEP[split] for call in row["tool_call"]} == set(TWO_STEP_TOOLS)
    for texts in make_two_step_data.QUESTIONS.values():
        assert not set(texts["train"]) & set(texts["test"])


def _documented(tool) -> dict:
    """Each parameter's "If not stated" value, read from the docstring."""
    found = {}
    for line in tool.__doc__.splitlines():
        name, _, text = line.strip().partition(": ")
        if "If not stated: " in text:
            value = text.split("If not stated: ")[1].removesuffix(".")
            found[name] = value if value.replace("_", "").isalpha() else json.loads(value)
    words = {"true": True, "false": False, "null": None}
    return {
        name: words.get(value, value) if isinstance(value, str) else value for name, value in found.items()
    }


def _numbers(text: str) -> set[float]:
    scale = {"k": 1e3, "m": 1e6, "million": 1e6}
    pattern = r"(\d[\d,]*(?:\.\d+)?)\s?(million|[kKmM]\b)?"
    return {
        round(float(digits.replace(",", "")) * scale.get(unit.lower(), 1), 6)
        for digits, unit in re.findall(pattern, text)
    }


def _numbers_in(value) -> list[float]:
    """All numbers in an argument, however deep; booleans are none."""
    if isinstance(value, dict):
        return [number for entry in value.values() for number in _numbers_in(entry)]
    if isinstance(value, list):
        return [number for entry in value for number in _numbers_in(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _plain(text: str) -> str:
    return text.lower().strip(" .?")


def _skeleton(text: str) -> str:
    return re.sub(r"[\d$,.]+\s?(?:k|m|million|%|percent)?", "#", text.lower())


def _all_phrases(value) -> list:
    if isinstance(value, financial_phrases.Phrases):
        return [value]
    if isinstance(value, dict):
        return [
            found
            for key, entry in value.items()
            if not str(key).startswith("__")
            for found in _all_phrases(entry)
        ]
    return []
