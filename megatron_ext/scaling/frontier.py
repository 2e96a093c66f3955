"""The compute-optimal frontier of one noise type: iso-FLOP minima, N*(C), D*(C), L*(C).

At each budget C the loss of every run is interpolated (log loss in log C) between its validations;
per size the best (batch size, learning rate) is kept, all its seeds. A parabola of log loss in
log M (FLOPs per token) has its minimum at M*(C); D* = C / M*; P* from a parabola in log P. The
laws are robust lines through the minima (paper section on scaling laws). Intervals are percentiles
over resamples of the runs' noise (`resampling`).

Only minima that the data show count: convex, and inside the range of sizes, in 95 % of the
resamples. Laws need three such budgets that span a factor of four; else they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from megatron_ext.scaling.powerlaw import PowerLaw, law_of_draws, robust_lines
from megatron_ext.scaling.resampling import Scatter, scatter_of
from megatron_ext.scaling.study import Convention

MIN_BUDGETS, MIN_SPAN, MIN_SHARE = 3, 4.0, 0.95
FLOPS_COLUMN = {"paper": "flops", "6p": "flops_6p"}


def value_at(curve: pd.DataFrame, column: str, target: float) -> float:
    """log loss of one run at a horizon: linear in logs, NaN outside the harvested range."""
    x = curve[column].to_numpy(float)
    order = np.argsort(x)
    x, y = np.log(x[order]), np.log(curve["loss"].to_numpy(float)[order])
    log_target = np.log(target)
    # The last validation of a run that was planned for the budget may fall short by one rounding.
    if not (x[0] - 1e-9 <= log_target <= x[-1] + 1e-6):
        return float("nan")
    return float(np.interp(log_target, x, y))


@dataclass(frozen=True)
class IsoLosses:
    """Losses at budgets: one row per run that is best for its size at some budget."""

    runs: list[str]
    sizes: list[str]
    parameters: np.ndarray
    """[runs], without embedding and head."""
    flops_per_token: np.ndarray
    """[runs], by the convention."""
    budgets: np.ndarray
    """[c]."""
    log_loss: np.ndarray
    """[runs, c], NaN where a run does not reach a budget or another setting is better."""


def iso_losses(table: pd.DataFrame, budgets: np.ndarray, convention: Convention) -> IsoLosses:
    """Un-annealed runs of one noise type at each budget; of each size the best setting's seeds."""
    column = FLOPS_COLUMN[convention]
    rows, settings, sizes, parameters, per_token, names = [], [], [], [], [], []
    for name, curve in table.groupby("run", sort=False):
        first = curve.iloc[0]
        rows.append([value_at(curve, column, budget) for budget in budgets])
        settings.append((first["batch_size"], first["learning_rate"]))
        names.append(str(name))
        sizes.append(str(first["size"]))
        parameters.append(first["parameters"])
        per_token.append(
            first["flops_per_token"] if convention == "paper" else 6.0 * first["parameters"]
        )
    values = np.array(rows, float).reshape(len(names), len(budgets))
    for size in set(sizes):
        of_size = [i for i, other in enumerate(sizes) if other == size]
        for c in range(len(budgets)):
            _keep_best(values, settings, of_size, c)
    used = [i for i in range(len(names)) if np.isfinite(values[i]).any()]
    return IsoLosses(
        [names[i] for i in used], [sizes[i] for i in used],
        np.array(parameters, float)[used], np.array(per_token, float)[used],
        np.asarray(budgets, float), values[used],
    )  # fmt: skip


def _keep_best(values: np.ndarray, settings: list, of_size: list[int], c: int) -> None:
    """Remove, at budget c, the runs of a size whose setting is not the best on average."""
    by_setting: dict[tuple, list[int]] = {}
    for i in of_size:
        if np.isfinite(values[i, c]):
            by_setting.setdefault(settings[i], []).append(i)
    if len(by_setting) > 1:
        best = min(by_setting, key=lambda s: values[by_setting[s], c].mean())
        for setting, members in by_setting.items():
            if setting != best:
                values[members, c] = np.nan


