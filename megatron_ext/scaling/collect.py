"""From the runs' metrics to one tidy table: a row per run and validation, with checks.

    run, size, noise, batch_size [sequences], learning_rate, seed, parameters, parent
    flops_per_token   6P + 12LdN
    step, tokens, flops, flops_6p          of the harvested horizon
    loss, loss_standard_error, bits_per_byte, train_loss   nats per token (bound)
    state             finished, started, stopped, diverged, failed
    is_final          the run's last validation

`loss_standard_error` is over validation sequences and is shared by all runs, which see the same
text and noise; differences between runs are far more exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from megatron_ext.scaling.ladder import Plan, Run
from megatron_ext.scaling.launch import read_metrics, state_of

DIVERGED_RATIO = 1.2
"""A run whose last bound exceeds its best by this factor counts as diverged."""


@dataclass
class Checks:
    """What is wrong with the runs, by run name."""

    unfinished: dict[str, str] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    duplicated: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        return [
            f"{kind}: {name}: {text}"
            for kind in ("unfinished", "diverged", "duplicated")
            for name, text in getattr(self, kind).items()
        ] or ["every run is finished, none diverged, no record is double"]


def _rows(run: Run, checks: Checks) -> list[dict]:
    records, state = read_metrics(run.folder), state_of(run)
    validations: dict[int, dict] = {}
    double = set()
    train_loss, by_step = math.nan, {}
    for record in records:
        step = record["step"]
        train_loss = record.get("train/elbo", train_loss)
        if "valid/elbo" in record:
            if step in validations and validations[step]["valid/elbo"] != record["valid/elbo"]:
                double.add(step)
            validations[step] = record
            by_step[step] = train_loss
    if double:
        # A run that was interrupted repeats the steps since its checkpoint; the later record holds.
        checks.duplicated[run.name] = f"different validations at steps {sorted(double)}"
    losses = [validations[step]["valid/elbo"] for step in sorted(validations)]
    if state == "diverged" or _has_diverged(losses):
        state = "diverged"
        checks.diverged[run.name] = f"last bound {losses[-1]:.4g}" if losses else "no validation"
    elif state != "finished":
        at = max((record["step"] for record in records), default=0)
        checks.unfinished[run.name] = f"{state} at step {at} of {run.steps}"
    step_tokens = run.tokens // run.steps
    return [
        {
            "run": run.name, "size": run.size, "noise": run.noise, "batch_size": run.batch_size,
            "learning_rate": run.learning_rate, "seed": run.seed, "parent": run.parent or "",
            "parameters": run.parameters, "flops_per_token": run.flops_per_token,
            "batch_tokens": step_tokens, "step": step, "tokens": step * step_tokens,
            "flops": step * step_tokens * run.flops_per_token,
            "flops_6p": step * step_tokens * 6.0 * run.parameters,
            "loss": record["valid/elbo"],
            "loss_standard_error": record.get("valid/elbo_standard_error", math.nan),
            "bits_per_byte": record.get("valid/bits_per_byte", math.nan),
            "train_loss": by_step[step], "state": state, "is_final": step == run.steps,
        }
        for step, record in sorted(validations.items())
    ]  # fmt: skip


def _has_diverged(losses: list[float]) -> bool:
    if not losses:
        return False
    return not math.isfinite(losses[-1]) or losses[-1] > DIVERGED_RATIO * min(losses)


def collect(plan: Plan) -> tuple[pd.DataFrame, Checks]:
    """The table of a plan's runs and what to know about it.

    Raises `ValueError` where no run has a validation yet.
    """
    checks = Checks()
    rows = [row for run in plan.runs for row in _rows(run, checks)]
    if not rows:
        raise ValueError(f"{plan.output}: no run has a validation yet; run `launch` first.")
    table = pd.DataFrame(rows)
    return table, checks


def write_table(table: pd.DataFrame, path: Path) -> None:
    """CSV or parquet, by the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False, float_format="%.8g")
    else:
        raise ValueError(f"--table is {path}: give a name that ends in .csv or .parquet.")


def read_table(path: Path) -> pd.DataFrame:
    """A table that `write_table` wrote."""
    if not path.is_file():
        raise ValueError(f"there is no {path}; run `collect` first.")
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    table = pd.read_csv(path)
    # A column without any parent is read as numbers.
    table["parent"] = table["parent"].astype(object).fillna("")
    return table
