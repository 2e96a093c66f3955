"""L(N, D) = E + A N^-a + B D^-b over all horizons of all sizes of one noise type ("approach 3").

Robust least squares of log loss from many starts, N and D relative to their means; intervals from
refits of the fitted curve plus resampled noise. Given C = 6 N D the law implies the frontier
exponents b / (a + b) for N and a / (a + b) for D. Refused where an exponent's interval spans more
than a factor of four or the resamples run into the bounds: then the data do not say it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from megatron_ext.scaling.powerlaw import HUBER
from megatron_ext.scaling.resampling import Scatter, bias_corrected, scatter_of_surface

NUM_HORIZONS = 8
LOWER = np.array([-40.0, 0.02, -40.0, 0.02, -40.0])
UPPER = np.array([40.0, 3.0, 40.0, 3.0, 40.0])
MAX_FACTOR = 4.0
NAMES = ("A", "a", "B", "b", "E", "exponent_N", "exponent_D")


@dataclass
class ParametricLaw:
    """Coefficients by `NAMES` with 95 % intervals; empty where `refusals` says why."""

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    rms_residual: float | None = None
    num_points: int = 0

    def at(self, parameters: float, tokens: float) -> float:
        """Loss in nats per token."""
        v = self.values
        return v["E"] + v["A"] * parameters ** -v["a"] + v["B"] * tokens ** -v["b"]


@dataclass(frozen=True)
class _Points:
    log_n: np.ndarray
    log_d: np.ndarray
    log_loss: np.ndarray
    """[runs, horizons] each."""


def horizons_of(table: pd.DataFrame, min_tokens: float) -> _Points:
    """Evenly spaced horizons (in log tokens) of every run of at least two validations."""
    rows = []
    for _, curve in table.groupby("run", sort=False):
        curve = curve[curve["tokens"] >= min_tokens].sort_values("tokens")
        if len(curve) < 2:
            continue
        x, y = np.log(curve["tokens"].to_numpy(float)), np.log(curve["loss"].to_numpy(float))
        grid = np.linspace(x[0], x[-1], NUM_HORIZONS)
        log_n = np.full(NUM_HORIZONS, math.log(curve["parameters"].iloc[0]))
        rows.append((log_n, grid, np.interp(grid, x, y)))
    stacked = np.array(rows).reshape(len(rows), 3, NUM_HORIZONS)
    return _Points(*np.moveaxis(stacked, 1, 0))


def _model(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log loss and its derivatives [points, 5] of centred logs n, d."""
    terms = np.stack([theta[0] - theta[1] * n, theta[2] - theta[3] * d, np.full_like(n, theta[4])])
    top = terms.max(0)
    weights = np.exp(terms - top)
    total = weights.sum(0)
    weights = weights / total
    jacobian = np.stack(
        [weights[0], -weights[0] * n, weights[1], -weights[1] * d, weights[2]], axis=-1
    )
    return top + np.log(total), jacobian


def _solve(
    n: np.ndarray, d: np.ndarray, y: np.ndarray, start: np.ndarray, scale: float | None
) -> tuple[np.ndarray, float]:
    """(coefficients, cost); Huber beyond `scale`, plain squares without."""
    loss = {} if scale is None else {"loss": "huber", "f_scale": scale}
    done = least_squares(
        lambda t: _model(t, n, d)[0] - y, np.clip(start, LOWER + 1e-6, UPPER - 1e-6),
        jac=lambda t: _model(t, n, d)[1], bounds=(LOWER, UPPER), x_scale="jac", max_nfev=200,
        **loss,
    )  # fmt: skip
    return done.x, float(done.cost)


def _starts(y: np.ndarray) -> list[np.ndarray]:
    level = float(y.mean())
    starts = []
    for share in (0.2, 0.5, 0.8):
        rest = level + math.log((1 - share) / 2)
        for a in (0.2, 0.5, 1.0):
            for b in (0.2, 0.5, 1.0):
                starts.append(np.array([rest, a, rest, b, level + math.log(share)]))
    return starts


