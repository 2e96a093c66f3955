"""Fits of made-up runs: the truth is recovered, intervals hold it, and the rest is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from megatron_ext.scaling.annealing import anneal_gain
from megatron_ext.scaling.fit import fit_all
from megatron_ext.scaling.frontier import default_budgets, fit_frontier
from megatron_ext.scaling.parametric import fit_parametric
from megatron_ext.scaling.powerlaw import fit_power_law, robust_lines
from megatron_ext.scaling.sweeps import fit_sweep
from tests.scaling.synthetic import (
    BUDGETS,
    PARAMETRIC,
    SIZES,
    log_quadratic,
    parametric,
    runs_of,
    sweep_runs,
)

TRUE_FRONTIER = {"M": 0.6, "P": 0.6, "D": 0.4, "L": -0.05, "L_of_D": -0.125}
BATCHES = (512, 1024, 2048, 4096, 8192)
RATES = (0.003, 0.01, 0.03, 0.1)


def joined(*tables: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True)


def at_least(hits: int, trials: int, share: float = 0.95) -> bool:
    """Whether so many hits are in keeping with a coverage of `share` (one in 1000 is not)."""
    return binom.cdf(hits, trials, share) > 1e-3


def test_frontier_of_runs_without_noise_is_exact() -> None:
    table = runs_of(log_quadratic, np.random.default_rng(0), point_noise=1e-9)
    frontier = fit_frontier(table, BUDGETS, num_draws=200)
    for name, exponent in TRUE_FRONTIER.items():
        # Losses between validations are interpolated.
        assert frontier.laws[name].alpha == pytest.approx(exponent, abs=2e-3), name
    assert frontier.laws["P"].at(1e12) == pytest.approx(2e5, rel=0.01)
    assert frontier.laws["L"].at(1e12) == pytest.approx(5.0, rel=1e-3)
    assert abs(frontier.holdout["L"]["relative_error"]) < 1e-3


@pytest.mark.parametrize(
    ("run_noise", "point_noise", "seeds"),
    [(2e-3, 2e-3, 1), (5e-3, 0, 1), (0, 5e-3, 1), (5e-3, 2e-3, 2)],
)
def test_intervals_of_the_frontier_hold_the_truth(
    run_noise: float, point_noise: float, seeds: int
) -> None:
    trials, hits = 0, dict.fromkeys(TRUE_FRONTIER, 0)
    for seed in range(60):
        table = runs_of(
            log_quadratic, np.random.default_rng(seed), run_noise=run_noise,
            point_noise=point_noise, seeds=seeds,
        )  # fmt: skip
        laws = fit_frontier(table, BUDGETS, num_draws=300, seed=seed).laws
        if laws:
            trials += 1
            for name, exponent in TRUE_FRONTIER.items():
                low, high = laws[name].alpha_interval
                hits[name] += low <= exponent <= high
    assert trials >= 55
    for name, count in hits.items():
        assert at_least(count, trials), (name, count, trials)


def test_intervals_of_the_frontier_shrink_with_seeds() -> None:
    widths = []
    for seeds in (1, 8):
        table = runs_of(
            log_quadratic, np.random.default_rng(1), run_noise=4e-3, point_noise=2e-3, seeds=seeds
        )
        low, high = fit_frontier(table, BUDGETS).laws["M"].alpha_interval
        widths.append(high - low)
    assert widths[1] < 0.7 * widths[0]


def test_frontier_picks_the_best_setting_of_each_size() -> None:
    table = runs_of(log_quadratic, np.random.default_rng(0), point_noise=1e-9)
    worse = table.assign(run=table["run"] + "-worse", learning_rate=0.9, loss=table["loss"] * 1.1)
    both = fit_frontier(joined(table, worse), BUDGETS, num_draws=50)
    assert both.laws["L"].at(1e12) == pytest.approx(5.0, rel=1e-3)


def test_frontier_without_minima_inside_the_sizes_is_refused() -> None:
    def smaller_is_better(size: float, tokens: np.ndarray) -> np.ndarray:
        return 5 * tokens**-0.03

    table = runs_of(smaller_is_better, np.random.default_rng(0), point_noise=1e-3)
    frontier = fit_frontier(table, BUDGETS)
    assert not frontier.laws
    assert any("inside them" in reason for reason in frontier.refusals)


def test_frontier_of_three_sizes_has_nothing_to_judge_by_and_is_refused() -> None:
    table = runs_of(log_quadratic, np.random.default_rng(0), sizes=SIZES[1:4])
    frontier = fit_frontier(table, BUDGETS)
    assert not frontier.laws
    assert "fourth size" in frontier.refusals[0]


def test_budgets_are_found_where_three_sizes_have_losses() -> None:
    table = runs_of(log_quadratic, np.random.default_rng(0))
    budgets = default_budgets(table, "paper")
    spans = table.groupby("run")["flops"].agg(["min", "max"])
    assert len(budgets) >= 4
    for budget in budgets:
        assert ((spans["min"] <= budget * 1.001) & (spans["max"] >= budget * 0.999)).sum() >= 3


def test_parametric_law_without_noise_is_exact() -> None:
    table = runs_of(parametric, np.random.default_rng(0), point_noise=1e-8)
    law = fit_parametric(table, min_tokens=5e5, num_draws=20)
    for name, value in PARAMETRIC.items():
        assert law.values[name] == pytest.approx(value, rel=0.05), name
    assert law.at(2e5, 3e6) == pytest.approx(float(parametric(2e5, np.array(3e6))), rel=1e-3)


def test_intervals_of_the_parametric_law_hold_the_truth() -> None:
    names = {**PARAMETRIC, "exponent_N": 0.4 / 0.75}
    trials, hits = 0, dict.fromkeys(("a", "b", "E", "exponent_N"), 0)
    for seed in range(14):
        table = runs_of(
            parametric, np.random.default_rng(seed), run_noise=2e-3, point_noise=1e-3, seeds=2
        )
        law = fit_parametric(table, min_tokens=2e5, num_draws=60, seed=seed)
        if law.values:
            trials += 1
            for name in hits:
                low, high = law.intervals[name]
                hits[name] += low <= names[name] <= high
    assert trials >= 12
    for name, count in hits.items():
        # Of few runs the law is far from linear: simulated coverage is 85 to 97 %.
        assert at_least(count, trials, 0.85), (name, count, trials)


def test_parametric_law_of_a_loss_without_size_is_refused() -> None:
    def no_size(size: float, tokens: np.ndarray) -> np.ndarray:
        return 2 + 400 * tokens**-0.4

    table = runs_of(no_size, np.random.default_rng(0), run_noise=2e-3, point_noise=1e-3)
    law = fit_parametric(table, min_tokens=2e5, num_draws=60)
    assert not law.values
    assert any("exponent a of size" in reason for reason in law.refusals)


def test_sweep_recovers_optimal_rate_and_batch() -> None:
    horizons = np.geomspace(2.1e5, 6e6, 6)
    for seed in range(3):
        table = sweep_runs(np.random.default_rng(seed), 5e-4, BATCHES, RATES)
        sweep = fit_sweep(table, horizons, seed=seed)
        for name, exponent in {"learning_rate": 0.4, "batch_tokens": 0.8}.items():
            low, high = sweep.laws[name].alpha_interval
            assert low - 0.02 <= exponent <= high + 0.02, (name, low, high)
            assert high - low < 0.4
        assert sweep.laws["learning_rate"].at(2048) == pytest.approx(1e-3 * 2048**0.4, rel=0.15)


@pytest.mark.parametrize(
    ("batches", "rates", "reason"),
    [
        (BATCHES, (0.01, 0.02), "2 learning rates"),
        ((1024, 2048), RATES, "at no horizon do three batch sizes"),
        (BATCHES, (0.3, 0.6, 1.2, 2.4), "inside the sweep"),
    ],
)
def test_sweep_with_its_optimum_outside_is_refused(
    batches: tuple, rates: tuple, reason: str
) -> None:
    table = sweep_runs(np.random.default_rng(0), 5e-4, batches, rates)
    sweep = fit_sweep(table, np.geomspace(2.1e5, 6e6, 6))
    assert not sweep.laws
    assert any(reason in text for text in sweep.refusals), sweep.refusals


def test_anneal_gain_is_the_ratio_with_an_interval() -> None:
    table = runs_of(log_quadratic, np.random.default_rng(0))
    ends = table[table["is_final"]].copy()
    rng = np.random.default_rng(3)
    ends["loss"] /= 1.0245 * np.exp(1e-3 * rng.standard_normal(len(ends)))
    ends["parent"], ends["run"] = ends["run"], ends["run"] + "-anneal"
    gain = anneal_gain(joined(table, ends))
    assert gain.interval is not None
    assert gain.interval[0] <= 1.0245 <= gain.interval[1]
    assert gain.interval[1] - gain.interval[0] < 0.006
    assert anneal_gain(joined(table, ends.iloc[:1])).refusals


def test_power_law_survives_an_outlier() -> None:
    x = np.geomspace(1, 1e4, 12)
    y = 3 * x**0.5
    y[4] *= 5
    law = fit_power_law(x, y, num_draws=400)
    assert law.alpha == pytest.approx(0.5, abs=0.01)
    assert law.coefficient == pytest.approx(3, rel=0.05)
    plain = np.polyfit(np.log(x), np.log(y), 1)
    assert abs(plain[0] - 0.5) > 0.01


def test_lines_of_many_rows_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(size=(5, 9))
    together = robust_lines(x, y)
    for row, line in zip(y, together, strict=True):
        np.testing.assert_allclose(robust_lines(x, row), line, rtol=1e-12)


def test_all_fits_of_a_table_compare_noise_types() -> None:
    rng = np.random.default_rng(0)
    table = runs_of(log_quadratic, rng, point_noise=1e-3)
    other = runs_of(log_quadratic, rng, point_noise=1e-3, noise="uniform")
    other["loss"] *= 1.03
    fits = fit_all(joined(table, other), {"paper": BUDGETS, "6p": BUDGETS}, num_draws=100)
    (gap,) = fits["gaps"]
    assert (gap["first"], gap["second"]) == ("masked", "uniform")
    assert gap["interval"][0] < 1.03 < gap["interval"][1]
    assert gap["interval"][1] - gap["interval"][0] < 0.01
    with pytest.raises(ValueError, match="twice"):
        fit_all(joined(table, table.iloc[:1]))
