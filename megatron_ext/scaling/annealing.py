"""What cooling down is worth: un-annealed over annealed loss at the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import t as student

from megatron_ext.scaling.frontier import value_at


@dataclass
class AnnealGain:
    """Geometric mean of the ratio with a 95 % t interval over branches."""

    ratio: float | None = None
    interval: tuple[float, float] | None = None
    num_branches: int = 0
    refusals: list[str] = field(default_factory=list)
    branches: list[dict] = field(default_factory=list)
    """run, tokens, ratio."""


def anneal_gain(table: pd.DataFrame) -> AnnealGain:
    """From a table with branches (`parent` given) and the runs that they branched from."""
    result = AnnealGain()
    ends = table[(table["parent"] != "") & table["is_final"]]
    for _, end in ends.iterrows():
        parent = table[table["run"] == end["parent"]]
        unannealed = value_at(parent, "tokens", end["tokens"]) if len(parent) else np.nan
        if np.isfinite(unannealed):
            ratio = float(np.exp(unannealed) / end["loss"])
            result.branches.append(
                {"run": end["run"], "tokens": float(end["tokens"]), "ratio": ratio}
            )
    result.num_branches = len(result.branches)
    # Branches of one run share its luck: a run counts once.
    runs = pd.DataFrame(result.branches)
    if result.num_branches:
        parents = ends.set_index("run")["parent"]
        logs = np.log(runs["ratio"]).groupby(runs["run"].map(parents)).mean().to_numpy()
    if result.num_branches == 0 or len(logs) < 2:
        result.refusals.append(
            f"{result.num_branches} annealed branches of un-annealed runs; two such runs are needed"
        )
        return result
    half = student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    middle = logs.mean()
    result.ratio = float(np.exp(middle))
    result.interval = (float(np.exp(middle - half)), float(np.exp(middle + half)))
    return result
