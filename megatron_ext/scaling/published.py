"""The paper's scaling laws as `PowerLaw`s; numbers and their source are in published.json.

Published are A and alpha of y = A C^alpha to five digits and intervals of alpha for one table. A
law's interval away from the data follows from alpha's, turned about the middle of the fitted range
of C; the uncertainty of the level there is not published, so intervals are too narrow near it.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from megatron_ext.scaling.powerlaw import Z95, PowerLaw

Z99 = 2.5758293035489004
FITTED_RANGE = (5e17, 2e20)
"""FLOPs of the paper's fits."""
TOKENS_RANGE = (1e9, 4e10)
"""Tokens of the paper's sweep, about: 5,000 to 80,000 steps of 8 to 512 sequences of 2048."""


@cache
def published() -> dict[str, Any]:
    """The data file."""
    return json.loads((Path(__file__).parent / "published.json").read_text())


def noise_names() -> list[str]:
    return list(published()["mixing_shift"])


def _law(
    coefficient: float, alpha: float, half_width: float, z: float, x_range: tuple[float, float]
) -> PowerLaw:
    pivot = math.sqrt(x_range[0] * x_range[1])
    return PowerLaw(
        pivot=pivot, level=math.log(coefficient) + alpha * math.log(pivot), alpha=alpha,
        covariance=((0.0, 0.0), (0.0, (half_width / z) ** 2)),
        alpha_interval=(alpha - half_width * Z95 / z, alpha + half_width * Z95 / z),
        x_range=x_range,
    )  # fmt: skip


def compute_laws(
    noise: str, convention: str = "paper", minima: str = "fitted"
) -> dict[str, PowerLaw]:
    """L, D, M, P against C of a noise type.

    Intervals are the published ones of the table (paper, fitted); the other tables take them over.
    P's is M's. A of P has one or two digits, so P is derived from M where it can be (`predict`).
    """
    data = published()
    if noise not in data["mixing_shift"]:
        raise ValueError(f"--noise is {noise!r}: published are {', '.join(noise_names())}.")
    row = data["laws_of_compute"]["tables"][f"{convention}, {minima} minima"][noise]
    widths = data["laws_of_compute"]["interval_95_of_alpha"]
    half = {name: max(widths["L" if name == "L" else "M"][noise]) for name in ("L", "D", "M", "P")}
    return {name: _law(row[name][0], row[name][1], half[name], Z95, FITTED_RANGE) for name in row}


def batch_law(noise: str) -> PowerLaw:
    """Optimal batch in tokens against training tokens."""
    entry = published()["batch_tokens_of_tokens"][noise]
    return _law(_coefficient(entry), entry["exponent"], entry["half_width_99"], Z99, TOKENS_RANGE)


def learning_rate_law(noise: str) -> PowerLaw:
    """Optimal base learning rate against batch in tokens."""
    entry = published()["learning_rate_of_batch_tokens"][noise]
    batches = (8 * 2048.0, 512 * 2048.0)
    return _law(_coefficient(entry), entry["exponent"], entry["half_width_99"], Z99, batches)


def _coefficient(entry: dict[str, float]) -> float:
    if "ln_intercept" in entry:
        return math.exp(entry["ln_intercept"])
    return 10.0 ** entry["log10_coefficient"]


def anneal_ratio() -> float:
    """Un-annealed over annealed loss."""
    return published()["anneal_gain"]["ratio"]