def default_budgets(table: pd.DataFrame, convention: Convention, ratio: float = 2.0) -> np.ndarray:
    """Budgets a ratio apart over the range in which at least three sizes have harvested losses."""
    column = FLOPS_COLUMN[convention]
    spans = table.groupby("run")[column].agg(["min", "max"])
    size_of = table.groupby("run")["size"].first()
    low, high = spans.groupby(size_of)["min"].min(), spans.groupby(size_of)["max"].max()
    if len(low) < 3:
        return np.array([])
    edges = np.unique(np.concatenate([low, high]))
    usable = [x for x in edges if ((low <= x) & (x <= high)).sum() >= 3]
    if len(usable) < 2:
        return np.array([])
    first, last = min(usable), max(usable)
    return last / ratio ** np.arange(int(np.log(last / first) / np.log(ratio)), -1, -1)


@dataclass
class Minimum:
    """The parabola at one budget."""

    budget: float
    num_sizes: int
    share_inside: float
    """Of resamples whose minimum is convex and inside the sizes."""
    share_smallest: float
    """Of resamples in which no size is better than the smallest."""
    flops_per_token: float
    tokens: float
    parameters: float
    loss: float
    intervals: dict[str, tuple[float, float]]
    """95 %, by name: flops_per_token, tokens, parameters, loss."""
    coefficients: tuple[float, float, float]
    """log loss = c0 + c1 x + c2 x^2, x = log FLOPs per token."""

    @property
    def is_identified(self) -> bool:
        return self.share_inside >= MIN_SHARE and self.coefficients[2] > 0


@dataclass
class Frontier:
    """Result for one noise type; `laws` is empty and `refusals` says why where it cannot be had."""

    minima: list[Minimum] = field(default_factory=list)
    laws: dict[str, PowerLaw] = field(default_factory=dict)
    """L, D, M, P against C; L_of_D: the loss where tokens bind and compute does not."""
    holdout: dict[str, dict[str, float]] = field(default_factory=dict)
    """By law: what budgets below the largest predict for it, against what it is."""
    refusals: list[str] = field(default_factory=list)
    scatter: Scatter | None = None


