"""The three figures, worked by hand, and the command on a model folder and on a checkpoint."""

import dataclasses
import itertools

import launch
import pytest
from helpers import prompt

from grpo_jax import evaluate, export
from grpo_jax.run.config import parse_config
from grpo_jax.scoring.evaluation import (
    call_match,
    equal_values,
    pass_at_k,
    schema_match,
    summarize,
    summarize_samples,
)
from grpo_jax.types import Example, Outcome, Status, ToolCall, ToolResult, Trajectory


def call(name, **arguments):
    return ToolCall(name, arguments)


def trajectory(*calls, says="", status=Status.ANSWERED):
    """A conversation of (call, result text) pairs; a text that begins with Error: is an error's."""
    done = [
        (one, ToolResult(text, Outcome.ERROR if text.startswith("Error:") else Outcome.OK, 0.0))
        for one, text in calls
    ]
    messages = [{"role": "tool", "name": one.name, "content": text} for one, text in calls]
    messages.append({"role": "assistant", "content": says})
    return Trajectory(prompt([1]), [2], [True], [0.0], messages, done, status)


ADD = call("add", a=1, b=2)


# Equality of values


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (0.333, 0.3333),
        (1_000_000.001, 1_000_000),
        ("x", "x"),
        (None, None),
        (True, True),
        ([1, {"k": 2.0}], [1.0, {"k": 2}]),
        ({"a": 1, "b": None}, {"a": 1}),
        ({"a": 1}, {"a": 1, "b": None}),
        ({"a": {"b": None}}, {"a": {}}),
    ],
)
def test_equal_values(a, b):
    assert equal_values(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.02),
        (1, True),
        (0, False),
        (0, None),
        ("1", 1),
        ("x", "X"),
        ([1, 2], [2, 1]),
        ([1], [1, None]),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {}),
        ({}, []),
    ],
)
def test_unequal_values(a, b):
    assert not equal_values(a, b)


# Calls


@pytest.mark.parametrize(
    ("made", "gold", "expected"),
    [
        (call("add", a=1, b=2), ADD, 1.0),
        (call("add", a=1, b=3), ADD, 0.65),  # 0.3 + 0.7 · 1/2
        (call("add", a=1), ADD, 0.65),
        (call("add", a=1, b=2, c=3), ADD, 1.0),  # the share is of the gold arguments
        (call("add"), ADD, 0.3),
        (call("multiply", a=1, b=2), ADD, 0.0),
        (call("now"), call("now"), 1.0),
        (call("f", x=None), call("f", x=None, y=2), 0.65),
        (call("f"), call("f", x=None), 1.0),
    ],
)
def test_call_match_is_the_name_and_the_share_of_gold_arguments(made, gold, expected):
    assert call_match(made, gold) == pytest.approx(expected)


def test_each_gold_call_takes_the_best_call_that_is_left():
    two = [call("add", a=1, b=2), call("add", a=3, b=4)]
    assert schema_match(two, two) == 1.0
    assert schema_match(two[::-1], two) == 1.0
    assert schema_match(two[:1], two) == pytest.approx(0.5)
    assert schema_match([call("add", a=1, b=9), *two], two[:1]) == 1.0
    assert schema_match([], two) == 0.0
    # one call cannot stand for two equal gold calls
    assert schema_match([ADD], [ADD, ADD]) == pytest.approx(0.5)


# Figures


def summarized(answers, trajectories, gold):
    """The figures of trajectories whose examples have these answers."""
    examples = [Example([{"role": "user", "content": "?"}], a, source="rows.jsonl:1") for a in answers]
    of = [
        dataclasses.replace(t, prompt=dataclasses.replace(t.prompt, example=e))
        for t, e in zip(trajectories, examples, strict=True)
    ]
    return summarize(of, gold)


def test_the_figures_of_four_rows():
    trajectories = [
        trajectory((ADD, "Sum: 3")),  # right
        trajectory((call("add", a=1, b=5), "Sum: 6")),  # valid, wrong
        trajectory((call("sub", a=1, b=2), "Error: unknown tool")),  # no valid call
        trajectory(),  # no call at all
    ]
    summary = summarized(["Sum: 3"] * 4, trajectories, [[ADD]] * 4)
    assert summary["n"] == 4
    assert summary["response_validity"] == 0.5
    assert summary["exact_answer_match"] == 0.25
    assert summary["tool_call_schema_match"] == pytest.approx((1 + 0.65) / 4)
    # Wilson at z = 1.96 for 1 of 4: (1/4 + z²/8 ∓ z·√(3/64 + z²/64)) / (1 + z²/4)
    assert summary["intervals"]["exact_answer_match"] == pytest.approx((0.04559, 0.69936), abs=1e-5)
    low, high = summary["intervals"]["tool_call_schema_match"]
    assert 0 <= low < summary["tool_call_schema_match"] < high <= 1
    assert summary["error_answers"] == {"n": 0, "exact_answer_match": None}


