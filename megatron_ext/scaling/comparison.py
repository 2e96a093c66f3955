"""Runs side by side: curves with bands over seeds, final differences with intervals.

A variant is a set of runs that differ in their seed alone. Runs of two variants with the same seed
see the same data in the same order and start from the same weights, so differences are taken pair
by pair where both have the seed (paired t), else between means (Welch's t). One seed has no
interval: the difference is then reported without a verdict.
"""

from __future__ import annotations

import html
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from scipy.stats import t as student

from megatron_ext.scaling.launch import read_metrics

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


@dataclass(frozen=True)
class Curve:
    """One metric of one run."""

    folder: str
    seed: int
    steps: np.ndarray
    values: np.ndarray
    settings: dict[str, Any]
    """The resolved configuration, flat: section.field."""


@dataclass(frozen=True)
class Difference:
    """Final value of a variant minus the baseline's."""

    variant: str
    num_seeds: int
    value: float
    """The variant's mean."""
    difference: float | None
    interval: tuple[float, float] | None
    is_paired: bool

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return "baseline"
        if self.interval is None:
            return "one seed: no verdict"
        low, high = self.interval
        return "lower" if high < 0 else "higher" if low > 0 else "no difference shown"


def read_curve(folder: str | Path, metric: str) -> Curve:
    """A metric of a run's metrics.jsonl; the later of two records of a step holds."""
    path = Path(folder)
    config = path / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{path}: there is no config.yaml; give the --save folder of a run.")
    sections = yaml.safe_load(config.read_text())
    by_step = {
        record["step"]: float(record[metric]) for record in read_metrics(path) if metric in record
    }
    if not by_step:
        raise ValueError(f"{path}: metrics.jsonl has no {metric!r}.")
    steps = np.array(sorted(by_step))
    flat = {f"{s}.{name}": value for s, v in sections.items() for name, value in v.items()}
    return Curve(
        str(folder), int(sections["training"]["seed"]), steps,
        np.array([by_step[step] for step in steps]), flat,
    )  # fmt: skip


IGNORED = {"training.seed", "checkpoint.save", "checkpoint.load", "logging.tensorboard_dir"}


def read_variants(
    groups: Mapping[str, Sequence[str | Path]], metric: str
) -> dict[str, list[Curve]]:
    """Curves by variant; `ValueError` where a variant's runs differ in more than their seed."""
    variants = {}
    for name, folders in groups.items():
        curves = [read_curve(folder, metric) for folder in folders]
        for other in curves[1:]:
            keys = [key for key in different(curves[0], other) if key not in IGNORED]
            if keys:
                raise ValueError(
                    f"{name}: {curves[0].folder} and {other.folder} differ in {keys[0]}."
                )
        seeds = [curve.seed for curve in curves]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{name}: two runs have the same training.seed, {seeds}.")
        variants[name] = curves
    return variants


def different(first: Curve, second: Curve) -> list[str]:
    """Fields in which two runs' configurations differ."""
    keys = sorted(first.settings.keys() | second.settings.keys())
    return [key for key in keys if first.settings.get(key) != second.settings.get(key)]


def final_value(curve: Curve, step: int) -> float:
    """The value at a step that all runs share."""
    return float(curve.values[np.searchsorted(curve.steps, step)])


def last_common_step(variants: Mapping[str, Sequence[Curve]]) -> int:
    """The last step at which every run has the metric."""
    common = set.intersection(*(set(c.steps.tolist()) for v in variants.values() for c in v))
    if not common:
        raise ValueError("the runs have the metric at no common step; log or validate alike.")
    return max(common)


def differences(variants: Mapping[str, Sequence[Curve]], baseline: str) -> list[Difference]:
    """Every variant against `baseline` at the last common step."""
    if baseline not in variants:
        raise ValueError(f"--baseline is {baseline!r}: known are {', '.join(variants)}.")
    step = last_common_step(variants)
    finals = {
        name: {curve.seed: final_value(curve, step) for curve in curves}
        for name, curves in variants.items()
    }
    return [_difference(name, finals[name], finals[baseline], name == baseline) for name in finals]


