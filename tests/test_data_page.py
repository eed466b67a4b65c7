"""docs/data.md: its rows load, and its Python does what it says."""

import re
from pathlib import Path

from grpo_jax.data.gold import gold_calls
from grpo_jax.data.rows import load_examples
from grpo_jax.data.sources import COMPRESSIONS, FORMATS
from grpo_jax.types import ToolCall
from tools_funcs.math_tools import add

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text()
ROWS = re.search(r"^`rows\.jsonl`:\n\n```\n(.*?)^```", PAGE, re.M | re.S)[1]


def test_the_python_of_the_page_holds_for_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(ROWS)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(code, {})
    assert code.count("assert") == 6
    assert gold_calls(load_examples("rows.jsonl")[2], {"add": add}) == [ToolCall("add", {"a": 3, "b": 4})]


def test_the_page_names_every_format():
    for suffix in (*FORMATS, *COMPRESSIONS):
        assert f"`{suffix}`" in PAGE or f"rows{suffix}`" in PAGE
