"""Prefixes, buckets and padding as properties; one whole batch worked by hand."""

import dataclasses

import numpy as np
from helpers import trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.types import Status
from grpo_jax.update.batch import (
    Tree,
    bucket,
    common_prefix,
    completion_bucket,
    groups_to_keep,
    make_batch,
    make_tree,
    pad_rows,
    preamble_level,
    prompts_level,
    response_bucket,
    response_shapes,
    update_shapes,
)

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)  # few ids, so that prefixes are long
PROMPTS = st.lists(TOKENS, min_size=1, max_size=5)


@given(PROMPTS)
def test_common_prefix_is_shared_and_leaves_every_prompt_a_token(prompts):
    prefix = common_prefix(prompts)
    assert all(p[: len(prefix)] == prefix for p in prompts)
    assert all(len(prefix) < len(p) for p in prompts)


@given(PROMPTS)
def test_common_prefix_is_the_longest(prompts):
    n = len(common_prefix(prompts))
    at_its_limit = n == min(map(len, prompts)) - 1
    assert at_its_limit or len({p[n] for p in prompts}) > 1


def test_common_prefix_literals():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 5]]) == [1, 2]
    assert common_prefix([[1, 2, 3]]) == [1, 2]  # the last token stays to predict from
    assert common_prefix([[1, 2], [1, 2, 3]]) == [1]
    assert common_prefix([[1, 2], [3, 2]]) == []
    assert common_prefix([[7], [7, 8, 9]]) == []


def test_bucket_literals():
    sizes = [0, 1, 16, 17, 33, 65, 129, 291, 513, 5800]
    assert [bucket(n) for n in sizes] == [0, 16, 16, 32, 64, 128, 192, 320, 640, 5888]
    assert [bucket(n, 6) for n in sizes] == [
        0,
        18,
        18,
        36,
        66,
        132,
        192,
        324,
        642,
        5892,
    ]  # 5888 does not divide by 6


@given(st.integers(1, 3000), st.integers(1, 16))
def test_bucket_holds_its_tokens_divides_by_the_devices_and_grows(n, devices):
    size = bucket(n, devices)
    assert size >= n and size % devices == 0
    assert size < n + 128 + devices or size < 2 * n
    assert bucket(n + 1, devices) >= size


def test_completion_bucket_literals():
    """A whole row is 257 -> 272 or 513 -> 528; a bucket above 0.75 of it is not worth a program."""
    assert [completion_bucket(n, 256) for n in (1, 64, 65, 128, 129, 256)] == [64, 64, 128, 128, 256, 256]
    assert [completion_bucket(n, 512) for n in (64, 200, 256, 257, 512)] == [64, 256, 256, 512, 512]
    assert [completion_bucket(n, 32) for n in (5, 32)] == [32, 32]


@given(st.integers(1, 2000), st.data())
def test_completion_buckets_are_few_and_hold_every_row(budget, data):
    n = data.draw(st.integers(0, budget))
    size = completion_bucket(n, budget)
    assert size >= n
    sizes = {completion_bucket(m, budget) for m in range(budget + 1)}
    assert len(sizes) <= 1 + max(0, int(np.log2(budget / 32)))


@given(st.integers(1, 5000))
def test_response_bucket_is_the_next_power_of_two(n):
    size = response_bucket(n)
    assert size >= max(n, 32) and size & (size - 1) == 0
    assert size == 32 or size < 2 * n


def test_the_shapes_of_a_run_by_hand():
    assert update_shapes(63) == [(64, 64)]
    assert update_shapes(256) == [(64, 64), (128, 64), (128, 128), (256, 64), (256, 128), (256, 256)]
    assert response_shapes(33) == [32]
    assert response_shapes(256) == [32, 64, 128, 256]