def test_only_the_last_result_is_the_answer_and_blanks_and_case_do_not_matter():
    trajectories = [
        trajectory((ADD, "Sum: 9"), (ADD, " sum:  3 ")),
        trajectory((ADD, "Sum: 3"), (ADD, "Sum: 9")),
        trajectory((ADD, "Error: no"), (ADD, "Sum: 3")),  # a later valid call makes a row valid
    ]
    summary = summarized(["Sum: 3"] * 3, trajectories, [[]] * 3)
    assert summary["exact_answer_match"] == pytest.approx(2 / 3)
    assert summary["response_validity"] == 1.0


def test_rows_whose_gold_answer_is_an_error_are_counted_separately():
    wrong = (call("add", a=1), "Error: b is missing")
    answers = ["Sum: 3", "Error: b is missing", "Error: b is missing"]
    trajectories = [trajectory((ADD, "Sum: 3")), trajectory(wrong), trajectory((ADD, "Sum: 3"))]
    summary = summarized(answers, trajectories, [[ADD]] * 3)
    assert summary["n"] == 1
    assert summary["response_validity"] == summary["exact_answer_match"] == 1.0
    assert summary["tool_call_schema_match"] == 1.0
    assert summary["error_answers"] == {"n": 2, "exact_answer_match": 0.5}


def test_turns_that_were_closed_and_answers_that_state_the_result():
    three = (ADD, "Sum: 3")
    trajectories = [
        trajectory(three, says="It is 3."),
        trajectory(three, says="It is 4."),
        trajectory(three, says="It is 3. So", status=Status.OVERLONG),
        trajectory((ADD, "Error: 7"), says="7", status=Status.TOOL_ERROR),
        trajectory(says="It is 3."),  # no tool has said so
        trajectory(three, says="3", status=Status.TOOL_LIMIT),
    ]
    summary = summarized(["Sum: 3"] * 6, trajectories, [[]] * 6)
    assert summary["turn_closed"] == summary["answer_grounded"] == pytest.approx(4 / 6)
    # Wilson at z = 1.96 for 4 of 6
    assert summary["intervals"]["turn_closed"] == pytest.approx((0.29999, 0.90323), abs=1e-5)
    done = summarized(["Sum: 3"], [trajectory(three, status=Status.TOOLS_DONE)], [[]])
    assert done["exact_answer_match"] == 1.0 and done["turn_closed"] is done["answer_grounded"] is None
    assert summarized(["Error: x"], trajectories[:1], [[]])["answer_grounded"] is None


def test_rows_without_gold_calls_have_no_schema_figure():
    summary = summarized(["Sum: 3"], [trajectory((ADD, "Sum: 3"))], [[]])
    assert summary["tool_call_schema_match"] is summary["intervals"]["tool_call_schema_match"] is None
    assert summary["exact_answer_match"] == 1.0


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(4, 1, 2, 1 / 2), (4, 2, 2, 5 / 6), (5, 2, 3, 9 / 10), (8, 0, 8, 0), (8, 1, 8, 1), (8, 3, 1, 3 / 8)],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    """1 − C(n − c, k) / C(n, k): 1 − 3/6, 1 − 1/6, 1 − 1/10; the plain 1 − (1 − c/n)^k would give 0.44 and 0.75."""
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_sample():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n >= k:
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_the_figures_of_samples_by_hand():
    """0, 1 and 4 right ones of four; a row whose answer is an error is left out."""
    right, wrong, error = trajectory((ADD, "Sum: 3")), trajectory((ADD, "Sum: 9")), "Error: no"
    samples = [*[wrong] * 4, wrong, right, wrong, trajectory(), *[right] * 4, *[wrong] * 4]
    answers = ["Sum: 3"] * 12 + [error] * 4
    samples = [
        dataclasses.replace(t, prompt=dataclasses.replace(t.prompt, example=Example([], answer)))
        for t, answer in zip(samples, answers, strict=True)
    ]
    found = summarize_samples(samples, 4)
    intervals = found.pop("intervals")
    assert found == pytest.approx({"mean@4": 5 / 12, "pass@2": (0 + 1 / 2 + 1) / 3, "pass@4": 2 / 3})
    assert intervals.keys() == found.keys()
    assert all(low <= found[name] <= high for name, (low, high) in intervals.items())
    assert [*summarize_samples(samples[:6] * 2, 6)] == ["mean@6", "pass@2", "pass@4", "pass@6", "intervals"]
    assert summarize_samples(samples[12:], 4)["pass@4"] is None


