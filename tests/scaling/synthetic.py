"""Tables of made-up runs whose laws are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

SIZES = np.array([3e4, 8e4, 2e5, 5e5, 1.2e6])
TOP = 4e12
BUDGETS = TOP / 2.0 ** np.arange(4, -1, -1)
Law = Callable[[float, np.ndarray], np.ndarray]


def log_quadratic(size: float, tokens: np.ndarray) -> np.ndarray:
    """Iso-FLOP curves that are parabolas in logs: P* ~ C^0.6, L* ~ C^-0.05."""
    compute = 6 * size * tokens
    best = 2e5 * (compute / 1e12) ** 0.6
    return 5 * (compute / 1e12) ** -0.05 * np.exp(0.03 * np.log(size / best) ** 2)


PARAMETRIC = {"A": 30.0, "a": 0.35, "B": 400.0, "b": 0.4, "E": 2.0}


def parametric(size: float, tokens: np.ndarray) -> np.ndarray:
    p = PARAMETRIC
    return p["E"] + p["A"] * size ** -p["a"] + p["B"] * tokens ** -p["b"]


def runs_of(
    law: Law,
    rng: np.random.Generator,
    *,
    run_noise: float = 0.0,
    point_noise: float = 0.0,
    seeds: int = 1,
    sizes: np.ndarray = SIZES,
    noise: str = "masked",
) -> pd.DataFrame:
    """Runs to the same compute, 24 validations each; noise of log loss per run and per point."""
    rows = []
    for size in sizes:
        tokens = np.arange(1, 25) / 24 * TOP / (6 * size)
        for seed in range(seeds):
            scatter = run_noise * rng.standard_normal() + point_noise * rng.standard_normal(24)
            losses = law(size, tokens) * np.exp(scatter)
            for step, (horizon, loss) in enumerate(zip(tokens, losses, strict=True), 1):
                flops = horizon * 6 * size
                rows.append(
                    {
                        "run": f"{noise}-{size:g}-s{seed}", "size": f"{size:g}", "noise": noise,
                        "batch_size": 8, "batch_tokens": 1024, "learning_rate": 0.1, "seed": seed,
                        "parent": "", "parameters": size, "flops_per_token": 6 * size,
                        "step": step, "tokens": horizon, "flops": flops, "flops_6p": flops,
                        "loss": loss, "state": "finished", "is_final": step == 24,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def sweep_runs(
    rng: np.random.Generator, point_noise: float, batches: tuple[int, ...], rates: tuple[float, ...]
) -> pd.DataFrame:
    """A sweep at one size with eta* = 1e-3 B^0.4 and B* = 2e-2 D^0.8 (B, D in tokens)."""
    rows = []
    tokens = np.geomspace(2e5, 6.4e6, 12)
    for batch in batches:
        for rate in rates:
            best_rate, best_batch = 1e-3 * batch**0.4, 2e-2 * tokens**0.8
            loss = (
                3
                * tokens**-0.02
                * np.exp(
                    0.02 * np.log(rate / best_rate) ** 2 + 0.01 * np.log(batch / best_batch) ** 2
                )
            )
            loss *= np.exp(point_noise * rng.standard_normal(len(tokens)))
            for horizon, value in zip(tokens, loss, strict=True):
                rows.append(
                    {
                        "run": f"b{batch}-lr{rate:g}", "size": "s", "noise": "masked",
                        "batch_size": batch // 128, "batch_tokens": batch, "learning_rate": rate,
                        "tokens": horizon, "loss": value,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)
