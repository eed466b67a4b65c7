"""Advantages: values worked by hand, and the properties that NaN rows must keep."""

import numpy as np
import pytest

from grpo_jax.scoring.advantages import combine_rewards, group_advantages, group_std

NAN = float("nan")


def test_rewards_are_summed_by_weight_over_the_functions_that_apply():
    values = [[1.0, 0.5], [NAN, 0.5], [1.0, NAN], [NAN, NAN]]
    np.testing.assert_array_equal(combine_rewards(values, [2.0, 10.0]), [7.0, 5.0, 2.0, NAN])


def test_one_weight_per_reward_function():
    with pytest.raises(ValueError, match=r"reward_weights .* 2 functions, got weights \[1.0\]"):
        combine_rewards([[1.0, 0.5]], [1.0])


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


def test_bad_scale_and_bad_group_size_are_refused():
    with pytest.raises(ValueError, match="scale_rewards must be group, batch or none, got 'True'"):
        group_advantages([1.0, 2.0], 2, "True")
    with pytest.raises(ValueError, match="groups of 4, got 6"):
        group_advantages(np.zeros(6), 4, "group")
