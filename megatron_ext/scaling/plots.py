"""Figures of a fit: iso-FLOP curves, frontiers, residuals, sweeps, and one HTML page of them.

Every figure is written as SVG and PNG. Bands and bars are 95 %. What a fit refused is not drawn;
its reasons are on the page.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from megatron_ext.scaling.fit import checked, summary  # noqa: E402
from megatron_ext.scaling.frontier import iso_losses  # noqa: E402
from megatron_ext.scaling.powerlaw import PowerLaw  # noqa: E402

STYLE = {
    "figure.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "scaling", "legend.frameon": False,
}  # fmt: skip
PER_TOKEN = {"paper": "FLOPs per token, 6P + 12LdN", "6p": "FLOPs per token, 6P"}


def iso_flop_figure(table: pd.DataFrame, fits: dict[str, Any], convention: str) -> Figure:
    """Loss against model size at each budget, a panel per noise type, minima with intervals."""
    noises = list(fits["noises"])
    figure, panels = plt.subplots(
        1, len(noises), figsize=(3.4 * len(noises), 3.2), squeeze=False, layout="constrained"
    )
    for panel, noise in zip(panels[0], noises, strict=True):
        minima = fits["noises"][noise]["frontier"][convention]["minima"]
        own = table[table["noise"] == noise]
        budgets = np.array([m["budget"] for m in minima])
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, max(len(budgets), 1)))
        iso = iso_losses(own, budgets, convention) if len(budgets) else None  # type: ignore[arg-type]
        for c, (minimum, color) in enumerate(zip(minima, colors, strict=False)):
            assert iso is not None
            x, y = iso.flops_per_token, np.exp(iso.log_loss[:, c])
            panel.plot(x, y, "o", ms=3, color=color, label=f"{minimum['budget']:.2g}")
            grid = np.geomspace(x[np.isfinite(y)].min(), x[np.isfinite(y)].max(), 60)
            c0, c1, c2 = minimum["coefficients"]
            log_x = np.log(grid)
            curve = np.exp(c0 + c1 * log_x + c2 * log_x**2)
            panel.plot(grid, curve, "-" if minimum["is_identified"] else ":", lw=1, color=color)
            if minimum["is_identified"]:
                low, high = minimum["intervals"]["flops_per_token"]
                panel.errorbar(
                    minimum["flops_per_token"], minimum["loss"],
                    xerr=[[minimum["flops_per_token"] - low], [high - minimum["flops_per_token"]]],
                    fmt="D", ms=4, color="black", lw=1,
                )  # fmt: skip
        panel.set(xscale="log", xlabel=PER_TOKEN[convention], title=noise)
        if minima:
            panel.legend(title="C", fontsize=7, title_fontsize=7)
    panels[0][0].set_ylabel("validation bound [nats/token]")
    return figure


def frontier_figure(fits: dict[str, Any], convention: str) -> Figure | None:
    """L*, M*, D* against C per noise type: minima with intervals, laws with bands."""
    drawn = {
        noise: entry["frontier"][convention]
        for noise, entry in fits["noises"].items()
        if any(m["is_identified"] for m in entry["frontier"][convention]["minima"])
    }
    if not drawn:
        return None
    names = {"L": ("loss", "L* [nats/token]"), "M": ("flops_per_token", "M* [FLOPs/token]"),
             "D": ("tokens", "D* [tokens]")}  # fmt: skip
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.3), layout="constrained")
    for color, (noise, frontier) in zip(plt.get_cmap("tab10").colors, drawn.items(), strict=False):
        for panel, (law_name, (key, label)) in zip(panels, names.items(), strict=True):
            for minimum in frontier["minima"]:
                if minimum["is_identified"]:
                    low, high = minimum["intervals"][key]
                    panel.errorbar(
                        minimum["budget"], minimum[key],
                        yerr=[[max(minimum[key] - low, 0)], [max(high - minimum[key], 0)]],
                        fmt="o", ms=3, lw=1, color=color,
                    )  # fmt: skip
            if law_name in frontier["laws"]:
                _draw_law(panel, PowerLaw.from_dict(frontier["laws"][law_name]), color, noise)
            panel.set(xscale="log", yscale="log", xlabel="C [FLOPs]", ylabel=label)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(fontsize=7)
    return figure


def _draw_law(panel: Any, law: PowerLaw, color: Any, label: str) -> None:
    x = np.geomspace(law.x_range[0] / 1.5, law.x_range[1] * 1.5, 50)
    bands = np.array([law.interval(v) for v in x])
    alpha = f"{label}: {law.alpha:.3f} [{law.alpha_interval[0]:.3f}, {law.alpha_interval[1]:.3f}]"
    panel.plot(x, [law.at(v) for v in x], lw=1, color=color, label=alpha)
    panel.fill_between(x, bands[:, 0], bands[:, 1], color=color, alpha=0.15, lw=0)


def curves_figure(table: pd.DataFrame) -> Figure:
    """Loss against tokens of every un-annealed run, a panel per noise type, colour by size."""
    noises = list(table["noise"].unique())
    sizes = list(table.sort_values("parameters")["size"].unique())
    colors = dict(zip(sizes, plt.get_cmap("plasma")(np.linspace(0, 0.9, len(sizes))), strict=True))
    figure, panels = plt.subplots(
        1, len(noises), figsize=(3.0 * len(noises), 3.0), squeeze=False, layout="constrained"
    )
    for panel, noise in zip(panels[0], noises, strict=True):
        for _, curve in table[table["noise"] == noise].groupby("run", sort=False):
            size = curve["size"].iloc[0]
            known = panel.get_legend_handles_labels()[1]
            panel.plot(
                curve["tokens"], curve["loss"], lw=1, color=colors[size],
                label=None if size in known else size,
            )  # fmt: skip
        panel.set(xscale="log", xlabel="tokens", title=noise)
    panels[0][0].set_ylabel("validation bound [nats/token]")
    panels[0][0].legend(fontsize=7)
    return figure


def residual_figure(table: pd.DataFrame, fits: dict[str, Any], convention: str) -> Figure:
    """What the iso-FLOP parabolas leave, in percent of the loss, against model size."""
    figure, panel = plt.subplots(figsize=(5, 3), layout="constrained")
    for color, (noise, entry) in zip(
        plt.get_cmap("tab10").colors, fits["noises"].items(), strict=False
    ):
        minima = entry["frontier"][convention]["minima"]
        if not minima:
            continue
        budgets = np.array([m["budget"] for m in minima])
        iso = iso_losses(table[table["noise"] == noise], budgets, convention)  # type: ignore[arg-type]
        x = np.log(iso.flops_per_token)[:, None]
        c = np.array([m["coefficients"] for m in minima])
        rest = 100 * np.expm1(iso.log_loss - (c[:, 0] + c[:, 1] * x + c[:, 2] * x**2))
        for i, row in enumerate(rest):
            panel.plot(
                np.full(len(row), iso.flops_per_token[i]), row, ".", ms=4, color=color,
                label=noise if i == 0 else None,
            )  # fmt: skip
    panel.axhline(0, lw=0.5, color="black")
    panel.set(xscale="log", xlabel=PER_TOKEN[convention], ylabel="residual [% of loss]")
    panel.legend(fontsize=7)
    return figure


def sweep_figure(table: pd.DataFrame) -> Figure | None:
    """Final loss against learning rate by noise type and batch size, where there is a sweep."""
    finals = table.loc[table.groupby("run")["tokens"].idxmax()]
    rates = finals.groupby(["noise", "size", "batch_size"])["learning_rate"].nunique()
    groups = rates[rates >= 3].index
    if not len(groups):
        return None
    figure, panel = plt.subplots(figsize=(5, 3.3), layout="constrained")
    for noise, size, batch in groups:
        own = finals[
            (finals["noise"] == noise) & (finals["size"] == size) & (finals["batch_size"] == batch)
        ]
        means = own.groupby("learning_rate")["loss"].mean()
        panel.plot(
            means.index, means / means.min(), "o-", ms=3, lw=1, label=f"{noise} {size} b{batch}"
        )
    panel.set(xscale="log", xlabel="base learning rate", ylabel="final loss over the best")
    panel.legend(fontsize=7)
    return figure


def figures(table: pd.DataFrame, fits: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """All figures that the fits allow, by file name."""
    constant = checked(table)
    constant = constant[(constant["parent"] == "") & (constant["tokens"] >= fits["min_tokens"])]
    with plt.rc_context(STYLE):
        yield "curves", curves_figure(constant)
        for convention in ("paper", "6p"):
            yield f"isoflop-{convention}", iso_flop_figure(constant, fits, convention)
            frontier = frontier_figure(fits, convention)
            if frontier is not None:
                yield f"frontier-{convention}", frontier
        yield "residuals", residual_figure(constant, fits, "paper")
        sweep = sweep_figure(constant)
        if sweep is not None:
            yield "sweep", sweep


def write_figures(table: pd.DataFrame, fits: dict[str, Any], folder: Path) -> Path:
    """SVG and PNG of every figure, and report.html that holds them and the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for name, figure in figures(table, fits):
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        images.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    text = html.escape("\n".join(summary(fits)))
    page = folder / "report.html"
    page.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Scaling study</title>'
        "<style>body{font:15px sans-serif;margin:2em;max-width:1100px}img{max-width:100%}"
        "pre{background:#f4f4f4;padding:1em;overflow:auto}</style>"
        f"<h1>Scaling study</h1><pre>{text}</pre>{''.join(images)}</html>\n"
    )
    return page
