"""Advantages: values worked by hand, and the properties that NaN rows must keep."""

import numpy as np
import pytest

from grpo_jax.scoring.advantages import (
    batch_advantages,
    combine_rewards,
    decoupled_advantages,
    group_advantages,
    group_std,
)

NAN = float("nan")


def test_rewards_are_summed_by_weight_over_the_functions_that_apply():
    values = [[1.0, 0.5], [NAN, 0.5], [1.0, NAN], [NAN, NAN]]
    np.testing.assert_array_equal(combine_rewards(values, [2.0, 10.0]), [7.0, 5.0, 2.0, NAN])


def test_one_weight_per_reward_function():
    with pytest.raises(ValueError, match=r"reward_weights .* 2 functions, got weights \[1.0\]"):
        combine_rewards([[1.0, 0.5]], [1.0])


def test_a_function_of_weight_zero_makes_no_row_count():
    values = [[1.0, 0.0], [NAN, 0.5], [0.5, NAN]]
    np.testing.assert_array_equal(combine_rewards(values, [1.0, 0.0]), [1.0, NAN, 0.5])


# Group (1, 0, 0, 1): mean 0.5, squares sum to 1, Bessel's std sqrt(1/3) = 0.5773503.
# Group (0, 2, 4, 6): mean 3, squares sum to 20, std sqrt(20/3) = 2.5819889.
# All eight: mean 1.75, squares sum to 58 - 8 * 3.0625 = 33.5, std sqrt(33.5/7) = 2.1876275.
@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [0.5, -0.5, -0.5, 0.5, -3, -1, 1, 3]),
        (
            "group",
            [0.8658755, -0.8658755, -0.8658755, 0.8658755, -1.1618500, -0.3872833, 0.3872833, 1.1618500],
        ),
        (
            "batch",
            [0.2285477, -0.2285477, -0.2285477, 0.2285477, -1.3712859, -0.4570953, 0.4570953, 1.3712859],
        ),
    ],
)
def test_advantages_by_hand(scale, expected):
    rewards = [1, 0, 0, 1, 0, 2, 4, 6]
    np.testing.assert_allclose(group_advantages(rewards, 4, scale), expected, rtol=3e-7)


