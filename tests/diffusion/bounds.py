"""Confidence bounds of the statistical tests.

Seeds are fixed, so a test always gives the same answer; the bounds say how unlikely a failure was
before the seed was chosen: about one in a hundred thousand per comparison.
"""

from __future__ import annotations

import math

import numpy as np

STANDARD_ERRORS = 4.5
"""Two-sided normal bound, P = 7e-6."""

_KOLMOGOROV = 2.5
"""sqrt(n) times the largest distance of distribution functions, P = 2 exp(-2 x^2) = 7e-6."""


def assert_share(count: int, total: int, share: float) -> None:
    """`count` of `total` independent trials succeeded, each with probability `share`."""
    allowed = STANDARD_ERRORS * math.sqrt(share * (1 - share) / total) + 1 / total
    assert abs(count / total - share) <= allowed, (
        f"{count} of {total} is {count / total:.5f}, expected {share:.5f} +- {allowed:.5f}"
    )


def assert_shares(counts: np.ndarray, shares: np.ndarray) -> None:
    """Every category of a multinomial draw has its share; impossible ones do not occur."""
    for count, share in zip(counts, shares, strict=True):
        assert_share(int(count), int(counts.sum()), float(share))


def assert_mean(values: np.ndarray, mean: float) -> None:
    """Independent `values` have this mean, by their own standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - mean) <= STANDARD_ERRORS * error, (
        f"mean {values.mean():.6g}, expected {mean:.6g} +- {STANDARD_ERRORS} x {error:.2g}"
    )


def assert_uniform(values: np.ndarray) -> None:
    """Independent `values` are uniform on [0, 1] (Kolmogorov-Smirnov).

    For another law give its distribution function at the values; for a discrete law this bound
    is conservative only with the function taken between the steps, so use `assert_shares`.
    """
    ordered, count = np.sort(values), len(values)
    assert 0 <= ordered[0] and ordered[-1] <= 1
    above = np.arange(1, count + 1) / count - ordered
    below = ordered - np.arange(count) / count
    distance = math.sqrt(count) * max(above.max(), below.max())
    assert distance <= _KOLMOGOROV, f"Kolmogorov distance {distance:.2f} above {_KOLMOGOROV}"


def assert_uncorrelated(a: np.ndarray, b: np.ndarray) -> None:
    """Paired independent draws show no linear dependence."""
    correlation = float(np.corrcoef(a, b)[0, 1])
    assert abs(correlation) <= STANDARD_ERRORS / math.sqrt(len(a)), f"correlation {correlation:.4f}"
