"""How much a run's loss scatters, from residuals; and draws of that scatter for a bootstrap.

Values harvested from one run share its luck: residuals along a run are correlated, those of
different runs are not. The model is Gaussian noise of log loss per run, autoregressive along the
run's horizons. Its size comes from all residuals (misfit of the smooth curve and differences of
seeds alike) and is itself redrawn in every resample from its chi-square law, so that intervals from
a few residuals are as wide as Student's. Resampling runs instead would need many of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm


@dataclass(frozen=True)
class Scatter:
    """Noise of log loss: autoregressive along a run, plus an offset per run where it is known."""

    sigma: float
    correlation: float
    """Of neighbouring horizons of one run."""
    degrees_of_freedom: float
    """Effective, of `sigma`."""
    offset_sigma: float = 0.0
    offset_freedom: float = np.inf

    def draws(self, num_draws: int, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """[num_draws, runs, horizons]."""
        noise = rng.standard_normal((num_draws, *shape))
        step = np.sqrt(1 - self.correlation**2)
        for i in range(1, shape[1]):
            noise[..., i] = self.correlation * noise[..., i - 1] + step * noise[..., i]
        if self.offset_sigma == 0:
            return noise * _redrawn(self.sigma, self.degrees_of_freedom, num_draws, rng)
        noise -= noise.mean(-1, keepdims=True)
        noise *= _redrawn(self.sigma, self.degrees_of_freedom, num_draws, rng)
        offsets = rng.standard_normal((num_draws, shape[0], 1))
        return noise + offsets * _redrawn(self.offset_sigma, self.offset_freedom, num_draws, rng)


def _redrawn(sigma: float, freedom: float, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """[num_draws, 1, 1]: what a standard deviation known to so many degrees of freedom may be."""
    return sigma * np.sqrt(freedom / rng.chisquare(freedom, size=(num_draws, 1, 1)))


def _correlation(residuals: np.ndarray) -> float:
    """Of neighbouring columns of [runs, horizons], NaN where absent."""
    left, right = residuals[:, :-1], residuals[:, 1:]
    both = np.isfinite(left) & np.isfinite(right)
    size = np.sqrt((left[both] ** 2).sum() * (right[both] ** 2).sum())
    value = float((left[both] * right[both]).sum() / size) if size > 0 else 0.0
    return min(max(value, 0.0), 0.98)


def _effective(freedom: float, correlation: float) -> float:
    """Squares of an autoregressive series carry less than their number (Bartlett)."""
    return max(float(freedom * (1 - correlation**2) / (1 + correlation**2)), 1.0)


def scatter_of(residuals: np.ndarray, num_parameters: float) -> Scatter | None:
    """Noise from residuals [runs, horizons], NaN where absent, of fits at each horizon.

    `num_parameters` of all fits together; None where they leave no freedom.
    """
    freedom = np.isfinite(residuals).sum() - num_parameters
    if freedom <= 0:
        return None
    sigma = float(np.sqrt(np.nansum(residuals**2) / freedom))
    correlation = _correlation(residuals)
    return Scatter(sigma, correlation, _effective(freedom, correlation))


def scatter_of_surface(residuals: np.ndarray, jacobian: np.ndarray) -> Scatter | None:
    """Noise from residuals [runs, horizons] of one smooth fit with `jacobian` [runs * horizons, p].

    What is common to a run is its offset. The fit takes part of the offsets for itself: of offsets
    u the residuals' means are G u with G the run averages of I - J J^+, whence their freedom
    (Satterthwaite). None where less than one degree is left.
    """
    runs, horizons = residuals.shape
    means = residuals.mean(1, keepdims=True)
    deviations = residuals - means
    correlation = _correlation(deviations)
    lags = np.abs(np.subtract.outer(np.arange(horizons), np.arange(horizons)))
    # Of a unit series, what is left of its variance about its own mean.
    left = 1 - (correlation**lags).mean()
    basis = np.linalg.qr(jacobian)[0].reshape(runs, horizons, -1).sum(1)
    kept = np.eye(runs) - basis @ basis.T / horizons
    squared = kept @ kept
    offset_variance = (means**2).sum() / max(np.trace(squared), 1e-12)
    offset_freedom = np.trace(squared) ** 2 / max((squared**2).sum(), 1e-12)
    if np.trace(squared) < 1:
        return None
    freedom = runs * (horizons - 1) - jacobian.shape[1]
    variance = (deviations**2).sum() / freedom * (horizons - 1) / horizons / left
    return Scatter(
        float(np.sqrt(variance)), correlation, _effective(freedom, correlation),
        float(np.sqrt(offset_variance)), float(offset_freedom),
    )  # fmt: skip


def bias_corrected(value: float, draws: np.ndarray) -> tuple[float, float]:
    """95 % interval from draws whose median need not be the value (Efron's BC percentiles)."""
    below = (draws < value).mean() + 0.5 * (draws == value).mean()
    shift = norm.ppf(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    levels = norm.cdf(2 * shift + norm.ppf([0.025, 0.975]))
    low, high = np.quantile(draws, levels)
    return float(low), float(high)
