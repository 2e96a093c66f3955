"""Everything that a table of runs says, per noise type, as one JSON file.

    {table, min_tokens, budgets: {paper: [..], 6p: [..]}, noises: {NAME: {
        frontier: {paper: {...}, 6p: {...}}, parametric, sweep}}, gaps, anneal}

Laws are `PowerLaw` dictionaries. What the data do not identify has no value but a reason under
`refusals`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from megatron_ext.scaling.annealing import anneal_gain
from megatron_ext.scaling.frontier import (
    MIN_SHARE,
    Frontier,
    default_budgets,
    fit_frontier,
    value_at,
)
from megatron_ext.scaling.parametric import fit_parametric
from megatron_ext.scaling.powerlaw import PowerLaw
from megatron_ext.scaling.study import Convention
from megatron_ext.scaling.sweeps import Sweep, fit_sweep

CONVENTIONS: tuple[Convention, ...] = ("paper", "6p")


def checked(table: pd.DataFrame) -> pd.DataFrame:
    """Usable rows: finite losses of runs that did not diverge; `ValueError` for double rows."""
    double = table[table.duplicated(["run", "step"])]
    if len(double):
        raise ValueError(
            f"the table has {double.iloc[0]['run']} at step {double.iloc[0]['step']} twice; "
            "collect it again."
        )
    usable = table[(table["state"] != "diverged") & np.isfinite(table["loss"])]
    if usable.empty:
        raise ValueError("the table has no finite loss of a run that did not diverge.")
    return usable


def fit_all(
    table: pd.DataFrame,
    budgets: dict[str, np.ndarray] | None = None,
    min_tokens: float = 0.0,
    num_draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All fits of a table; see the module's text. `budgets` by convention, found when absent."""
    table = checked(table)
    constant = table[(table["parent"] == "") & (table["tokens"] >= min_tokens)]
    found = {c: default_budgets(constant, c) for c in CONVENTIONS}
    budgets = {**found, **(budgets or {})}
    noises = {}
    for noise, own in constant.groupby("noise", sort=False):
        noises[str(noise)] = {
            "frontier": {
                c: frontier_dict(fit_frontier(own, budgets[c], c, num_draws, seed))
                for c in CONVENTIONS
            },
            "parametric": asdict(
                fit_parametric(best_settings(own), min_tokens, max(num_draws // 5, 50), seed)
            ),
            "sweep": sweep_dict(largest_sweep(own), num_draws, seed),
        }
    return {
        "min_tokens": min_tokens, "num_draws": num_draws,
        "budgets": {c: [float(b) for b in budgets[c]] for c in CONVENTIONS},
        "noises": noises, "gaps": gaps(constant),
        "anneal": {
            str(noise): asdict(anneal_gain(own))
            for noise, own in table.groupby("noise", sort=False)
        },
    }  # fmt: skip


def frontier_dict(frontier: Frontier) -> dict[str, Any]:
    tree = asdict(frontier)
    tree["laws"] = {name: law.as_dict() for name, law in frontier.laws.items()}
    for minimum, entry in zip(frontier.minima, tree["minima"], strict=True):
        entry["is_identified"] = minimum.is_identified
    return tree


def best_settings(table: pd.DataFrame) -> pd.DataFrame:
    """Of each size the (batch size, learning rate) of the lowest final loss, all its seeds."""
    finals = table.loc[table.groupby("run")["tokens"].idxmax()]
    kept = []
    for _, own in finals.groupby("size"):
        by_setting = own.groupby(["batch_size", "learning_rate"])
        longest = by_setting["tokens"].max()
        candidates = by_setting["loss"].mean()[longest > 0.9 * longest.max()]
        batch, rate = candidates.idxmin()
        chosen = own[(own["batch_size"] == batch) & (own["learning_rate"] == rate)]
        kept += list(chosen["run"])
    return table[table["run"].isin(kept)]


def largest_sweep(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the size with the most (batch size, learning rate) pairs."""
    settings = table.drop_duplicates(["size", "batch_size", "learning_rate"])
    return table[table["size"] == settings["size"].value_counts().idxmax()]


def sweep_dict(table: pd.DataFrame, num_draws: int, seed: int) -> dict[str, Any]:
    spans = table.groupby("run")["tokens"].agg(["min", "max"])
    low, high = spans["min"].max(), spans["max"].min()
    if not low < high:
        return asdict(Sweep(refusals=["the runs share no horizon"]))
    sweep = fit_sweep(table, np.geomspace(low, high, 6), num_draws, seed)
    tree = asdict(sweep)
    tree["size"] = str(table["size"].iloc[0])
    tree["laws"] = {name: law.as_dict() for name, law in sweep.laws.items()}
    return tree


def gaps(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Loss of one noise type over another's at the same size and tokens, the latest they share.

    The geometric mean over sizes with a 95 % t interval; seeds of a size are averaged first.
    """
    at: dict[str, dict[str, float]] = {}
    best = {str(noise): best_settings(own) for noise, own in table.groupby("noise", sort=False)}
    for size in table["size"].unique():
        curves = {n: own[own["size"] == size] for n, own in best.items()}
        curves = {n: own for n, own in curves.items() if len(own)}
        horizon = min(own.groupby("run")["tokens"].max().min() for own in curves.values())
        for noise, own in curves.items():
            values = [value_at(curve, "tokens", horizon) for _, curve in own.groupby("run")]
            at.setdefault(noise, {})[str(size)] = float(np.mean(values))
    return [_gap(a, b, at) for a, b in combinations(at, 2)]


def _gap(first: str, second: str, at: dict[str, dict[str, float]]) -> dict[str, Any]:
    sizes = sorted(set(at[first]) & set(at[second]))
    logs = np.array([at[second][size] - at[first][size] for size in sizes])
    entry: dict[str, Any] = {
        "first": first, "second": second, "num_sizes": len(sizes),
        "ratio_by_size": {size: math.exp(value) for size, value in zip(sizes, logs, strict=True)},
    }  # fmt: skip
    if len(logs) < 2:
        return entry | {"ratio": None, "refusal": "one size has no interval"}
    half = student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    low, middle, high = (math.exp(v) for v in (logs.mean() - half, logs.mean(), logs.mean() + half))
    return entry | {"ratio": middle, "interval": (low, high)}


def write_fits(fits: dict[str, Any], path: Path) -> None:
    """JSON with seven digits; absent numbers are null."""
    path.write_text(json.dumps(_rounded(fits), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def read_fits(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no {path}; run `fit` first.")
    return json.loads(path.read_text())


def _span(interval: Any, digits: int = 4) -> str:
    low, high = (math.nan if v is None else v for v in interval)
    return f"[{low:.{digits}g}, {high:.{digits}g}]"


def _optima(noise: str, rates: list[dict[str, Any]]) -> Iterator[str]:
    """Best learning rates at the largest horizon, or that they are not inside the sweep."""
    last = max((rate["tokens"] for rate in rates), default=0)
    for rate in rates:
        if rate["tokens"] == last:
            where = f"{noise}: best learning rate at {rate['batch_tokens']:g} tokens a batch"
            if rate["share_inside"] >= MIN_SHARE:
                yield f"{where} {rate['value']:.3g} {_span(rate['interval'], 3)}"
            else:
                yield f"{where}: inside the sweep in {rate['share_inside']:.0%} of the resamples"


def summary(fits: dict[str, Any]) -> Iterator[str]:
    """Lines for the console: every law with its interval, every refusal with its reason."""
    for noise, entry in fits["noises"].items():
        for convention, frontier in entry["frontier"].items():
            yield f"{noise}, C by {convention}:"
            for name, tree in frontier["laws"].items():
                law = PowerLaw.from_dict(tree)
                of = "D" if name == "L_of_D" else "C"
                quality = "" if law.r_squared is None else f", R2 {law.r_squared:.4f}"
                yield (
                    f"  {name.split('_')[0]}*({of}) exponent {law.alpha:.4f} "
                    f"{_span(law.alpha_interval)}{quality}"
                )
            for name, held in frontier["holdout"].items():
                yield (
                    f"  held out {held['budget']:.3g}: {name} {held['observed']:.4g}, predicted "
                    f"{held['predicted']:.4g} "
                    f"{_span((held['predicted_low'], held['predicted_high']))}"
                )
            yield from (f"  refused: {reason}" for reason in frontier["refusals"])
        parametric = entry["parametric"]
        yield f"{noise}, L(N, D) = E + A N^-a + B D^-b:"
        for name, value in parametric["values"].items():
            yield f"  {name} {value:.4g} {_span(parametric['intervals'][name])}"
        yield from (f"  refused: {reason}" for reason in parametric["refusals"])
        yield from _optima(noise, entry["sweep"]["learning_rates"])
        for name, tree in entry["sweep"]["laws"].items():
            law = PowerLaw.from_dict(tree)
            yield f"{noise}: optimal {name} exponent {law.alpha:.4f} {_span(law.alpha_interval)}"
        yield from (f"{noise}, sweep: refused: {reason}" for reason in entry["sweep"]["refusals"])
    for gap in fits["gaps"]:
        if gap["ratio"] is not None:
            yield (
                f"loss of {gap['second']} over {gap['first']}: {gap['ratio']:.4f} "
                f"{_span(gap['interval'])} over {gap['num_sizes']} sizes"
            )
    for noise, gain in fits["anneal"].items():
        if gain["ratio"] is not None:
            interval = _span(gain["interval"])
            yield f"{noise}: un-annealed over annealed {gain['ratio']:.4f} {interval}"
