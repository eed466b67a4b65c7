"""Intervals: published values, and the ends that the formulas do not cover."""

import numpy as np
import pytest

from grpo_jax.scoring.intervals import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # 81 of 263: Newcombe 1998, table I, method 3; none or all: the formula gives z² / (n + z²)
        (81, 263, 0.2553, 0.3662),
        (0, 10, 0.0, 3.8415 / 13.8415),
        (10, 10, 10 / 13.8415, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_interval_is_about_two_standard_errors_and_repeats():
    values = np.random.default_rng(0).normal(0.5, 0.2, 400)
    low, high = bootstrap_interval(values, seed=1)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval(values, seed=2) != (low, high)


def test_bootstrap_interval_of_equal_values_is_a_point():
    assert bootstrap_interval([0.7] * 5, seed=0) == pytest.approx((0.7, 0.7))


def test_the_interval_of_one_value_is_that_value():
    assert bootstrap_interval([0.25], seed=0) == (0.25, 0.25)


def test_the_bootstrap_is_that_of_resampled_means():
    """Worked independently: the same generator's draws, averaged one resample at a time."""
    values, rng = np.array([0.0, 0.3, 1.0, 1.0, 0.3]), np.random.default_rng(3)
    means = [values[rng.integers(5, size=5)].mean() for _ in range(1000)]
    assert bootstrap_interval(values, seed=3) == pytest.approx(
        tuple(np.percentile(means, [2.5, 97.5])), abs=1e-12
    )
