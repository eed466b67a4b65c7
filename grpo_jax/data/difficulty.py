"""Sampling of prompts by their solve rate (`--difficulty_sampling`): rates near one half give the largest advantages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class SolveRates:
    """The share of right completions in the last group of each row; part of a checkpoint.

    Args:
        rates: [n] in [0, 1]; NaN for a row that has had no group yet.
    """

    rates: np.ndarray

    @classmethod
    def from_json(cls, n: int, known: Mapping[str, float]) -> SolveRates:
        """The inverse of `to_json` for n rows."""
        rates = np.full(n, np.nan)
        for row, rate in known.items():
            rates[int(row)] = rate
        return cls(rates)

    def to_json(self) -> dict[str, float]:
        """Row -> rate, of the rows that have one."""
        return {str(row): float(self.rates[row]) for row in np.flatnonzero(~np.isnan(self.rates))}

    def weights(self, floor: float) -> np.ndarray:
        """[n] max(floor, 1 − |2·rate − 1|): 1 at one half and for a new row, the floor at 0 and at 1."""
        return np.where(np.isnan(self.rates), 1.0, np.maximum(floor, 1 - np.abs(2 * self.rates - 1)))

    def draw(self, draws: Sequence[tuple[int, int]], seed: int, floor: float) -> list[tuple[int, int]]:
        """Rows sampled by weight, without replacement, for the draws of `next_batch`.

        Args:
            draws: [P] pairs (example_index, draw_index), of which the first draw_index and the seed decide.
            floor: smallest weight, > 0.

        Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir": the P smallest of
        exponential variates divided by the weights.
        """
        # the second half of the counter: epoch_order counts from 0 under keys that may be equal
        random = np.random.Generator(np.random.Philox(key=[seed, draws[0][1]], counter=[0, 0, 0, 1]))
        order = np.argsort(random.exponential(size=len(self.rates)) / self.weights(floor), kind="stable")
        return [(int(row), draw) for row, (_, draw) in zip(order, draws, strict=False)]

    def after(self, rows: Sequence[int], solved: Sequence[bool]) -> SolveRates:
        """The rates after a rollout.

        Args:
            rows: [P] the rows whose groups the rollout sampled.
            solved: [P·G] whether a completion is right; those of a group are adjacent.
        """
        rates = self.rates.copy()
        rates[list(rows)] = np.reshape(solved, (len(rows), -1)).mean(1)
        return SolveRates(rates)
