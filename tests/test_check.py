"""`train --check`: what it prints of a job, its exit status, and that it leaves and costs nothing."""

import json
import re
import tempfile

import launch
import pytest
from transformers import AutoTokenizer

from grpo_jax import evaluate, sft, train
from grpo_jax.models import hf
from grpo_jax.preflight import check
from grpo_jax.scoring.rewards import RewardError
from grpo_jax.tools import load_tools

TOOLS = '''
def price(item: str, count: int) -> str:
    """The price of some items.

    Args:
        item: What is bought.
        count: How many.
    """
    return f"Price: {3 * count}"

def stock(item: str) -> str:
    """How many are left.

    Args:
        item: What is asked for.
    """
    return f"Left: {len(item)}"

TOOL_FUNCTIONS = [price, stock]
'''

REWARD = '''
def reward_func(completions, answer, **kwargs):
    """1 for the answer, 0.25 for another result, 0 without one."""
    last = [[m["content"] for m in messages if m["role"] == "tool"][-1:] for messages in completions]
    return [float(r == [a]) if r in ([], [a]) else 0.25 for r, a in zip(last, answer)]
'''


CONSTANT = "def reward_func(completions, **kwargs):\n    return [0.5] * len(completions)\n"


def price(item, count, **changes):
    """A row whose gold call returns three times the count."""
    call = {"name": "price", "arguments": {"item": item, "count": count}}
    row = {"prompt": f"Price of {count} {item}?", "answer": f"Price: {3 * count}", "tool_call": call}
    return row | changes


ROWS = [price("nuts", 2), price("figs", 5), price("pears", 14)]


def checked(tmp_path, rows, *flags, **changes):
    """The check of a job with the tools and the reward above; it must cost and leave nothing."""
    values = {
        "tools_script": launch.write(tmp_path / "shop.py", TOOLS),
        "reward_fn": launch.write(tmp_path / "strict.py", REWARD),
        "dataset_id_or_path": launch.write_rows(tmp_path / "rows.jsonl", rows),
        "max_tool_calling_iterations": None,
        "max_grpo_completion_length": 512,
    }
    words = [*launch.options(tmp_path / "run", **values | changes), "--check", *flags]
    ran = launch.call(train.main, words, tmp_path / "run")
    assert ran.compiles == 0
    assert not (tmp_path / "run").exists()
    return ran


def figures(ran, title) -> list[str]:
    """The indented lines below a title."""
    lines = ran.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title)) + 1
    stop = next(i for i in range(start, len(lines)) if not lines[i].startswith("  "))
    return [line.strip() for line in lines[start:stop]]


def cells(ran, title) -> list[list[str]]:
    """The rows of a table, without that of its columns' names."""
    return [re.split("  +", line) for line in figures(ran, title)[1:]]


def marked(ran, mark) -> list[str]:
    return [line for line in ran.out.splitlines() if line.startswith(mark)]


# A job in which nothing is wrong


def test_a_sound_job_passes_with_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "load_params", None)  # weights are not read
    ran = checked(tmp_path, ROWS)
    assert ran.status == 0, ran.err
    schemas = load_tools(tmp_path / "shop.py").schemas
    assert [json.loads(line) for line in figures(ran, "Tool schemas")] == schemas
    counts = "Gold calls of 3 rows: 3 ran, 0 returned an error; the last result is the answer in 3 rows"
    assert counts in ran.out
    assert figures(ran, "Mean rewards of conversations written by hand, for 3 rows") == [
        "reward  no call  wrong call  gold calls",
        "strict  0        0.25        1",
    ]
    assert "Check passed; hints: 0" in ran.out
    assert not marked(ran, "Hint") + marked(ran, "Problem")
    assert "3 rows, 1 batches an epoch" in ran.out


def test_the_sample_conversations_are_of_one_row(tmp_path):
    out = checked(tmp_path, ROWS).out
    assert f'{tmp_path}/rows.jsonl:1 asks "Price of 2 nuts?"' in out
    samples = out.split("Sample conversations\n")[1].splitlines()
    assert samples[:10] == [
        '  status answered, rewards 0, answer "Price: 6"',
        "    assistant: I do not know.",
        '  status answered, rewards 0.25, answer "Price: 6"',
        "    assistant: price(item='figs', count=5)",  # of the next row
        "    tool: Price: 15",
        "    assistant: Price: 15",
        '  status answered, rewards 1, answer "Price: 6"',
        "    assistant: price(item='nuts', count=2)",
        "    tool: Price: 6",
        "    assistant: Price: 6",
    ]


