"""The examples of the original recipe's README run as pasted, and those of ours are what they say."""

import json
import re

import launch
import pytest

from grpo_jax import train
from grpo_jax.data.rows import load_examples
from grpo_jax.scoring.rewards import load_rewards
from grpo_jax.tools import load_tools

TOOLS = '''
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return f"Sum: {a + b}"

def multiply(a: int, b: int) -> str:
    """Multiply two numbers."""
    return f"Product: {a * b}"

TOOL_FUNCTIONS = [add, multiply]
'''

REWARD = '''
def reward_func(completions, answer, **kwargs):
    """1.0 for the correct result, 0.3 for a tool call with another result, 0.0 without a call."""
    rewards = []
    for completion, expected in zip(completions, answer):
        tool_messages = [m for m in completion if m["role"] == "tool"]
        if not tool_messages:
            rewards.append(0.0)
        elif tool_messages[-1]["content"].strip().lower() == expected.strip().lower():
            rewards.append(1.0)
        else:
            rewards.append(0.3)
    return rewards
'''

DATA = """{"prompt": "What is 15 plus 27?", "answer": "Sum: 42"}
{"prompt": "Calculate 8 times 9.", "answer": "Product: 72"}
"""

TOOL_SAYS_42 = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 15, "b": 27}}}],
    },
    {"role": "tool", "name": "add", "content": "Sum: 42"},
]


@pytest.fixture
def files(tmp_path):
    """The three files of the examples."""
    texts = {"my_tools.py": TOOLS, "my_reward.py": REWARD, "my_data.jsonl": DATA}
    return {name: launch.write(tmp_path / name, text) for name, text in texts.items()}


@pytest.mark.parametrize(
    ("reward", "name"),
    [(["--reward_fn", "my_reward.py"], "my_reward"), (["--reward_function_name", "accuracy"], "accuracy")],
)
def test_the_originals_examples_run_as_pasted(tmp_path, files, monkeypatch, reward, name):
    """Flags over configs/default.yaml, which is found from elsewhere; a new model, and a small batch."""
    monkeypatch.chdir(tmp_path)
    flags = ["--tools_script", "my_tools.py", "--dataset_id_or_path", "my_data.jsonl", *reward]
    small = {
        "model_name_or_path": "scratch",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "max_grpo_completion_length": 47,
        "max_steps": 1,
        "output_dir": "out",
        "compilation_cache_dir": launch.XLA_CACHE,
    }
    flags += [word for option, value in small.items() for word in (f"--{option}", str(value))]
    ran = launch.call(train.main, flags, tmp_path / "out")
    assert ran.status == 0, ran.err
    assert "  add(a: int, b: int) -> str" in ran.out
    assert f"Reward function: {name} (" in ran.out
    (line,) = ran.jsonl("metrics.jsonl")
    assert f"rewards/{name}/mean" in line
    rows = ran.jsonl("rollouts/step_000001.jsonl")
    assert sorted(row["answer"] for row in rows) == ["Product: 72"] * 2 + ["Sum: 42"] * 2
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_an_undocumented_argument_has_no_description_in_the_schema(files):
    """One-line docstrings are enough: what is not documented is left out, not made up."""
    schemas = load_tools(files["my_tools.py"]).schemas
    assert [schema["function"]["description"] for schema in schemas] == [
        "Add two numbers.",
        "Multiply two numbers.",
    ]
    assert schemas[0]["function"]["parameters"]["properties"] == {
        "a": {"type": "integer"},
        "b": {"type": "integer"},
    }


def scores(reward_file) -> list[float]:
    """The reward of a right result, another result, and no call, where 42 is expected."""
    (reward,) = load_rewards([str(reward_file)], None)
    wrong = [TOOL_SAYS_42[0], {"role": "tool", "name": "add", "content": "Sum: 41"}]
    completions = [TOOL_SAYS_42, wrong, [{"role": "assistant", "content": "Sum: 42"}]]
    return reward.function(completions=completions, answer=["Sum: 42"] * 3, prompts=[], step=0)


def test_the_originals_reward_gives_what_it_says(files):
    assert scores(files["my_reward.py"]) == [1.0, 0.3, 0.0]


# Our own README


@pytest.fixture
def pasted(tmp_path):
    """The files that README.md shows: "`name`: …" and then the fenced text."""
    readme = (launch.ROOT / "README.md").read_text()
    blocks = re.findall(r"^`([\w.]+\.(?:py|jsonl))`[^\n]*\n\n```\w*\n(.*?)^```", readme, re.M | re.S)
    return {name: launch.write(tmp_path / name, text) for name, text in blocks}


def test_the_readmes_own_files_are_what_it_says(pasted):
    assert pasted.keys() == {"my_tools.py", "my_reward.py", "my_data.jsonl"}
    toolbox = load_tools(pasted["my_tools.py"])
    assert toolbox.functions["add"](15, 27) == "Sum: 42"
    assert toolbox.functions["multiply"](8, 9) == "Product: 72"
    assert scores(pasted["my_reward.py"]) == [1.0, 0.3, 0.0]
    answers = [example.answer for example in load_examples(str(pasted["my_data.jsonl"]))]
    assert answers == ["Sum: 42", "Product: 72"]
    assert json.loads(pasted["my_data.jsonl"].read_text().splitlines()[0])["prompt"]
