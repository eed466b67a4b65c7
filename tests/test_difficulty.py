"""Prompts drawn by their solve rate: the weights, the draws, and a run that resumes with them."""

import json

import launch
import numpy as np

from grpo_jax.data.difficulty import SolveRates
from grpo_jax.run.options import GRPOConfig

KNOWN = SolveRates(np.array([0.0, 0.125, 0.5, 0.75, 1.0, np.nan]))


def test_weights_by_hand():
    assert KNOWN.weights(0.1).tolist() == [0.1, 0.25, 1.0, 0.5, 0.1, 1.0]
    assert KNOWN.weights(0.3).tolist() == [0.3, 0.3, 1.0, 0.5, 0.3, 1.0]


def test_a_group_sets_the_rate_of_its_row_and_json_keeps_it():
    rates = KNOWN.after([5, 0], [True, False, False, False, True, True, True, True])
    assert rates.rates.tolist() == [1.0, 0.125, 0.5, 0.75, 1.0, 0.25]
    stored = json.loads(json.dumps(KNOWN.to_json()))
    assert len(stored) == 5
    assert np.array_equal(SolveRates.from_json(6, stored).rates, KNOWN.rates, equal_nan=True)


def test_each_next_row_is_drawn_in_proportion_to_its_weight():
    """8,000 draws of two rows: the first by the weights, the second by those of the rows that are left."""
    pairs = [[row for row, _ in KNOWN.draw([(0, i), (0, i + 1)], 7, 0.1)] for i in range(8000)]
    weights = np.array([0.1, 0.25, 1.0, 0.5, 0.1, 1.0]) / 2.95
    first, second = np.transpose(pairs)
    share = np.bincount(first, minlength=6) / len(pairs)
    error = np.sqrt(weights * (1 - weights) / len(pairs))
    assert (np.abs(share - weights) < 4 * error).all()
    assert (first != second).all()
    given = sum(w * np.where(np.arange(6) == i, 0, weights) / (1 - w) for i, w in enumerate(weights))
    assert (np.abs(np.bincount(second, minlength=6) / len(pairs) - given) < 4 * 0.5 / len(pairs) ** 0.5).all()


def test_draws_depend_on_seed_and_draw_index_and_keep_it():
    """The literals hold a resume together."""
    draws = [(3, 40), (1, 41), (0, 42)]
    assert [draw for _, draw in KNOWN.draw(draws, 0, 0.1)] == [40, 41, 42]
    rows = [
        [row for row, _ in KNOWN.draw(d, seed, 0.1)] for d, seed in ((draws, 0), (draws, 1), (draws[1:], 0))
    ]
    assert rows == [[0, 5, 2], [2, 1, 0], [2, 1]]


def run(folder, **changes):
    """Random completions solve nothing, so that a prompt that was drawn has the floor's weight from then on."""
    return launch.small_run(folder, **{"difficulty_sampling": True, "difficulty_floor": 0.001} | changes)


def prompts(ran, steps):
    return [row["prompt"] for step in steps for row in ran.jsonl(f"rollouts/step_{step:06d}.jsonl")[::4]]


def test_a_run_draws_what_it_has_not_failed_and_resumes_with_the_rates(tmp_path):
    """12 updates of two prompts are all 24 rows once; without the rates the second half would repeat some."""
    first = run(tmp_path / "run", max_steps=6, save_steps=100)
    assert first.status == 0, first.err
    meta = json.loads(next((tmp_path / "run/checkpoints/6/meta").iterdir()).read_text())
    assert list(meta["solve_rates"].values()) == [0.0] * 12
    again = run(tmp_path / "run", max_steps=12, save_steps=100)
    assert "Continuing from the checkpoint of update 6" in again.out
    assert len(set(prompts(again, range(1, 13)))) == 24
    other = run(tmp_path / "run", max_steps=13, dataset_id_or_path=launch.evaluation_rows())
    assert other.status == 2
    assert "the training data: 24 rows then, 6 rows now" in other.err


def test_a_floor_without_the_option_is_named(caplog):
    GRPOConfig(difficulty_floor=0.2)
    assert "difficulty_floor has no effect without difficulty_sampling" in caplog.text