def fit_parametric(
    table: pd.DataFrame, min_tokens: float = 0.0, num_draws: int = 200, seed: int = 0
) -> ParametricLaw:
    """The law of the un-annealed runs in `table`, which hold one noise type and one setting."""
    points = horizons_of(table, min_tokens)
    sizes = len(np.unique(points.log_n)) if points.log_n.size else 0
    if sizes < 3:
        return ParametricLaw(refusals=[f"{sizes} sizes; three are needed"])
    span = math.exp(np.ptp(points.log_d))
    if span < 4:
        return ParametricLaw(refusals=[f"tokens span a factor {span:.2g}; 4 is needed"])
    centre = points.log_n.mean(), points.log_d.mean()
    n, d = points.log_n.ravel() - centre[0], points.log_d.ravel() - centre[1]
    y = points.log_loss.ravel()
    best = min((_solve(n, d, y, start, None) for start in _starts(y)), key=lambda item: item[1])
    residual = y - _model(best[0], n, d)[0]
    scale = max(HUBER * 1.4826 * float(np.median(np.abs(residual))), 1e-9)
    theta, _ = _solve(n, d, y, best[0], scale)
    fitted = _model(theta, n, d)[0]
    residual = y - fitted
    jacobian = _model(theta, n, d)[1]
    scatter = scatter_of_surface(residual.reshape(points.log_loss.shape), jacobian)
    if scatter is None:
        return ParametricLaw(
            refusals=["so few runs leave nothing to judge the fit by; train another size or seed"]
        )
    draws = _draws(points, centre, theta, fitted, scatter, scale, num_draws, seed)
    return _report(theta, draws, centre, residual)


def _draws(
    points: _Points, centre: tuple[float, float], theta: np.ndarray, fitted: np.ndarray,
    scatter: Scatter, scale: float, num_draws: int, seed: int,
) -> np.ndarray:  # fmt: skip
    noise = scatter.draws(num_draws, points.log_loss.shape, np.random.default_rng(seed))
    n, d = points.log_n.ravel() - centre[0], points.log_d.ravel() - centre[1]
    return np.array([_solve(n, d, fitted + e.ravel(), theta, scale)[0] for e in noise])


def _named(theta: np.ndarray, centre: tuple[float, float]) -> dict[str, np.ndarray]:
    a, b = theta[..., 1], theta[..., 3]
    with np.errstate(over="ignore"):
        return {
            "A": np.exp(theta[..., 0] + a * centre[0]), "a": a,
            "B": np.exp(theta[..., 2] + b * centre[1]), "b": b,
            "E": np.exp(theta[..., 4]), "exponent_N": b / (a + b), "exponent_D": a / (a + b),
        }  # fmt: skip


def _report(
    theta: np.ndarray, draws: np.ndarray, centre: tuple[float, float], residual: np.ndarray
) -> ParametricLaw:
    values, many = _named(theta, centre), _named(draws, centre)
    law = ParametricLaw(
        values={name: float(values[name]) for name in NAMES},
        intervals={
            name: bias_corrected(float(values[name]), many[name]) for name in NAMES
        },
        rms_residual=float(np.sqrt((residual**2).mean())), num_points=len(residual),
    )  # fmt: skip
    for name, index, what in (("a", 1, "size"), ("b", 3, "tokens")):
        low, high = law.intervals[name]
        at_bound = np.mean((draws[:, index] < 0.025) | (draws[:, index] > 2.95))
        if high / low > MAX_FACTOR or at_bound > 0.025:
            law.refusals.append(
                f"exponent {name} of {what} lies between {low:.3g} and {high:.3g}: the data do not "
                "say it"
            )
    if law.refusals:
        law.values, law.intervals = {}, {}
    return law
