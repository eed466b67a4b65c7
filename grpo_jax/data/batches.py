"""The order in which rows are drawn, the position in it that a checkpoint saves, and the number of steps of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the rows in an epoch: a permutation of 0 … n − 1 that depends on nothing else.

    Args:
        seed: that of the run, >= 0.
        epoch: counted from 0.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where the next batch starts; part of a checkpoint.

    Args:
        epoch: counted from 0, also the number of finished epochs.
        next_index: place in the epoch's order.
    """

    epoch: int = 0
    next_index: int = 0

    def to_json(self) -> dict[str, int]:
        """The cursor as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, int]) -> Cursor:
        """The inverse of `to_json`."""
        return cls(epoch=int(value["epoch"]), next_index=int(value["next_index"]))


def next_batch(
    n: int, size: int, cursor: Cursor, seed: int, shuffle: bool = True
) -> tuple[list[tuple[int, int]], Cursor]:
    """Draw the next batch of rows; an incomplete last batch of an epoch is dropped.

    Args:
        n: number of rows.
        size: rows per batch.
        shuffle: draw an order for every epoch; False keeps the order of the data.

    Returns:
        [size] pairs (example_index, draw_index) and the next cursor, which is at the next epoch's
        start as soon as this epoch has no full batch left. draw_index = epoch · n + place in the
        epoch is the key of the row's randomness.

    Raises:
        ValueError: size is not in 1 … n.
    """
    if not 1 <= size <= n:
        raise ValueError(
            f"a batch must have between 1 prompt and the data set's {n} rows, got {size}; "
            "lower the batch size or add rows"
        )
    if cursor.next_index + size > n:  # a cursor that was saved with a smaller batch
        cursor = Cursor(cursor.epoch + 1, 0)
    order = epoch_order(seed, cursor.epoch, n) if shuffle else np.arange(n)
    stop = cursor.next_index + size
    draws = [(int(order[place]), cursor.epoch * n + place) for place in range(cursor.next_index, stop)]
    return draws, cursor_after(draws[-1][1], n, size)


def cursor_after(draw: int, n: int, size: int) -> Cursor:
    """The cursor after the row of this draw was used last; n and size as in `next_batch`."""
    epoch, place = divmod(draw, n)
    return Cursor(epoch, place + 1) if place + 1 + size <= n else Cursor(epoch + 1, 0)


def choose_groups(useful: np.ndarray, size: int) -> np.ndarray:
    """The groups that make a batch: the first that have an advantage, filled up with the first of the others.

    Args:
        useful: [n >= size] bool, in the order in which they were drawn.

    Returns:
        [size] their indices, rising.
    """
    return np.sort(np.argsort(~useful, kind="stable")[:size])


@dataclasses.dataclass(frozen=True)
class Steps:
    """The batches and updates of a run.

    Args:
        batches_per_epoch: full batches; an incomplete last one is dropped.
        updates_per_batch: optimizer steps on each batch, `num_iterations`.
    """

    P: int
    G: int
    batches_per_epoch: int
    batches: int
    updates_per_batch: int

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.batches * self.updates_per_batch

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of a pass over the data."""
        return self.batches_per_epoch * self.updates_per_batch


def count_steps(
    rows: int, *, P: int, G: int, epochs: float, max_updates: int = -1, updates_per_batch: int = 1
) -> Steps:
    """The steps of a run over a data set.

    Args:
        epochs: passes over the data; a fraction is rounded up to whole batches.
        max_updates: updates after which the run ends instead, rounded up to whole batches; ignored unless > 0.

    Raises:
        ValueError: the data has fewer rows than one batch has prompts.
    """
    if rows < P:
        raise ValueError(
            f"one update needs {P} prompts ({P} × {G} completions), but the data has {rows} rows; "
            "lower per_device_train_batch_size or gradient_accumulation_steps, or add rows"
        )
    per_epoch = rows // P
    batches = math.ceil(epochs * per_epoch)
    if max_updates > 0:
        batches = math.ceil(max_updates / updates_per_batch)
    return Steps(P, G, per_epoch, batches, updates_per_batch)