@dataclass(frozen=True)
class _Parabolas:
    """Least-squares maps from losses to coefficients, one per budget."""

    rows: list[np.ndarray]
    """Runs present at each budget."""
    maps: list[np.ndarray]
    """[3, rows]."""
    designs: list[np.ndarray]
    inside: list[tuple[float, float]]
    """Range of x at each budget."""

    @classmethod
    def of(cls, x: np.ndarray, present: np.ndarray) -> _Parabolas:
        rows = [np.flatnonzero(column) for column in present.T]
        designs = [np.vander(x[r], 3, increasing=True) for r in rows]
        inside = [(float(x[r].min()), float(x[r].max())) for r in rows]
        return cls(rows, [np.linalg.pinv(d) for d in designs], designs, inside)

    def coefficients(self, values: np.ndarray) -> np.ndarray:
        """Of values [..., runs, c] -> [..., c, 3]."""
        pairs = enumerate(zip(self.rows, self.maps, strict=True))
        return np.stack([values[..., r, c] @ m.T for c, (r, m) in pairs], axis=-2)

    def fitted(self, coefficients: np.ndarray, num_runs: int) -> np.ndarray:
        values = np.full((num_runs, len(self.rows)), np.nan)
        for c, (r, d) in enumerate(zip(self.rows, self.designs, strict=True)):
            values[r, c] = d @ coefficients[c]
        return values

    def vertices(self, coefficients: np.ndarray) -> tuple[np.ndarray, ...]:
        """Position, value, whether convex and inside, else whether the low end is best [..., c]."""
        c0, c1, c2 = np.moveaxis(coefficients, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            position = -c1 / (2 * c2)
            value = c0 - c1**2 / (4 * c2)
        low, high = np.array(self.inside).T
        inside = (c2 > 0) & (position >= low) & (position <= high)
        low_is_best = c1 * (high - low) + c2 * (high**2 - low**2) > 0
        return position, value, inside, ~inside & low_is_best


def fit_frontier(
    table: pd.DataFrame,
    budgets: np.ndarray,
    convention: Convention = "paper",
    num_draws: int = 1000,
    seed: int = 0,
) -> Frontier:
    """The frontier of the un-annealed runs in `table`, which hold one noise type."""
    iso = iso_losses(table, budgets, convention)
    counts = np.array(
        [len({iso.sizes[i] for i in np.flatnonzero(np.isfinite(c))}) for c in iso.log_loss.T]
    )
    usable = np.flatnonzero(counts >= 3)
    if len(usable) == 0:
        return Frontier(refusals=["no budget is reached by three sizes"])
    values, budgets = iso.log_loss[:, usable], iso.budgets[usable]
    present = np.isfinite(values)
    # Centred, so that the parabolas are well conditioned.
    origin = np.log(iso.flops_per_token).mean(), np.log(iso.parameters).mean()
    by_flops = _Parabolas.of(np.log(iso.flops_per_token) - origin[0], present)
    by_size = _Parabolas.of(np.log(iso.parameters) - origin[1], present)
    coefficients = by_flops.coefficients(np.nan_to_num(values))
    fitted = by_flops.fitted(coefficients, len(values))
    scatter = scatter_of(values - fitted, 3 * len(budgets))
    if scatter is None:
        return Frontier(
            refusals=["parabolas through three points each leave nothing to judge them by; train "
                      "a fourth size or a second seed"]
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    noise = scatter.draws(num_draws, values.shape, rng)
    draws = {}
    for name, parabolas in (("flops_per_token", by_flops), ("parameters", by_size)):
        own = parabolas.coefficients(np.nan_to_num(values))
        smooth = np.nan_to_num(parabolas.fitted(own, len(values)))
        draws[name] = (
            parabolas.vertices(own),
            parabolas.vertices(parabolas.coefficients(smooth + noise)),
        )
    result = Frontier(scatter=scatter)
    result.minima = _minima(budgets, counts[usable], coefficients, draws, origin)
    _add_laws(result, draws, origin)
    return result


def _quantities(vertex: tuple, size_vertex: tuple, budgets: np.ndarray, origin: tuple) -> dict:
    """M, D, P, L [..., c] of vertices; those of flat parabolas are anything."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        per_token = np.exp(vertex[0] + origin[0])
        return {
            "flops_per_token": per_token, "tokens": budgets / per_token,
            "parameters": np.exp(size_vertex[0] + origin[1]), "loss": np.exp(vertex[1]),
        }  # fmt: skip


def _minima(
    budgets: np.ndarray, counts: np.ndarray, coefficients: np.ndarray, draws: dict, origin: tuple
) -> list[Minimum]:
    best = _quantities(draws["flops_per_token"][0], draws["parameters"][0], budgets, origin)
    many = _quantities(draws["flops_per_token"][1], draws["parameters"][1], budgets, origin)
    inside = draws["flops_per_token"][1][2]
    minima = []
    for c, budget in enumerate(budgets):
        kept = inside[:, c]
        intervals = {
            name: tuple(float(v) for v in np.percentile(values[kept, c], [2.5, 97.5]))
            if kept.sum() > 20 else (float("nan"), float("nan"))
            for name, values in many.items()
        }  # fmt: skip
        c0, c1, c2 = (float(v) for v in coefficients[c])
        shift = origin[0]
        minima.append(
            Minimum(
                budget=float(budget), num_sizes=int(counts[c]), share_inside=float(kept.mean()),
                share_smallest=float(draws["flops_per_token"][1][3][:, c].mean()),
                intervals=intervals,  # type: ignore[arg-type]
                coefficients=(c0 - c1 * shift + c2 * shift**2, c1 - 2 * c2 * shift, c2),
                **{name: float(values[c]) for name, values in best.items()},
            )
        )  # fmt: skip
    return minima


def _add_laws(result: Frontier, draws: dict, origin: tuple) -> None:
    kept = [c for c, minimum in enumerate(result.minima) if minimum.is_identified]
    for minimum in result.minima:
        if not minimum.is_identified:
            result.refusals.append(
                f"budget {minimum.budget:.3g}: the minimum over {minimum.num_sizes} sizes is "
                f"convex and inside them in {minimum.share_inside:.0%} of the resamples (95 % "
                f"needed), the smallest size best in {minimum.share_smallest:.0%}"
            )
    budgets = np.array([result.minima[c].budget for c in kept])
    if len(kept) < MIN_BUDGETS or budgets.max() / budgets.min() < MIN_SPAN:
        result.refusals.append(
            f"laws of C: {len(kept)} budgets have a minimum"
            + (f", spanning a factor {budgets.max() / budgets.min():.2g}" if len(kept) else "")
            + f"; {MIN_BUDGETS} that span a factor {MIN_SPAN:g} are needed"
        )
        return
    valid = [draws[name][1][2][:, kept].all(1) for name in ("flops_per_token", "parameters")]
    both = valid[0] & valid[1]
    best, many = (
        _quantities(
            tuple(part[..., kept] for part in draws["flops_per_token"][i]),
            tuple(part[..., kept] for part in draws["parameters"][i]), budgets, origin,
        )
        for i in (0, 1)
    )  # fmt: skip
    many = {name: values[both] for name, values in many.items()}
    names = {"L": "loss", "D": "tokens", "M": "flops_per_token", "P": "parameters"}
    for law, name in names.items():
        result.laws[law] = law_of_draws(budgets, best[name], many[name])
    result.laws["L_of_D"] = _loss_of_tokens(result.laws, budgets, many)
    if len(kept) > MIN_BUDGETS:
        for law, name in names.items():
            result.holdout[law] = _holdout(budgets, best[name], many[name])


def _loss_of_tokens(laws: dict[str, PowerLaw], budgets: np.ndarray, many: dict) -> PowerLaw:
    """L*(D*) along the frontier: exponent alpha_L / alpha_D, from joint resamples."""
    log_c = np.log(budgets)
    loss, tokens = (robust_lines(log_c, np.log(many[name])) for name in ("loss", "tokens"))
    exponents = loss[:, 1] / tokens[:, 1]
    pivot = laws["D"].at(laws["L"].pivot)
    levels = loss[:, 0] + exponents * (np.log(pivot) - tokens[:, 0])
    low, high = np.percentile(exponents, [2.5, 97.5])
    return PowerLaw(
        pivot=pivot, level=laws["L"].level, alpha=laws["L"].alpha / laws["D"].alpha,
        covariance=tuple(tuple(float(v) for v in row) for row in np.cov(levels, exponents)),  # type: ignore[arg-type]
        alpha_interval=(float(low), float(high)),
        x_range=(laws["D"].at(budgets.min()), laws["D"].at(budgets.max())),
        num_points=len(budgets),
    )  # fmt: skip


def _holdout(budgets: np.ndarray, best: np.ndarray, many: np.ndarray) -> dict[str, float]:
    """The largest budget from a law of the others."""
    law = law_of_draws(budgets[:-1], best[:-1], many[:, :-1])
    low, high = law.interval(budgets[-1])
    own_low, own_high = np.percentile(many[:, -1], [2.5, 97.5])
    return {
        "budget": float(budgets[-1]), "observed": float(best[-1]),
        "observed_low": float(own_low), "observed_high": float(own_high),
        "predicted": law.at(budgets[-1]), "predicted_low": low, "predicted_high": high,
        "relative_error": law.at(budgets[-1]) / float(best[-1]) - 1,
    }  # fmt: skip