@given(st.integers(2, 400), st.data())
def test_every_batch_and_response_has_one_of_the_shapes(budget, data):
    tree = Tree((1,), 16, 16, budget)
    ids = data.draw(st.lists(st.booleans(), min_size=1, max_size=budget))
    batch = make_batch(tree, [trajectory([1, 2, 3], [4] * len(ids), ids, [0.0] * len(ids))], 1)
    assert (batch.completions.targets.shape[1], batch.J) in update_shapes(budget)
    assert response_bucket(data.draw(st.integers(1, budget - 1))) in response_shapes(budget)


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5), st.integers(0, 3))
def test_pad_rows_keeps_every_row_and_marks_it(rows, extra):
    width = max(map(len, rows), default=0) + extra
    out, valid = pad_rows(rows, width)
    assert out.shape == valid.shape == (len(rows), width)
    assert out.dtype == np.int32 and valid.dtype == bool
    assert [list(row[real]) for row, real in zip(out, valid, strict=True)] == rows
    assert not out[~valid].any()
    assert not (valid[:, 1:] & ~valid[:, :-1]).any()  # real entries come first


@settings(max_examples=50)
@given(PROMPTS, st.integers(1, 8))
def test_a_prompt_is_its_preamble_its_rest_and_its_last_token(prompts, devices):
    tree = make_tree(prompts, budget=20, devices=devices)
    shared, own = preamble_level(tree), prompts_level(tree, prompts)
    for i, prompt in enumerate(prompts):
        preamble = shared.tokens[shared.valid]
        valid = own.valid[i]
        assert [*preamble, *own.tokens[i][valid], prompt[-1]] == prompt
        assert list(own.positions[i][valid]) == list(range(len(preamble), len(prompt) - 1))


def test_prompts_without_anything_in_common_have_no_preamble():
    tree = make_tree([[1, 2, 3], [4, 5]], budget=20)
    assert tree == Tree(preamble=(), T0=0, T1=16, budget=20)
    assert preamble_level(tree).tokens.shape == (1, 0)


def test_prompts_that_are_all_preamble_have_no_level_of_their_own():
    tree = make_tree([[1, 2, 3], [1, 2, 4]], budget=20)
    assert tree == Tree(preamble=(1, 2), T0=16, T1=0, budget=20)


def test_batch_literal():
    """Two prompts of two generations, a tool response in one of them, one row that the budget ended."""
    tree = Tree(preamble=(1, 2), T0=4, T1=3, budget=6)
    a, b = [1, 2, 3, 4], [1, 2, 5, 6, 7]
    # sampled 10 11, tool 12, sampled 13
    rows = [
        trajectory(a, [10, 11, 12, 13], [True, True, False, True], [-0.1, -0.2, 0.0, -0.3], 1.0),
        trajectory(a, [14], [True], [-0.4], -1.0),
        trajectory(b, [15, 16], [True, True], [-0.5, -0.6], 0.5),
        trajectory(b, [17, 18, 19], [True, True, True], [-0.7, -0.8, -0.9], -0.5, Status.OVERLONG),
    ]
    batch = make_batch(tree, rows, 2, mask_truncated=True)
    learned = batch.completions
    zeros = [0] * 12  # 16 slots: the whole budget, rounded up
    off = [False] * 12
    assert batch.preamble.tokens.tolist() == [[1, 2, 0, 0]]
    assert batch.preamble.valid.tolist() == [[True, True, False, False]]
    assert batch.prompts.tokens.tolist() == [[3, 0, 0], [5, 6, 0]]
    assert batch.prompts.positions.tolist() == [[2, 3, 4], [2, 3, 4]]
    assert batch.prompts.valid.tolist() == [[True, False, False], [True, True, False]]
    assert learned.level.tokens.tolist() == [
        [4, 10, 11, 12, *zeros],
        [4, 0, 0, 0, *zeros],
        [7, 15, 0, 0, *zeros],
        [7, 17, 18, 0, *zeros],
    ]
    assert learned.targets.tolist() == [
        [10, 11, 12, 13, *zeros],
        [14, 0, 0, 0, *zeros],
        [15, 16, 0, 0, *zeros],
        [17, 18, 19, 0, *zeros],
    ]
    assert learned.level.positions[:, 0].tolist() == [3, 3, 4, 4]
    assert (np.diff(learned.level.positions, axis=1) == 1).all()
    assert learned.level.valid.sum(1).tolist() == [4, 1, 2, 3]
    assert learned.trained.tolist() == [
        [True, True, False, True, *off],
        [True, False, False, False, *off],
        [True, True, False, False, *off],
        [False, False, False, False, *off],
    ]
    np.testing.assert_allclose(learned.sampler_logprobs[0, :5], [-0.1, -0.2, 0, -0.3, 0], rtol=1e-6)
    assert learned.advantages.tolist() == [1.0, -1.0, 0.5, -0.5]
    assert learned.old_logprobs is None and learned.ref_logprobs is None
    assert batch.J == 16