def _difference(
    name: str, own: dict[int, float], base: dict[int, float], is_baseline: bool
) -> Difference:
    mean = float(np.mean(list(own.values())))
    if is_baseline:
        return Difference(name, len(own), mean, None, None, False)
    shared = sorted(own.keys() & base.keys())
    if len(shared) >= 2:
        gaps = np.array([own[seed] - base[seed] for seed in shared])
        half = student.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps))
        middle = float(gaps.mean())
        return Difference(name, len(own), mean, middle, (middle - half, middle + half), True)
    first, second = np.array(list(own.values())), np.array(list(base.values()))
    middle = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return Difference(name, len(own), mean, middle, None, False)
    parts = [x.var(ddof=1) / len(x) for x in (first, second)]
    total = sum(parts)
    freedom = total**2 / sum(
        p**2 / (len(x) - 1) for p, x in zip(parts, (first, second), strict=True)
    )
    half = student.ppf(0.975, freedom) * math.sqrt(total)
    return Difference(name, len(own), mean, middle, (middle - half, middle + half), False)


def table_of(results: Sequence[Difference], metric: str, step: int) -> str:
    """Text of the final differences."""
    width = max(len(result.variant) for result in results)
    lines = [f"{metric} at step {step}; difference to the baseline with 95 % interval"]
    for r in results:
        gap = "" if r.difference is None else f"{r.difference:+.4f}"
        interval = "" if r.interval is None else f"[{r.interval[0]:+.4f}, {r.interval[1]:+.4f}]"
        pairing = "paired" if r.is_paired else ""
        lines.append(
            f"{r.variant:<{width}}  seeds {r.num_seeds}  {r.value:.4f}  {gap:>8} {interval:<20} "
            f"{r.verdict} {pairing}".rstrip()
        )
    return "\n".join(lines)


def band(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Common steps, mean, and half-width of the mean's 95 % t interval (None for one seed)."""
    common = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in curves)))
    values = np.array([[final_value(curve, step) for step in common] for curve in curves])
    if len(curves) < 2:
        return np.array(common), values.mean(0), None
    factor = student.ppf(0.975, len(curves) - 1) / math.sqrt(len(curves))
    return np.array(common), values.mean(0), factor * values.std(0, ddof=1)


def write_report(
    variants: Mapping[str, Sequence[Curve]], baseline: str, metric: str, output: Path
) -> str:
    """curves.svg, curves.png and report.html in `output`; returns the table as text."""
    text = table_of(differences(variants, baseline), metric, last_common_step(variants))
    figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for color, (name, curves) in zip(plt.get_cmap("tab10").colors, variants.items(), strict=False):
        steps, mean, half = band(curves)
        panel.plot(steps, mean, lw=1.2, color=color, label=f"{name} ({len(curves)} seeds)")
        if half is not None:
            panel.fill_between(steps, mean - half, mean + half, color=color, alpha=0.2, lw=0)
    panel.set(xlabel="step", ylabel=metric)
    panel.legend(fontsize=7, frameon=False)
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "curves.svg", metadata={"Date": None})
    figure.savefig(output / "curves.png", dpi=90, metadata={"Software": None})
    plt.close(figure)
    settings = [
        f"{name}: " + ", ".join(
            f"{key} {curves[0].settings[key]!r}"
            for key in different(variants[baseline][0], curves[0]) if key not in IGNORED
        )
        for name, curves in variants.items() if name != baseline
    ]  # fmt: skip
    image = b64encode((output / "curves.png").read_bytes()).decode()
    (output / "report.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title>'
        "<style>body{font:15px sans-serif;margin:2em}pre{background:#f4f4f4;padding:1em}</style>"
        f"<h1>Comparison with {html.escape(baseline)}</h1><pre>{html.escape(text)}</pre>"
        f'<img alt="curves" src="data:image/png;base64,{image}">'
        f"<h2>What differs</h2><pre>{html.escape(chr(10).join(settings))}</pre></html>\n"
    )
    return text
