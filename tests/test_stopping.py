"""Runs whose evaluations are compared: the best one is kept, ends the run and becomes its model."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import launch
import pytest

from grpo_jax import export as export_command
from grpo_jax.run.stopping import Best, StopSignal
from grpo_jax.scoring.evaluation import FIGURES
from grpo_jax.trainer import GRPOTrainer

# Scripted exact_answer_match of the evaluations after 1, 2, … updates; that at 2 is the best.
MATCH = {0: 0.9, 1: 0.2, 2: 0.5, 3: 0.5, 4: 0.4, 5: 0.3, 6: 0.6}


def test_the_best_and_how_long_it_has_been_the_best():
    best, seen = Best("f"), []
    for step, value in ((3, 0.2), (6, 0.5), (9, 0.5), (12, 0.4), (15, 0.6)):
        best = best.after(step, value)
        seen.append((best.step, best.value, best.waited, best.ends(2)))
    assert seen == [
        (3, 0.2, 0, False),
        (6, 0.5, 0, False),
        (6, 0.5, 1, False),
        (6, 0.5, 2, True),
        (15, 0.6, 0, False),
    ]
    assert not Best("f", 6, 0.5, 100).ends(None)


def test_a_resumed_run_knows_the_best_unless_it_is_of_another_figure_or_folder():
    saved = dataclasses.asdict(Best("f", 6, 0.5, 1))
    assert Best.resumed(saved, "f", [6, 8]) == Best("f", 6, 0.5, 1)
    assert Best.resumed(saved, "g", [6, 8]) == Best("g")
    assert Best.resumed(saved, "f", [8]) == Best.resumed(None, "f", []) == Best("f")


def scripted(folder, **changes):
    """A run that evaluates after every update and keeps one newest checkpoint, with the figures of MATCH."""

    def evaluated(self, title, name, stop=None):
        at = 0 if self._current is None else int(self._current[1].step)
        return {
            "exact_answer_match": MATCH[at],
            "n": 6,
            "response_validity": None,
            "tool_call_schema_match": None,
            "turn_closed": None,
            "answer_grounded": None,
        } | {
            "intervals": dict.fromkeys(FIGURES),
            "error_answers": {"n": 0},
        }

    given = {
        "eval_dataset_id_or_path": launch.evaluation_rows(),
        "eval_steps": 1,
        "early_stop_patience": 2,
        "load_best_model_at_end": True,
        "save_steps": 100,
        "save_total_limit": 1,
        "max_steps": 6,
    }
    with mock.patch.object(GRPOTrainer, "_evaluated", evaluated):
        ran = launch.small_run(folder, **given | changes)
    assert ran.status == 0, ran.err
    return ran


def kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_a_run_ends_when_it_gets_no_better_with_the_weights_of_its_best_evaluation(tmp_path):
    """The last save is that of update 4; update 2 would be pruned if it were not the best."""
    folder = tmp_path / "run"
    scripted(
        folder, max_steps=3, early_stop_patience=None
    )  # interrupted, in effect, one evaluation after the best
    assert kept(folder) == [2, 3]
    ran = scripted(folder)
    assert "Continuing from the checkpoint of update 3" in ran.out
    assert (
        "Stopping early: in 2 evaluations exact_answer_match was not above 0.500, that at update 2" in ran.out
    )
    assert "The model is that of update 2: exact_answer_match 0.500 is the best" in ran.out
    assert [line["eval/exact_answer_match"] for line in ran.jsonl("metrics.jsonl")] == [0.2, 0.5, 0.5, 0.4]
    assert kept(folder) == [2, 4]
    summary = ran.json("summary.json")
    assert (summary["updates"], summary["stopped_early"]) == (4, 2)
    export = ["--checkpoint", 2, "--output_dir", launch.whole().folder, "--to", tmp_path / "two"]
    launch.call(export_command.main, export, tmp_path)
    assert ran.weights() == (tmp_path / "two/model.safetensors").read_bytes()
    # the same command has nothing to do; one that waits for longer goes on, and finds a better one
    again = scripted(folder)
    assert (
        "finished after 4 updates" in again.out and "A higher --early_stop_patience continues it" in again.out
    )
    longer = scripted(folder, early_stop_patience=4)
    assert "Finished: 6 updates" in longer.out and "Stopping early" not in longer.out
    assert kept(folder) == [6]
    assert "stopped_early" not in longer.json("summary.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"early_stop_patience": 2},
            "early_stop_patience needs evaluations during training; set eval_steps or",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "no"},
            "load_best_model_at_end needs evaluations during",
        ),
        ({"early_stop_patience": 2, "eval_steps": 1}, "compare evaluations; set eval_dataset_id_or_path"),
        (
            {"eval_strategy": "steps"},
            "eval_strategy steps needs evaluation data; set eval_dataset_id_or_path",
        ),
        ({"early_stop_metric": "exact_match"}, "nearest: exact_answer_match"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_compiles(tmp_path, changes, message):
    ran = launch.small_run(tmp_path / "run", **changes)
    assert (ran.status, ran.compiles) == (2, 0)
    assert message in ran.err


def test_rows_without_the_compared_figure_are_named(tmp_path):
    rows = [{k: row[k] for k in ("prompt", "answer")} for row in launch.rows(60, 3)]
    path = launch.write_rows(tmp_path / "test.jsonl", rows)
    compared = {"early_stop_patience": 2, "eval_steps": 1, "early_stop_metric": "tool_call_schema_match"}
    ran = launch.small_run(tmp_path / "run", eval_dataset_id_or_path=path, **compared)
    assert (ran.status, ran.compiles) == (2, 0)
    assert f"{path}:1: none of the 3 evaluation rows has a tool_call_schema_match" in ran.err


def test_outside_of_the_main_thread_no_signal_is_handled():
    """As in a web application, which trains in a thread of its own."""

    def entered():
        with StopSignal() as stop:
            return stop.requested

    with ThreadPoolExecutor() as pool:
        assert pool.submit(entered).result() is False
