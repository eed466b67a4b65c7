"""The order of rows, the cursor, and the steps of a run."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.batches import (
    Cursor,
    Steps,
    choose_groups,
    count_steps,
    cursor_after,
    epoch_order,
    next_batch,
)


def test_epoch_order_is_fixed_by_seed_and_epoch():
    """The literals hold a run's resume together: another order would repeat and skip rows."""
    assert epoch_order(0, 0, 8).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert epoch_order(0, 1, 8).tolist() == [2, 0, 4, 1, 7, 5, 3, 6]
    assert epoch_order(1, 0, 8).tolist() == [0, 5, 4, 1, 2, 6, 3, 7]


@given(st.integers(1, 40), st.data())
def test_every_row_is_drawn_at_most_once_per_epoch_and_draws_are_unique(n, data):
    size = data.draw(st.integers(1, n))
    seed = data.draw(st.integers(0, 2**32))
    cursor, draws = Cursor(), []
    for _ in range(2 * (n // size)):
        batch, cursor = next_batch(n, size, cursor, seed)
        assert len(batch) == size
        draws += batch
    assert cursor == Cursor(2, 0)
    half = n // size * size
    for epoch in range(2):
        rows, keys = zip(*draws[epoch * half : (epoch + 1) * half], strict=True)
        assert len(set(rows)) == half
        assert set(rows) <= set(range(n))
        assert keys == tuple(range(epoch * n, epoch * n + half))


def test_without_shuffling_every_epoch_has_the_order_of_the_data():
    batch, cursor = next_batch(5, 2, Cursor(), seed=9, shuffle=False)
    assert batch == [(0, 0), (1, 1)]
    batch, cursor = next_batch(5, 2, cursor, seed=9, shuffle=False)
    assert (batch, cursor) == ([(2, 2), (3, 3)], Cursor(epoch=1, next_index=0))
    assert next_batch(5, 2, cursor, seed=9, shuffle=False)[0] == [(0, 5), (1, 6)]


def test_an_incomplete_last_batch_is_dropped():
    batch, cursor = next_batch(5, 2, Cursor(epoch=3, next_index=2), seed=9)
    assert [key for _, key in batch] == [17, 18]
    assert cursor == Cursor(epoch=4, next_index=0)


def test_a_cursor_of_a_smaller_batch_moves_on_when_no_full_batch_is_left():
    batch, cursor = next_batch(10, 4, Cursor(epoch=0, next_index=8), seed=0)
    assert [key for _, key in batch] == [10, 11, 12, 13]
    assert cursor == Cursor(epoch=1, next_index=4)


@given(st.integers(1, 30), st.integers(0, 9), st.data())
def test_a_stored_cursor_continues_the_same_draws(n, seed, data):
    size, done = data.draw(st.integers(1, n)), data.draw(st.integers(0, 7))
    cursor = Cursor()
    for _ in range(done):
        _, cursor = next_batch(n, size, cursor, seed)
    restored = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
    assert restored == cursor
    assert next_batch(n, size, restored, seed) == next_batch(n, size, cursor, seed)


@given(st.integers(1, 30), st.data())
def test_a_run_that_uses_rows_up_to_a_draw_continues_with_the_one_behind_it(n, data):
    """Unless the epoch has no full batch left; after a batch's last row it is the batch's own cursor."""
    size = data.draw(st.integers(1, n))
    batch, cursor = next_batch(n, size, Cursor(2, data.draw(st.integers(0, n - size))), seed=5)
    assert cursor_after(batch[-1][1], n, size) == cursor
    used = batch[data.draw(st.integers(0, size - 1))][1]
    again, _ = next_batch(n, size, cursor_after(used, n, size), seed=5)
    full = used % n + size < n
    assert again[0][1] == (used + 1 if full else 3 * n)


@pytest.mark.parametrize(
    ("useful", "chosen"),
    [
        ([0, 1, 0, 1, 1, 1], [1, 3]),  # the last two came with the round that was needed for the second
        ([0, 0, 1, 0], [0, 2]),  # filled up after the last round
        ([0, 0, 0, 0], [0, 1]),
        ([1, 1], [0, 1]),
        ([0, 1], [0, 1]),
    ],
)
def test_a_batch_holds_the_first_groups_with_an_advantage(useful, chosen):
    assert choose_groups(np.array(useful, bool), 2).tolist() == chosen


@pytest.mark.parametrize("size", [0, -1, 6])
def test_a_batch_that_the_data_cannot_fill_is_an_error(size):
    with pytest.raises(ValueError, match=f"between 1 prompt and the data set's 5 rows, got {size}"):
        next_batch(5, size, Cursor(), seed=0)


# Steps


@pytest.mark.parametrize(
    ("options", "batches", "updates"),
    [
        ({"epochs": 3}, 15, 15),
        ({"epochs": 0.5}, 3, 3),  # 2.5 batches
        ({"epochs": 1, "updates_per_batch": 3}, 5, 15),
        ({"epochs": 1, "max_updates": -1}, 5, 5),
        ({"epochs": 1, "max_updates": 40}, 40, 40),  # goes through the data again
        ({"epochs": 9, "max_updates": 7, "updates_per_batch": 3}, 3, 9),  # whole batches
    ],
)
def test_steps_follow_from_epochs_or_updates(options, batches, updates):
    """22 rows are 5 batches of 4 prompts, and 2 rows are left out."""
    steps = count_steps(22, P=4, G=8, **options)
    assert steps == Steps(4, 8, 5, batches, options.get("updates_per_batch", 1))
    assert steps.updates == updates


def test_fewer_rows_than_a_batch_has_prompts_are_an_error():
    with pytest.raises(
        ValueError, match=r"one update needs 4 prompts \(4 × 8 completions\), but the data has 3 rows;"
    ):
        count_steps(3, P=4, G=8, epochs=1)