def test_tokens_are_those_of_the_chat_template(tmp_path):
    """Rendered whole by transformers; the line break after the last turn is not sampled."""
    ran = checked(
        tmp_path, ROWS, eval_dataset_id_or_path=launch.write_rows(tmp_path / "eval.jsonl", ROWS[2:])
    )
    tokenizer = AutoTokenizer.from_pretrained(launch.small_model())

    def length(messages, **how):
        schemas = load_tools(tmp_path / "shop.py").schemas
        return len(tokenizer.apply_chat_template(messages, tools=schemas, return_dict=False, **how))

    prompts, completions = [], []
    for row in ROWS:
        question = [{"role": "user", "content": row["prompt"]}]
        turns = [
            {"role": "assistant", "content": "", "tool_calls": [{"function": row["tool_call"]}]},
            {"role": "tool", "name": "price", "content": row["answer"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        prompts.append(length(question, add_generation_prompt=True))
        completions.append(length(question + turns) - prompts[-1] - 1)

    def line(of, n):
        return [of, str(len(n)), str(min(n)), f"{sum(n) / len(n):.1f}", str(max(n))]

    title = "Tokens (a completion may have max_grpo_completion_length = 512)"
    assert cells(ran, title)[1:] == [
        line("prompts", prompts),
        line("evaluation prompts", prompts[2:]),
        line("completions of gold calls", completions),
    ]


def test_nothing_is_left_or_removed(tmp_path, monkeypatch):
    """A scratch model is made elsewhere, and a run that is there stays, with --overwrite_output_dir too."""
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    kept = launch.write(tmp_path / "kept/summary.json", '{"after": {}}')
    output = ("--output_dir", kept.parent, "--overwrite_output_dir")
    ran = checked(tmp_path, ROWS, *output, model_name_or_path="scratch")
    assert ran.status == 0, ran.err
    assert "Made a small model" in ran.out
    assert [*elsewhere.iterdir()] == []
    assert [*kept.parent.iterdir()] == [kept]


def test_a_hub_model_is_fetched_without_its_weights(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append(allow_patterns)
        return launch.small_model()

    monkeypatch.setattr(hf, "snapshot_download", snapshot)
    assert checked(tmp_path, ROWS, model_name_or_path="some/model").status == 0
    assert asked == [["*.json", "*.txt", "*.jinja"]]
    hf.fetch_model("some/model")
    assert "*.safetensors" in asked[1]


# Jobs that would earn nothing


def test_gold_calls_that_do_not_run_fail_the_check(tmp_path):
    call = {"name": "price", "arguments": {"item": "nuts", "number": 2}}
    ran = checked(tmp_path, [price("nuts", 2, tool_call=call), price("figs", 5, tool_call=call)])
    assert ran.status == 1
    counts = "Gold calls of 2 rows: 0 ran, 2 returned an error; the last result is the answer in 0 rows"
    assert counts in ran.out
    problem, top = marked(ran, "Problem: ")
    assert problem.startswith(
        f"Problem: {tmp_path}/rows.jsonl:1: no gold call runs; the first: price(item='nuts', number=2) returns "
        '"Error: wrong arguments for price: '
    )
    assert "no gold conversation earns the top reward" in top
    assert "Check failed: no right answer would be rewarded; problems: 2; hints: 0" in ran.out


def test_answers_in_another_number_format_fail_the_check(tmp_path):
    """Every conversation with a call earns 0.25: nothing tells right from wrong."""
    rows = [price("nuts", 2, answer="Price: 6.0"), price("figs", 500, answer="Price: 1,500")]
    ran = checked(tmp_path, rows)
    assert ran.status == 1
    assert cells(ran, "Mean rewards") == [["strict", "0", "0.25", "0.25"]]
    (hint,) = marked(ran, "Hint: ")
    assert (
        "2 of 2 answers differ from what their gold calls return only by number format or whitespace" in hint
    )
    assert f"{tmp_path}/rows.jsonl:1: " in hint
    assert 'here the answer is "Price: 6.0", the tool returns "Price: 6"' in hint
    (problem,) = marked(ran, "Problem: ")
    assert "the most that anything earns is 0.25; here it earns 0.25, a wrong call 0.25, no call 0" in problem


def test_one_answer_in_another_format_is_a_hint(tmp_path):
    ran = checked(tmp_path, [*ROWS, price("kiwis", 4, answer="Price: 12 ")])
    assert ran.status == 0
    differing, unrewarded = marked(ran, "Hint: ")
    assert (
        "rows.jsonl:4: 1 of 4 answers differ from what their gold calls return only by case, or by"
        in differing
    )
    assert "rows.jsonl:4: 1 of 4 gold conversations earn no more than a wrong call, or none" in unrewarded
    # (1 + 1 + 1 + 0.25) / 4
    assert cells(ran, "Mean rewards") == [["strict", "0", "0.25", "0.812"]]


def test_a_reward_that_is_the_same_for_everything_fails_the_check(tmp_path):
    ran = checked(tmp_path, ROWS, reward_fn=launch.write(tmp_path / "constant.py", CONSTANT))
    assert ran.status == 1
    (problem,) = marked(ran, "Problem: ")
    assert "here it earns 0.5, a wrong call 0.5, no call 0.5; the tool returns the answer" in problem


def test_a_budget_without_room_for_a_call_fails_the_check(tmp_path):
    ran = checked(tmp_path, ROWS, max_grpo_completion_length=8)
    assert ran.status == 1
    (problem,) = marked(ran, "Problem: ")
    longest = re.search(r"completions of gold calls .* (\d+)\n", ran.out)[1]
    assert "rows.jsonl:1: 3 of 3 gold conversations exceed 8 tokens" in problem
    assert problem.endswith(f"raise max_grpo_completion_length to {longest}")


# What else is said


def test_several_rewards_are_weighted(tmp_path):
    """0.25 · 2 + 1 · 0.5 for a wrong call, 1 · 2 + 1 · 0.5 for the gold calls; None does not count."""
    body = "[1.0 if any(m['role'] == 'tool' for m in c) else None for c in completions]"
    calls = f"def reward_func(completions, **kwargs):\n    return {body}\n"
    files = [
        str(launch.write(tmp_path / name, text))
        for name, text in (("strict.py", REWARD), ("calls.py", calls))
    ]
    ran = checked(tmp_path, ROWS, reward_fn=files, reward_weights=[2.0, 0.5])
    assert ran.status == 0, ran.err
    assert cells(ran, "Mean rewards") == [
        ["strict", "0", "0.25", "1"],
        ["calls", "none", "1", "1"],
        ["weighted sum", "0", "1", "2.5"],
    ]


def test_a_wrong_call_is_one_that_the_tool_refuses_where_no_other_row_has_one(tmp_path):
    call = {"name": "stock", "arguments": {"item": "figs"}}
    out = checked(tmp_path, [{"prompt": "Figs left?", "answer": "Left: 4", "tool_call": call}]).out
    assert "assistant: stock(no_such_argument=0)\n    tool: Error: wrong arguments for stock: " in out


def test_a_gold_call_that_does_not_run_is_neither_counted_nor_taken_for_a_wrong_call(tmp_path):
    """Its error is longer than any answer, and is no result of the tool."""
    failing = price("figs", 5, tool_call={"name": "price", "arguments": {"number": 5}})
    ran = checked(tmp_path, [ROWS[0], failing, ROWS[2]])
    (tokens,) = [row for row in cells(ran, "Tokens") if "completions" in row[0]]
    assert tokens[:2] == ["completions of gold calls", "2"]
    wrong = figures(ran, "Sample conversations")[3:]
    assert wrong[:2] == ["assistant: price(item='pears', count=14)", "tool: Price: 42"]


def test_varying_system_messages_are_named(tmp_path):
    def of(name):
        system = {"role": "system", "content": f"You serve {name}. " + "Be brief. " * 40}
        return price("nuts", 2, prompt=[system, {"role": "user", "content": "Price of 2 nuts?"}])

    (hint,) = marked(checked(tmp_path, [of("Anna"), of("Anna"), of("Bernd")]), "Hint: ")
    assert "the preamble that prompts share, and that is computed once, is under half of a prompt" in hint
    assert re.search(
        r"between \S+rows.jsonl:1 \(\"You serve Anna\. .* and \S+rows.jsonl:3 \(\"You serve Be", hint
    )


def test_rows_without_gold_calls_are_counted(tmp_path):
    rows = [ROWS[0], {"prompt": "Hello?", "answer": "Price: 0"}, ROWS[1]]
    ran = checked(tmp_path, rows)
    assert ran.status == 0
    assert "1 of 3 rows have no gold call in column tool_call or ground_truth, first" in ran.out
    assert "rows.jsonl:2; for them it cannot be checked whether a call returns the answer" in ran.out
    assert "Gold calls of 2 rows: 2 ran" in ran.out


@pytest.mark.parametrize(
    ("reward", "earned", "hints"),
    [
        (REWARD, ["0", "0.25", "1"], 0),
        (CONSTANT, ["0.5", "0.5", "0.5"], 1),
    ],
)
def test_without_any_gold_call_the_reward_is_tried_on_a_made_up_one(tmp_path, reward, earned, hints):
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
    ran = checked(tmp_path, rows, reward_fn=launch.write(tmp_path / "mine.py", reward))
    assert ran.status == 0, ran.err
    assert "3 of 3 rows have no gold call" in ran.out
    assert "made-up call, answer as its result" in figures(ran, "Mean rewards")[0]
    assert cells(ran, "Mean rewards") == [["mine", *earned]]
    unchecked, *others = marked(ran, "Hint: ")
    assert "rows.jsonl:1: no row has a gold call" in unchecked
    assert len(others) == hints
    assert f"Check passed; hints: {1 + hints}" in ran.out


def test_answers_that_the_loaded_tools_can_never_return_are_said(tmp_path):
    """Another file's answers, without gold calls: the tools are called with made-up arguments."""
    rows = [{"prompt": "What?", "answer": f"Expected Return: {i}%, Risk: low"} for i in range(4)]
    ran = checked(tmp_path, rows)
    assert ran.status == 0, ran.err
    _, form = marked(ran, "Hint: ")
    assert (
        "rows.jsonl:1: 4 of 4 answers of rows without gold calls look like nothing that the tools return"
        in form
    )
    assert (
        '(2 of 2 tools could be called): here the answer is "Expected Return: 0%, Risk: low", price returns'
        in form
    )


def test_answers_of_the_original_under_the_default_tools_are_said(tmp_path):
    """The default tools refuse most made-up arguments; those that accept some are enough."""
    rows = [{"prompt": "What?", "answer": f"Expected Annual Return: {i}%, Volatility: 12%"} for i in range(4)]
    ran = checked(tmp_path, rows, tools_script=None, tool_functions_module=None)
    assert ran.status == 0, ran.err
    _, form = marked(ran, "Hint: ")
    assert re.search(r"4 of 4 answers of rows without .* \([2-8] of 8 tools could be called\)", form)


# What only a second call or batch shows

ONCE = """
import atexit
served = []

def price(item: str, count: int) -> str:
    \"\"\"The price of some items.

    Args:
        item: What is bought.
        count: How many.
    \"\"\"
    served.append(item)
    if len(served) > 3:
        raise RuntimeError("Event loop is closed")
    return f"Price: {3 * count}"

TOOL_FUNCTIONS = [price]
"""


def test_a_tool_that_fails_when_it_is_called_again_fails_the_check(tmp_path):
    """The three gold calls run, each once; a worker that serves more calls then fails."""
    ran = checked(tmp_path, ROWS, tools_script=launch.write(tmp_path / "once.py", ONCE))
    assert ran.status == 1
    (problem,) = marked(ran, "Problem: ")
    assert "Event loop is closed" in problem


def test_a_reward_that_fails_at_the_second_batch_stops_the_check(tmp_path):
    once = REWARD + (
        "inner = reward_func\ndef reward_func(trainer_state, **kwargs):\n"
        "    assert trainer_state['global_step'] == 0, 'too late'\n    return inner(**kwargs)\n"
    )
    with pytest.raises(RewardError, match=r"'once' .* AssertionError: too late"):
        checked(tmp_path, ROWS, reward_fn=launch.write(tmp_path / "once.py", once))


def test_a_reward_that_changes_from_batch_to_batch_is_said(tmp_path):
    text = REWARD.replace("0.25 for r, a", "0.1 * kwargs['trainer_state']['global_step'] for r, a")
    ran = checked(tmp_path, ROWS, reward_fn=launch.write(tmp_path / "changing.py", text))
    assert ran.status == 0, ran.err
    (hint,) = marked(ran, "Hint: ")
    assert (
        "rows.jsonl:1: the conversations of 3 of 3 rows earn something else when they are scored again"
        in hint
    )


def test_rows_that_the_cold_start_refuses_are_met(tmp_path):
    ran = checked(tmp_path, ROWS, cold_start=True)
    assert ran.status == 2
    assert "the cold start needs at least sft_validation_size 4 + sft_batch_size 8 rows, got 3" in ran.err


def test_evaluation_rows_without_figures_are_a_hint(tmp_path):
    errors = launch.write_rows(tmp_path / "eval.jsonl", [price("nuts", 2, answer="Error: none left")])
    (hint,) = marked(checked(tmp_path, ROWS, eval_dataset_id_or_path=errors), "Hint: ")
    assert "eval.jsonl:1: the answers of all 1 evaluation rows begin with 'Error:'" in hint


def test_an_output_dir_that_is_a_file_is_met(tmp_path):
    path = launch.write(tmp_path / "file", "mine")
    ran = checked(tmp_path, ROWS, "--output_dir", path)
    assert ran.status == 2
    assert f"{path} is a file; choose a folder for the results" in ran.err


def test_what_does_not_run_in_time_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SECONDS", 0.0)
    ran = checked(tmp_path, [price("nuts", i) for i in range(20)])
    assert "Checked is a random sample of 16 of 20 rows with gold calls" in ran.out
    assert "Gold calls of 16 rows: 16 ran" in ran.out
    assert "for 8 rows" in ran.out


# Bad input, as in training


def test_bad_evaluation_rows_are_met(tmp_path):
    path = launch.write(tmp_path / "eval.jsonl", '{"prompt": "What?"}\n')
    ran = checked(tmp_path, ROWS, eval_dataset_id_or_path=path)
    assert ran.status == 2
    assert f"{path}:1: has no column 'answer'" in ran.err
    unknown = price("nuts", 2, tool_call={"name": "sum", "arguments": {}})
    ran = checked(tmp_path, ROWS, eval_dataset_id_or_path=launch.write_rows(path, [unknown]))
    assert ran.status == 2
    assert f"{path}:1: column 'tool_call': unknown tool 'sum'" in ran.err


def test_fewer_rows_than_a_batch_are_met_after_the_hints(tmp_path):
    ran = checked(tmp_path, ROWS[:1])
    assert ran.status == 2
    assert "Check passed" in ran.out
    assert "one update needs 2 prompts (2 × 4 completions), but the data has 1 rows" in ran.err


def test_a_reward_that_fails_stops_it_with_the_row(tmp_path):
    broken = "def reward_func(completions, **kwargs):\n    return [1 / 0]\n"
    with pytest.raises(RewardError, match=r"'broken' .* raised on row 0 \(answer 'Price: 6'\): ZeroDivision"):
        checked(tmp_path, ROWS, reward_fn=launch.write(tmp_path / "broken.py", broken))


@pytest.mark.parametrize("main", [sft.main, evaluate.main])
def test_other_commands_refuse_it(tmp_path, main):
    ran = launch.call(main, [*launch.options(tmp_path / "run"), "--check"], tmp_path / "run")
    assert ran.status == 2
    assert "check is an option of grpo_jax.train" in ran.err


def test_what_the_update_would_refuse_is_met_after_the_hints(tmp_path):
    ran = checked(tmp_path, ROWS, micro_batches=7)
    assert (ran.status, ran.compiles) == (2, 0)
    assert "Check passed" in ran.out and "micro_batches 7 cannot split" in ran.err


FINAL = """
from typing import final

def add(a: int, b: int) -> str:
    \"\"\"Add.\"\"\"
    return str(a + b)

@final
def submit(result: int) -> str:
    \"\"\"The answer.\"\"\"
    return "done"

TOOL_FUNCTIONS = [add, submit]
"""


@pytest.mark.parametrize("gold", [False, True])
def test_a_final_tool_that_takes_no_text_takes_no_error_either(tmp_path, gold):
    """What a wrong call returns is text; with gold calls, one row's call fails and is left out."""
    rows = [{"prompt": f"{n} and 1?", "answer": str(n + 1)} for n in range(4)]
    for n, row in enumerate(rows if gold else []):
        row["tool_call"] = {"name": "add", "arguments": {"a": n, "b": 1} if n else {"a": n}}
    ran = checked(tmp_path, rows, tools_script=launch.write(tmp_path / "final.py", FINAL))
    assert "does not take the answer" not in ran.err and "Sample conversations" in ran.out
