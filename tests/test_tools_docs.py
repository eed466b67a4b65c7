"""The examples of docs/tools.md run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.run.options import GRPOConfig
from grpo_jax.tools import ToolRunner, load_tools
from grpo_jax.types import ToolCall

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "tools.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def block(name: str) -> str:
    (found,) = (text for text in BLOCKS if f"def {name}(" in text)
    return found


@pytest.mark.parametrize(
    ("name", "executor", "arguments", "texts"),
    [
        ("add", "process", {"a": 15, "b": 27}, ["Sum: 42"]),
        ("convert", "process", {"amount": 10}, ["9.00 EUR"]),
        ("place_orders", "process", {"orders": [{"item": "tea"}]}, ["ordered 1 x tea"]),
        (
            "place_orders",
            "process",
            {"orders": [{"item": "tea", "quantity": 0}]},
            [re.search(r"```\n(Error: wrong .*?)\n```", PAGE)[1]],
        ),
        ("search", "process", {"query": "tea"}, ["3 results for tea"]),
        ("deposit", "inline", {"amount": 2}, ["Balance: 2", "Balance: 4"]),
        ("take", "inline", {"item": "tea"}, ["0 tea left", "Error: no tea left"]),
        ("fetch", "process", {"n": 1}, ["1", "1"]),
        ("final_answer", "process", {"answer": " "}, ["Error: the answer is empty"]),
    ],
)
def test_an_example_answers_what_the_page_says(tmp_path, caplog, name, executor, arguments, texts):
    (tmp_path / "my_tools.py").write_text(block(name))
    toolbox = load_tools(tmp_path / "my_tools.py")
    with ToolRunner(toolbox, executor, workers=1, cache=False) as runner:
        runner.start_step([{"stock": {"tea": 1}}])
        results = runner.run([ToolCall(name, arguments)] * len(texts), [0] * len(texts))
    assert [result.text for result in results] == texts
    if name != "convert":  # whose rate is undescribed
        assert not caplog.records


def test_the_example_in_python_runs(tmp_path):
    (tmp_path / "program.py").write_text(block("square"))
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_example_is_tested_and_the_defaults_are_those_of_the_options():
    assert len(BLOCKS) == 9
    for option, default in re.findall(r"^\| `(\w+)` \| (\d+)", PAGE, re.MULTILINE):
        assert getattr(GRPOConfig(), option) == float(default)