# The command


def run_evaluate(model, out) -> launch.Ran:
    changes = {"model_name_or_path": model, "eval_dataset_id_or_path": launch.evaluation_rows()}
    return launch.call(evaluate.main, launch.options(out, **changes), out)


def test_a_model_folder_and_its_checkpoint_have_the_same_figures(tmp_path):
    run = launch.whole().folder
    folder = run_evaluate(run / "model", tmp_path / "a")
    step = run_evaluate(run / "checkpoints" / "4", tmp_path / "b")
    assert folder.status == step.status == 0
    assert len(folder.samples()) == 3
    assert folder.samples() == step.samples()
    of_folder, of_step = (ran.json("evaluation.json") for ran in (folder, step))
    assert (of_folder["model"], of_step["model"]) == (str(run / "model"), str(run / "checkpoints/4"))
    for figures in (of_folder, of_step):
        del figures["model"], figures["timings"]
    assert of_folder == of_step
    assert of_folder["n"] == 6  # of which the second batch of four held two
    of_rows = folder.jsonl("evaluation/evaluate.jsonl")
    assert of_rows == step.jsonl("evaluation/evaluate.jsonl")
    assert [row["prompt"] for row in of_rows] == [row["prompt"] for row in launch.rows(60, 6)]
    assert sum(row["turn_closed"] for row in of_rows) / 6 == pytest.approx(of_folder["turn_closed"])


def test_samples_stand_beside_the_greedy_figures(tmp_path):
    run = launch.whole().folder
    changes = {"model_name_or_path": run / "model", "eval_dataset_id_or_path": launch.evaluation_rows()}
    ran = launch.call(
        evaluate.main, launch.options(tmp_path / "a", **changes, eval_samples=3), tmp_path / "a"
    )
    assert ran.status == 0, ran.err
    figures = ran.json("evaluation.json")
    greedy = run_evaluate(run / "model", tmp_path / "b").json("evaluation.json")
    assert [figures[name] for name in ("mean@3", "pass@2", "pass@3")] == [0, 0, 0]
    assert figures.keys() - greedy.keys() == {"mean@3", "pass@2", "pass@3"}
    assert all(figures[name] == greedy[name] for name in ("n", "exact_answer_match", "response_validity"))
    assert all(name in ran.out for name in ("mean@3", "pass@2", "pass@3"))
    rows = ran.jsonl("evaluation/evaluate.jsonl")
    drawn = ran.jsonl("evaluation/evaluate_samples.jsonl")
    assert [row["prompt"] for row in drawn] == [row["prompt"] for row in rows for _ in range(3)]
    assert any(a["messages"] != b["messages"] for a, b in itertools.pairwise(drawn))
    assert drawn[0].keys() == rows[0].keys()


def test_another_step_is_another_model(tmp_path):
    run = launch.whole().folder
    exported = tmp_path / "step_1"
    launch.call(export.main, ["--checkpoint", 1, "--output_dir", run, "--to", exported], run)
    step = run_evaluate(run / "checkpoints" / "1", tmp_path / "a")
    assert step.samples() == run_evaluate(exported, tmp_path / "b").samples()
    assert step.samples() != run_evaluate(run / "model", tmp_path / "c").samples()


def test_a_model_must_be_named(tmp_path):
    ran = run_evaluate(None, tmp_path)
    assert ran.status == 2
    assert "model_name_or_path must be set" in ran.err


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        ((), "test.jsonl"),
        (("--dataset_id_or_path", "mine.jsonl"), "mine.jsonl"),
        (("--dataset_id_or_path", "mine.jsonl", "--eval_dataset_id_or_path", "other.jsonl"), "other.jsonl"),
        (("--eval_dataset_id_or_path", "none"), "train.jsonl"),
    ],
)
def test_a_flag_names_other_rows_than_the_file(tmp_path, flags, data):
    config = tmp_path / "run.yaml"
    config.write_text("dataset_id_or_path: train.jsonl\neval_dataset_id_or_path: test.jsonl\n")
    assert evaluate._rows_of(parse_config(["--config", str(config), *flags], prog="test")) == data
