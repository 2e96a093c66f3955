"""Optimal learning rate and batch size of one noise type from a sweep over both.

At each horizon D: per batch size B a parabola of log loss in log learning rate gives eta*(B) and
the loss there; over those losses a parabola in log B gives B*(D). Laws: eta* = A B^x from the
largest horizon at which three batch sizes have an optimum, B* = A D^x over horizons. An optimum
counts where it is convex and inside the sweep in 95 % of the resamples; the rest is refused.
Batch sizes of the laws are in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from megatron_ext.scaling.frontier import MIN_SHARE, value_at
from megatron_ext.scaling.powerlaw import PowerLaw, law_of_draws
from megatron_ext.scaling.resampling import Scatter, scatter_of


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Best learning rate (or batch size in tokens) at a horizon."""

    tokens: float
    batch_tokens: float | None
    """Of a learning rate; None where this is the batch size."""
    value: float
    interval: tuple[float, float]
    share_inside: float
    loss: float


@dataclass
class Sweep:
    """Result for one noise type and size."""

    learning_rates: list[Optimum] = field(default_factory=list)
    batch_sizes: list[Optimum] = field(default_factory=list)
    laws: dict[str, PowerLaw] = field(default_factory=dict)
    """learning_rate: of batch tokens; batch_tokens: of tokens."""
    refusals: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Grid:
    rates: dict[float, np.ndarray]
    """Learning rates [k] by batch tokens."""
    losses: dict[float, np.ndarray]
    """log loss [k, horizons], mean over seeds."""


def _grid(table: pd.DataFrame, horizons: np.ndarray) -> _Grid:
    rates: dict[float, list[float]] = {}
    losses: dict[float, list[np.ndarray]] = {}
    for (batch, rate), runs in table.groupby(["batch_tokens", "learning_rate"]):
        curves = [
            [value_at(curve, "tokens", d) for d in horizons] for _, curve in runs.groupby("run")
        ]
        rates.setdefault(float(batch), []).append(float(rate))
        losses.setdefault(float(batch), []).append(np.mean(curves, axis=0))
    return _Grid(
        {b: np.array(v) for b, v in rates.items()}, {b: np.array(v) for b, v in losses.items()}
    )