def test_a_row_without_a_reward_is_out_of_the_baseline_and_has_zero_advantage():
    # Left: (1, 0): mean 0.5, std sqrt(0.5) = 0.7071068. A NaN taken as 0 would give mean 1/3.
    np.testing.assert_allclose(
        group_advantages([1, NAN, 0], 3, "group"), [0.7070068, 0.0, -0.7070068], rtol=2e-7
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_nothing_to_compare_with_gives_advantage_zero(scale):
    """One valid row, none at all, and equal rewards; none of them warns or divides by zero."""
    with np.errstate(all="raise"):
        for rewards in ([NAN, 3.0, NAN], [NAN, NAN, NAN], [0.1, 0.1, 0.1]):
            assert group_advantages(rewards, 3, scale).tolist() == [0.0, 0.0, 0.0]


def test_std_of_each_group():
    """Equal rewards give exactly 0: the plain mean of three times 0.1 is off by 1e-17."""
    rewards = [1, 0, 0, 0.1, 0.1, 0.1, NAN, 1, 3, NAN, NAN, 5]
    np.testing.assert_allclose(group_std(rewards, 3), [0.57735027, 0.0, 1.41421356, 0.0], rtol=1e-8)
    assert group_std(rewards, 3)[1] == 0.0


def test_advantages_equal_an_independent_float64_version():
    rewards = np.random.default_rng(0).normal(size=(5, 8))
    expected = [(row - row.mean()) / (row.std(ddof=1) + 1e-4) for row in rewards]
    np.testing.assert_allclose(
        group_advantages(rewards.reshape(-1), 8, "group"), np.ravel(expected), rtol=1e-12
    )


# Group (1, 0, 0, 1): the others' means are 1/3, 2/3, 2/3, 1/3. A row without a reward is no other.
@pytest.mark.parametrize(
    ("estimator", "rewards", "expected"),
    [
        ("loo", [1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ("loo", [1, NAN, 0, NAN], [1, 0, -1, 0]),
        ("loo", [NAN, 3, NAN, NAN], [0, 0, 0, 0]),
        ("loo", [0.1, 0.1, 0.1, 0.1], [0, 0, 0, 0]),
        ("none", [1, 0, 0, 1], [1, 0, 0, 1]),
        ("none", [NAN, 3, NAN, NAN], [0, 3, 0, 0]),
    ],
)
def test_baselines_by_hand(estimator, rewards, expected):
    got = batch_advantages(np.c_[rewards], [1.0], 4, scale="none", estimator=estimator)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert (got[np.isclose(expected, 0)] == 0).all()


def test_leave_one_out_equals_its_definition_on_1000_groups():
    rewards = np.random.default_rng(2).normal(size=(1000, 5))
    others = [[np.delete(row, i).mean() for i in range(5)] for row in rewards]
    got = group_advantages(rewards.reshape(-1), 5, "none", "loo").reshape(1000, 5)
    np.testing.assert_allclose(got, rewards - others, rtol=1e-9, atol=1e-12)


# Group 1: function 1 gives (1, 0), which ranks (0.7070068, -0.7070068) as above, function 2 (0, 100), the same with
# the other sign except for 1e-4 / 70.71: -+0.7071058; weights 2 and 1. Group 2: function 1 equal, function
# 2 once only.
def test_gdpo_by_hand():
    values = [[1, 0], [0, 100], [5, 7], [5, NAN]]
    total = 2 * 0.7070068 - 0.7071058  # 0.7069078; squares sum to 2 * 0.4997186, std sqrt(0.9994373 / 3)
    expected = [total / (0.5771878 + 1e-4), -total / (0.5771878 + 1e-4), 0, 0]
    np.testing.assert_allclose(decoupled_advantages(values, [2.0, 1.0], 2), expected, rtol=1e-6)


def test_gdpo_leaves_rows_without_any_reward_out_and_gives_equal_rewards_exactly_0():
    values = [[1, NAN], [0, NAN], [NAN, NAN], [0.1, 3], [0.1, 3], [0.1, 3]]
    got = decoupled_advantages(values, [1.0, 1.0], 3)
    # five rows of (0.7070068, -0.7070068, 0, 0, 0): std sqrt(2 * 0.4998586 / 4) = 0.4999293
    np.testing.assert_allclose(got, [1.4139307, -1.4139307, 0, 0, 0, 0], rtol=1e-6)
    assert (got[2:] == 0).all()
    assert (decoupled_advantages([[NAN], [NAN]], [1.0], 2) == 0).all()
    assert (decoupled_advantages([[NAN], [3]], [1.0], 2) == 0).all()


def test_gdpo_equals_an_independent_version_on_1000_batches():
    """TRL's formula with loops; a value in five is missing."""
    rng = np.random.default_rng(3)
    for _ in range(1000):
        values = np.where(rng.random((6, 2)) < 0.2, NAN, rng.normal(size=(6, 2)))
        weights, sums = [0.7, 2.0], np.zeros(6)
        for k in range(2):
            for start in (0, 3):
                column = values[start : start + 3, k]
                there = column[~np.isnan(column)]
                if len(there) > 1:
                    z = (column - there.mean()) / (there.std(ddof=1) + 1e-4)
                    sums[start : start + 3] += weights[k] * np.nan_to_num(z)
        sums[np.isnan(values).all(1)] = NAN
        there = sums[~np.isnan(sums)]
        want = np.nan_to_num((sums - there.mean()) / (there.std(ddof=1) + 1e-4))
        got = batch_advantages(values, weights, 3, aggregation="normalize_then_sum")
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_bad_group_sizes_are_refused():
    with pytest.raises(ValueError, match="groups of 4, got 6"):
        group_advantages(np.zeros(6), 4, "group")
