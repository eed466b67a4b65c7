"""Penalties on length, credit for turns and calls: values worked by hand, and independent versions."""

import math
import statistics

import numpy as np
import pytest

from grpo_jax.scoring.credit import Credit, soft_overlong, turn_advantages
from grpo_jax.types import Example, Fault, Prompt, Trajectory

NAN = float("nan")


def test_the_overlong_penalty_grows_linearly_in_the_cache():
    """Of 100 tokens with a cache of 20: 0 up to 80, then (80 - length) / 20; a budget's end is -1 at any length."""
    lengths, truncated = [10, 80, 81, 90, 100, 100, 30], [False] * 5 + [True] * 2
    got = soft_overlong(lengths, truncated, 100, 20)
    np.testing.assert_allclose(got, [0, 0, -0.05, -0.5, -1, -1, -1], rtol=1e-12)


@pytest.mark.torch
def test_the_overlong_penalty_equals_trls():
    """Both on 1,000 lengths, none of which a budget ended."""
    pytest.importorskip("trl")
    from trl.rewards import get_soft_overlong_punishment

    rng = np.random.default_rng(0)
    for maximum, cache in ((256, 64), (512, 512), (100, 1)):
        lengths = rng.integers(1, maximum + 1, 1000)
        want = get_soft_overlong_punishment(maximum, cache)([[0] * n for n in lengths])
        np.testing.assert_allclose(soft_overlong(lengths, lengths < 0, maximum, cache), want, rtol=1e-6)


# Turns 1, 0 and 0.5 of a group: mean 0.5, Bessel's deviation sqrt((0.25 + 0.25) / 2) = 0.5.
# Turns 3 and 1 of the other (one has no reward): mean 2, deviation sqrt(2) = 1.4142136.
# All five: mean 1.1, squares sum to 11.25 - 5 * 1.21 = 5.2, deviation sqrt(5.2 / 4) = 1.1401754.
@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [[0.5, -0.5], [0.0], [1.0, 0.0], [-1.0]]),
        ("group", [[0.9998, -0.9998], [0.0], [0.7070568, 0.0], [-0.7070568]]),
        ("batch", [[0.4384905, -0.4384905], [0.0], [0.8769811, 0.0], [-0.8769811]]),
    ],
)
def test_a_turn_is_compared_with_all_turns_of_its_group(scale, expected):
    got = turn_advantages([[1.0, 0.0], [0.5], [3.0, NAN], [1.0]], 2, scale)
    for row, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(row, want, rtol=1e-6, atol=1e-12)


def test_turns_of_one_value_and_the_only_turn_have_no_advantage():
    assert turn_advantages([[0.1, 0.1], [0.1]], 2, "group") == [[0.0, 0.0], [0.0]]
    assert turn_advantages([[0.7, NAN], [NAN]], 2, "group") == [[0.0, 0.0], [0.0]]


def conversation(mask, advantage):
    ids = list(range(len(mask)))
    return Trajectory(Prompt(Example([], ""), [1], []), ids, list(mask), advantage=advantage)


def test_tokens_have_the_advantage_of_row_and_turn_less_the_penalties_of_their_calls():
    """Two turns of three tokens with a response of two between them, and a row of one turn.

    Turns 1 and 0 against 0.5: 0.5 and -0.5 unscaled, halved by the coefficient. The second turn's call, its last
    two tokens, failed; the other row's last token does not parse.
    """
    rows = [conversation([1, 1, 1, 0, 0, 1, 1, 1], 2.0), conversation([1, 1], -2.0)]
    credit = Credit(turn_coef=0.5, malformed=1.0, failed=0.125, scale="none")
    wrong = [[Fault(True, 6, 8)], [Fault(False, 1, 2)]]
    got = credit.of_tokens(rows, 2, [[1.0, 0.0], [0.5]], wrong)
    assert got[0].token_advantages == [2.25, 2.25, 2.25, 0, 0, 1.75, 1.625, 1.625]
    assert got[1].token_advantages == [-2.0, -3.0]
    assert [one.advantage for one in got] == [2.0, -2.0]
    (alone, _) = credit.of_tokens(rows, 2, None, [[], []])
    assert alone.token_advantages == [2, 2, 2, 0, 0, 2, 2, 2]


def test_a_row_whose_only_credit_is_a_penalty_acts():
    (row,) = Credit(failed=1.0).of_tokens([conversation([1, 1], 0.0)], 1, None, [[Fault(True, 0, 1)]])
    assert row.has_advantage and not conversation([1, 1], 0.0).has_advantage
    (row,) = Credit(failed=1.0).of_tokens([conversation([1, 1], 0.0)], 1, None, [[]])
    assert not row.has_advantage


def test_token_advantages_equal_loops_over_1000_random_groups():
    """Written with plain floats: groups of 2 to 4 rows of 1 to 4 turns, some turns without a reward."""
    rng = np.random.default_rng(0)
    for case in range(1000):
        G, scale = int(rng.integers(2, 5)), ("group", "batch", "none")[case % 3]
        rows, rewards, wrong = [], [], []
        for _ in range(2 * G):
            turns = int(rng.integers(1, 5))
            sizes = rng.integers(1, 4, 2 * turns - 1)  # sampled, response, sampled, …
            mask = [i % 2 == 0 for i, n in enumerate(sizes) for _ in range(n)]
            rows.append(conversation(mask, float(rng.normal())))
            rewards.append([NAN if rng.random() < 0.2 else float(rng.integers(0, 4)) for _ in range(turns)])
            at = int(rng.integers(0, sizes[0]))
            wrong.append([Fault(bool(rng.integers(2)), at, int(sizes[0]))] if rng.random() < 0.5 else [])
        credit = Credit(0.7, 0.3, 0.2, scale)
        got = credit.of_tokens(rows, G, rewards, wrong)
        every = [r for row in rewards for r in row if not math.isnan(r)]
        for i, row in enumerate(rows):
            group = [r for one in rewards[i // G * G :][:G] for r in one if not math.isnan(r)]
            sample = {"group": group, "batch": every, "none": []}[scale]
            deviation = (
                statistics.stdev(sample) + 1e-4 if len(sample) > 1 else 1.0 if scale == "none" else 1e-4
            )
            turn = -1
            for t, sampled in enumerate(row.sampled_mask):
                turn += sampled and (t == 0 or not row.sampled_mask[t - 1])
                want = 0.0
                if sampled:
                    r = rewards[i][turn]
                    want = row.advantage
                    if not math.isnan(r) and len(group) > 0:
                        want += 0.7 * (r - statistics.fmean(group)) / deviation
                    for fault in wrong[i]:
                        want -= (0.2 if fault.parses else 0.3) * (fault.start <= t < fault.stop)
                assert got[i].token_advantages[t] == pytest.approx(want, abs=1e-6)