def _parabola(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertex, value there and whether it is convex and inside, for y [..., k]."""
    centre = x.mean()
    coefficients = y @ np.linalg.pinv(np.vander(x - centre, 3, increasing=True)).T
    c0, c1, c2 = np.moveaxis(coefficients, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = centre - c1 / (2 * c2)
        value = c0 - c1**2 / (4 * c2)
    return vertex, value, (c2 > 0) & (vertex >= x.min()) & (vertex <= x.max())


def _scatter(grid: _Grid, horizons: int) -> Scatter | None:
    """Noise from the misfit of all parabolas over learning rates together."""
    residuals, parameters = [], 0
    for batch, rates in grid.rates.items():
        if len(rates) < 4:
            continue
        design = np.vander(np.log(rates) - np.log(rates).mean(), 3, increasing=True)
        y = grid.losses[batch]
        residuals.append(y - design @ (np.linalg.pinv(design) @ np.nan_to_num(y)))
        parameters += 3 * int(np.isfinite(y).all(0).sum())
    if not residuals:
        return None
    stacked = np.concatenate(residuals)
    stacked[:, ~np.isfinite(stacked).all(0)] = np.nan
    return scatter_of(stacked.reshape(-1, horizons), parameters)


def fit_sweep(
    table: pd.DataFrame, horizons: np.ndarray, num_draws: int = 1000, seed: int = 0
) -> Sweep:
    """Optima and laws of the un-annealed runs in `table`: one noise type, one size."""
    result = Sweep()
    grid = _grid(table, horizons)
    scatter = _scatter(grid, len(horizons))
    if scatter is None:
        most = max((len(rates) for rates in grid.rates.values()), default=0)
        result.refusals.append(
            f"{most} learning rates per batch size: a minimum over them needs three, and its "
            "uncertainty a fourth"
        )
        return result
    rng = np.random.default_rng(seed)
    best, many, inside = _rate_optima(grid, horizons, scatter, num_draws, rng, result)
    _batch_optima(best, many, inside, horizons, result)
    return result


def _rate_optima(
    grid: _Grid, horizons: np.ndarray, scatter: Scatter, num_draws: int,
    rng: np.random.Generator, result: Sweep,
) -> tuple[dict, dict, dict]:  # fmt: skip
    """Per batch size: loss at the best rate [horizons], resampled [draws, horizons], validity."""
    best, many, valid = {}, {}, {}
    rate_draws = {}
    for batch, rates in sorted(grid.rates.items()):
        if len(rates) < 3:
            result.refusals.append(f"batch {batch:g} tokens: {len(rates)} learning rates")
            continue
        x, y = np.log(rates), grid.losses[batch]
        vertex, value, _ = _parabola(x, y.T)
        design = np.vander(x - x.mean(), 3, increasing=True)
        smooth = design @ (np.linalg.pinv(design) @ y)
        noise = scatter.draws(num_draws, y.shape, rng)
        vertices, values, inside = _parabola(x, np.swapaxes(smooth + noise, 1, 2))
        best[batch], many[batch], valid[batch] = value, values, inside
        rate_draws[batch] = vertices
        for h, tokens in enumerate(horizons):
            if np.isfinite(vertex[h]):
                kept = inside[:, h]
                low, high = (
                    np.percentile(vertices[kept, h], [2.5, 97.5]) if kept.sum() > 20
                    else (np.nan, np.nan)
                )  # fmt: skip
                result.learning_rates.append(
                    Optimum(
                        tokens=float(tokens), batch_tokens=batch, value=float(np.exp(vertex[h])),
                        interval=(float(np.exp(low)), float(np.exp(high))),
                        share_inside=float(kept.mean()), loss=float(np.exp(value[h])),
                    )
                )  # fmt: skip
    _rate_law(rate_draws, valid, horizons, result)
    return best, many, valid


def _rate_law(rate_draws: dict, valid: dict, horizons: np.ndarray, result: Sweep) -> None:
    for h in reversed(range(len(horizons))):
        batches = [b for b in rate_draws if valid[b][:, h].mean() >= MIN_SHARE]
        if len(batches) >= 3 and max(batches) / min(batches) >= 4:
            kept = np.all([valid[b][:, h] for b in batches], axis=0)
            draws = np.exp(np.array([rate_draws[b][kept, h] for b in batches]).T)
            optima = {
                o.batch_tokens: o.value for o in result.learning_rates if o.tokens == horizons[h]
            }
            result.laws["learning_rate"] = law_of_draws(
                np.array(batches), np.array([optima[b] for b in batches]), draws
            )
            return
    result.refusals.append(
        "learning rate against batch size: at no horizon do three batch sizes that span a factor "
        "of four have their best rate inside the sweep in 95 % of the resamples"
    )


def _batch_optima(best: dict, many: dict, valid: dict, horizons: np.ndarray, result: Sweep) -> None:
    good, kept_of_all = [], True
    for h, tokens in enumerate(horizons):
        batches = np.array([b for b in best if valid[b][:, h].mean() >= MIN_SHARE])
        if len(batches) < 3:
            continue
        x = np.log(batches)
        vertex, value, _ = _parabola(x, np.array([best[b][h] for b in batches]))
        vertices, _, inside = _parabola(x, np.array([many[b][:, h] for b in batches]).T)
        inside &= np.all([valid[b][:, h] for b in batches], axis=0)
        share = float(inside.mean())
        low, high = (
            np.percentile(vertices[inside], [2.5, 97.5]) if inside.sum() > 20 else (np.nan, np.nan)
        )
        result.batch_sizes.append(
            Optimum(
                tokens=float(tokens),
                batch_tokens=None,
                value=float(np.exp(vertex)),
                interval=(float(np.exp(low)), float(np.exp(high))),
                share_inside=share,
                loss=float(np.exp(value)),
            )
        )
        if share >= MIN_SHARE:
            good.append((float(tokens), float(np.exp(vertex)), vertices))
            kept_of_all = kept_of_all & inside
    if len(good) < 3 or good[-1][0] / good[0][0] < 4:
        result.refusals.append(
            f"batch size against tokens: {len(good)} horizons have their best batch size inside "
            "the sweep in 95 % of the resamples; three that span a factor of four are needed"
        )
        return
    result.laws["batch_tokens"] = law_of_draws(
        np.array([g[0] for g in good]), np.array([g[1] for g in good]),
        np.exp(np.array([g[2] for g in good]).T[kept_of_all]),
    )  # fmt: skip