def test_advantages_of_tokens_lie_as_their_targets_do():
    tree = Tree(preamble=(1, 2), T0=4, T1=3, budget=6)
    rows = [
        dataclasses.replace(trajectory([1, 2, p, 4], [10] * n, [True] * n, [0.0] * n), token_advantages=a)
        for p, n, a in ((3, 2, [0.0, -0.5]), (3, 1, [0.0]), (5, 1, [0.0]), (5, 2, [0.0, 0.0]))
    ]
    batch = make_batch(tree, rows, 2, sizes=(1,))  # the group whose second token acts is kept
    assert batch.prompts.tokens.tolist() == [[3, 0, 0]]
    assert batch.completions.advantages[:, :3].tolist() == [[0, -0.5, 0], [0, 0, 0]]
    assert batch.completions.advantages.shape == batch.completions.targets.shape


def test_groups_that_act_on_the_loss_are_kept_and_filled_up_to_a_size():
    assert groups_to_keep([False, False, True, False], sizes=(2, 1)) == [2]
    assert groups_to_keep([False, True, False, True], sizes=(2, 1)) == [1, 3]
    assert groups_to_keep([True, True, False, True], sizes=(2, 1)) == [0, 1, 2, 3]
    # one that acts in the middle and the first that does not, in their order
    assert groups_to_keep([False, False, True, False], sizes=(2,)) == [0, 2]
    # none acts: the update still runs, on the smallest size
    assert groups_to_keep([False] * 4, sizes=(2, 1)) == [0]


def test_a_batch_without_the_groups_that_have_no_advantage_divides_by_all_rows():
    tree = Tree(preamble=(1, 2), T0=4, T1=3, budget=6)
    advantages = [0.0, 0.0, 0.7, -0.7]
    rows = [
        trajectory([1, 2, p, 4], [10] * n, [True] * n, [0.0] * n, advantage)
        for (p, n), advantage in zip(((3, 1), (3, 2), (5, 3), (5, 4)), advantages, strict=True)
    ]
    batch = make_batch(tree, rows, 2, sizes=(1,))
    assert batch.prompts.tokens.tolist() == [[5, 0, 0]]
    assert batch.completions.trained.sum(1).tolist() == [3, 4]
    np.testing.assert_allclose(batch.completions.advantages, [0.7, -0.7], rtol=1e-6)
    assert (batch.tokens, batch.rows) == (10, 4)


def test_a_group_whose_completions_with_an_advantage_were_all_cut_by_the_budget_is_left_out():
    tree = Tree(preamble=(1, 2), T0=4, T1=3, budget=6)
    ends = [Status.OVERLONG, Status.ANSWERED, Status.ANSWERED, Status.ANSWERED]
    rows = [
        trajectory([1, 2, p, 4], [10], [True], [0.0], advantage, status)
        for p, advantage, status in zip((3, 3, 5, 5), [2.0, 0.0, 1.0, -1.0], ends, strict=True)
    ]
    batch = make_batch(tree, rows, 2, mask_truncated=True, sizes=(1,))
    assert batch.prompts.tokens.tolist() == [[5, 0, 0]]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=4), st.integers(100, 300))
def test_loss_positions_hold_every_learned_token(lengths, budget):
    tree = make_tree([[1, 2]], budget)
    rows = [trajectory([1, 2], [3] * n, [True] * n, [0.0] * n) for n in lengths]
    batch = make_batch(tree, rows, len(rows))
    assert batch.completions.trained.sum(1).tolist() == lengths
    assert max(lengths) <= batch.J <= batch.completions.targets.shape[1]
