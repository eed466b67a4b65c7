"""95 % intervals of an evaluation's figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy  # its parts are imported at their first use: scipy.stats takes a second


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share.

    Returns:
        (low, high) in [0, 1]; (0, 1) for no rows.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n == 0:
        return 0.0, 1.0
    interval = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values: Sequence[float], seed: int, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of a mean: the 2.5 and 97.5 percentiles of the means of resampled rows.

    Args:
        values: one per row, at least one.

    Returns:
        (low, high); of a single value, that value twice.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife" (percentile form).
    """
    if len(values) == 1:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(seed)
    interval = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", rng=rng
    ).confidence_interval
    return float(interval.low), float(interval.high)
