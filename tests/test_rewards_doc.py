"""The reward files that docs/rewards.md shows do what it says of them, and its table is that of rewards/."""

import re
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.scoring.rewards import BUILT_IN, TrainerState, call_rewards, load_rewards

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/rewards.md").read_text()
SHOWN = dict(re.findall(r"^`(\w+\.py)`\n\n```python\n(.*?)^```", TEXT, re.M | re.S))

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 15, "b": 27}}}
RIGHT = [
    {"role": "assistant", "content": "", "reasoning_content": "word " * 50, "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "Sum: 42"},
    {"role": "assistant", "content": "It is 42."},
]
NO_CALL = [{"role": "assistant", "content": "Hello."}]


def score(tmp_path, name):
    (tmp_path / name).write_text(SHOWN[name])
    return call_rewards(
        load_rewards([str(tmp_path / name)], None),
        completions=[RIGHT, NO_CALL],
        answer=["Sum: 42"] * 2,
        prompts=[[{"role": "user", "content": "What is 15 plus 27?"}]] * 2,
        completion_ids=[[1], [2]],
        trainer_state=TrainerState(global_step=3, max_steps=12, epoch=0.75, num_train_epochs=3.0),
        columns={"expected_tool": ["add", None]},
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("right_answer.py", [1.0, 0.0]),
        ("short_reasoning.py", [0.15, 0.2]),
        ("right_tool.py", [1.0, float("nan")]),
        ("judge.py", [1.0, 0.0]),
        ("logs_more.py", [0.75, 0.0]),
    ],
)
def test_the_files_shown_do_what_is_said(tmp_path, name, expected):
    for _ in range(2):
        outcome = score(tmp_path, name)
        assert outcome.values[:, 0].tolist() == pytest.approx(expected, nan_ok=True)
    if name == "logs_more.py":
        assert (outcome.metrics, outcome.extras) == ({"calls": 0.5}, {"calls": [1, 0]})


def test_the_file_shown_for_turns_scores_each(tmp_path):
    outcome = score(tmp_path, "good_calls.py")
    assert outcome.extras == {"good_calls/turns": [[1.0, None], [None]]}
    np.testing.assert_array_equal(np.concatenate(outcome.turns[0]), [1.0, np.nan, np.nan])


def test_every_file_shown_is_tested():
    assert SHOWN.keys() == {
        "right_answer.py",
        "short_reasoning.py",
        "right_tool.py",
        "judge.py",
        "logs_more.py",
        "good_calls.py",
    }


def test_the_table_names_every_reward_there_is():
    table = set(re.findall(r"^\| `([\w/.]+)`", TEXT[TEXT.index("## Rewards that are included") :], re.M))
    files = {f"rewards/{path.name}" for path in (ROOT / "rewards").glob("*_reward.py")}
    assert table == files | set(BUILT_IN)
