"""Power laws y = A x^alpha with uncertainty, and robust straight lines for many resamples at once.

A law is kept at a pivot inside its data, log y = level + alpha (log x - log pivot), with the
covariance of (level, alpha): A alone is an extrapolation to x = 1 and means nothing by itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z95 = 1.959963984540054
HUBER = 1.345
"""Residuals beyond so many robust standard deviations lose weight; 95 % efficient on Gaussians."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = exp(level) (x / pivot)^alpha."""

    pivot: float
    level: float
    alpha: float
    covariance: tuple[tuple[float, float], tuple[float, float]]
    """Of (level, alpha)."""
    alpha_interval: tuple[float, float]
    """95 %."""
    x_range: tuple[float, float]
    """Of the data."""
    r_squared: float | None = None
    rms_residual: float | None = None
    """Of log y."""
    num_points: int | None = None

    @property
    def coefficient(self) -> float:
        """A of y = A x^alpha."""
        return math.exp(self.level - self.alpha * math.log(self.pivot))

    def at(self, x: float) -> float:
        return math.exp(self.level + self.alpha * math.log(x / self.pivot))

    def interval(self, x: float) -> tuple[float, float]:
        """95 %, of the law (not of a new observation)."""
        direction = np.array([1.0, math.log(x / self.pivot)])
        half = Z95 * math.sqrt(max(direction @ np.array(self.covariance) @ direction, 0.0))
        middle = self.at(x)
        return middle * math.exp(-half), middle * math.exp(half)

    def inverse(self, y: float) -> float:
        """The x at which the law gives y."""
        return self.pivot * math.exp((math.log(y) - self.level) / self.alpha)

    def as_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient, **asdict(self)}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> PowerLaw:
        values = {name: value for name, value in tree.items() if name != "coefficient"}
        values["covariance"] = tuple(tuple(row) for row in values["covariance"])
        for name in ("alpha_interval", "x_range"):
            values[name] = tuple(values[name])
        return cls(**values)


def robust_lines(x: np.ndarray, y: np.ndarray, iterations: int = 12) -> np.ndarray:
    """Huber regression of each row: x [n], y [..., n] -> (level at the mean of x, slope) [..., 2].

    The scale is the median absolute residual of each row; with three points or fewer it is plain
    least squares, since a median of residuals says nothing there.
    """
    centred = x - x.mean()
    weights = np.ones_like(y)
    line = _weighted_lines(centred, y, weights)
    if len(x) <= 3:
        return line
    for _ in range(iterations):
        residual = np.abs(y - line[..., :1] - line[..., 1:] * centred)
        scale = 1.4826 * np.median(residual, axis=-1, keepdims=True)
        # Of a row that fits exactly, every weight is one.
        floor = np.maximum(HUBER * scale, 1e-12)
        weights = np.minimum(1.0, floor / np.maximum(residual, 1e-300))
        line = _weighted_lines(centred, y, weights)
    return line


def _weighted_lines(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    total = w.sum(-1)
    mean_x, mean_y = (w * x).sum(-1) / total, (w * y).sum(-1) / total
    dx = x - mean_x[..., None]
    slope = (w * dx * (y - mean_y[..., None])).sum(-1) / (w * dx * dx).sum(-1)
    return np.stack([mean_y - slope * mean_x, slope], axis=-1)


def law_of_draws(x: np.ndarray, y: np.ndarray, draws: np.ndarray) -> PowerLaw:
    """The law of points (x, y) [n] with uncertainty from resampled values `draws` [b, n] of y."""
    log_x, log_y = np.log(x), np.log(y)
    level, alpha = robust_lines(log_x, log_y)
    lines = robust_lines(log_x, np.log(draws))
    residual = log_y - level - alpha * (log_x - log_x.mean())
    spread = ((log_y - log_y.mean()) ** 2).sum()
    low, high = np.percentile(lines[:, 1], [2.5, 97.5])
    return PowerLaw(
        pivot=float(np.exp(log_x.mean())), level=float(level), alpha=float(alpha),
        covariance=tuple(tuple(float(v) for v in row) for row in np.cov(lines.T)),  # type: ignore[arg-type]
        alpha_interval=(float(low), float(high)), x_range=(float(x.min()), float(x.max())),
        r_squared=float(1 - (residual**2).sum() / spread) if spread > 0 else None,
        rms_residual=float(np.sqrt((residual**2).mean())), num_points=len(x),
    )  # fmt: skip


def fit_power_law(x: np.ndarray, y: np.ndarray, num_draws: int = 2000, seed: int = 0) -> PowerLaw:
    """The law of independent points, with the bootstrap over points that the paper uses.

    Needs three different x; `ValueError` otherwise.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(np.unique(x)) < 3:
        raise ValueError(f"a power law of {len(np.unique(x))} different x: three are needed.")
    rng = np.random.default_rng(seed)
    log_x, log_y = np.log(x), np.log(y)
    lines = []
    while len(lines) < num_draws:
        chosen = rng.integers(len(x), size=len(x))
        if np.ptp(log_x[chosen]) == 0:
            continue
        level, slope = robust_lines(log_x[chosen], log_y[chosen])
        lines.append((level + slope * (log_x.mean() - log_x[chosen].mean()), slope))
    centred = log_x - log_x.mean()
    draws = np.exp([[level + slope * c for c in centred] for level, slope in lines])
    return law_of_draws(x, y, draws)
