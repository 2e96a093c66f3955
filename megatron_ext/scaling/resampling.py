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


@dataclass(frozen=True)
class Scatter:
    """Noise of log loss."""

    sigma: float
    correlation: float
    """Of neighbouring horizons of one run."""
    degrees_of_freedom: float
    """Effective, of `sigma`."""

    def draws(self, num_draws: int, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """[num_draws, runs, horizons]."""
        freedom = self.degrees_of_freedom
        sigma = self.sigma * np.sqrt(freedom / rng.chisquare(freedom, size=(num_draws, 1, 1)))
        white = rng.standard_normal((num_draws, *shape))
        step = np.sqrt(1 - self.correlation**2)
        for i in range(1, shape[1]):
            white[..., i] = self.correlation * white[..., i - 1] + step * white[..., i]
        return sigma * white


def scatter_of(residuals: np.ndarray, num_parameters: float) -> Scatter | None:
    """Noise from residuals [runs, horizons], NaN where absent, of a fit with `num_parameters`.

    None where the fit leaves no freedom.
    """
    present = np.isfinite(residuals)
    freedom = present.sum() - num_parameters
    if freedom <= 0:
        return None
    sigma = float(np.sqrt(np.nansum(residuals**2) / freedom))
    left, right = residuals[:, :-1], residuals[:, 1:]
    both = np.isfinite(left) & np.isfinite(right)
    norm = np.sqrt((left[both] ** 2).sum() * (right[both] ** 2).sum())
    correlation = float((left[both] * right[both]).sum() / norm) if norm > 0 else 0.0
    correlation = min(max(correlation, 0.0), 0.98)
    # Squares of an autoregressive series carry less than their number (Bartlett).
    effective = freedom * (1 - correlation**2) / (1 + correlation**2)
    return Scatter(sigma, correlation, max(float(effective), 1.0))
