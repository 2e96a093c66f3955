"""The CompleteP checks as reports: console lines, JSON and figures, verdicts.

Figures are SVG and PNG with the standard parameterisation beside CompleteP on the same axes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from megatron_ext.config import Config  # noqa: E402
from megatron_ext.training.completep import (  # noqa: E402
    Shape,
    best_rates,
    coordinates,
    grid_steps_moved,
    rates,
    slopes,
)

KINDS = {"completep": "-", "standard": "--"}
FLAT = 0.3
"""Largest exponent of an update's size in width or depth that counts as none."""


def shapes_of(widths: Sequence[int], depths: Sequence[int], head_width: int) -> list[Shape]:
    """Every width at the first depth, then the first width at the other depths."""
    pairs = [(w, depths[0]) for w in widths] + [(widths[0], d) for d in depths[1:]]
    return [Shape(width, depth, head_width) for width, depth in pairs]


def check_coordinates(
    config: Config, shapes: Sequence[Shape], lr: float, steps: int, output: Path
) -> bool:
    """True where CompleteP's movement is flat in width and depth; writes coordinates.*."""
    rows: list[dict] = []
    is_flat = True
    for kind in KINDS:
        own = coordinates(config, shapes, kind, steps, lr)  # type: ignore[arg-type]
        rows += own
        for axis in ("width", "depth"):
            found = slopes(own, axis)  # type: ignore[arg-type]
            flat = all(abs(slope) <= FLAT for slope in found.values())
            is_flat &= flat or kind == "standard"
            text = ", ".join(f"{name} {slope:+.2f}" for name, slope in found.items())
            print(f"{kind}: exponent in {axis}: {text}: {'flat' if flat else 'NOT FLAT'}")
    _write(output, "coordinates", rows, coordinate_figure)
    return is_flat


def check_rates(
    config: Config, shapes: Sequence[Shape], grid: Sequence[float], steps: int, output: Path
) -> bool:
    """True where CompleteP's best rate moves by less than a grid step; writes rates.*."""
    rows: list[dict] = []
    transfers = True
    for kind in KINDS:
        own = rates(config, shapes, kind, steps, grid)  # type: ignore[arg-type]
        rows += own
        best = best_rates(own)
        for item in best:
            edge = "" if item.is_inside else "  at the edge of the grid"
            print(f"{kind}: width {item.width} depth {item.depth}: best {item.lr:.3g}{edge}")
        moved = grid_steps_moved(best, grid)
        good = moved < 1 and all(item.is_inside for item in best)
        transfers &= good or kind == "standard"
        print(f"{kind}: the best rate moves by {moved:.2f} grid steps")
    _write(output, "rates", rows, rate_figure)
    return transfers


def _write(
    output: Path, name: str, rows: list[dict], draw: Callable[[list[dict], Path], None]
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, output / name)
    print(f"{output / name}.json, .svg, .png: written")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=90, metadata={"Software": None})
    plt.close(figure)


def coordinate_figure(rows: list[dict], path: Path) -> None:
    """Movement against width at the first depth, and against depth at the first width."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    first = rows[0]
    quantities = [name for name in first if name not in ("kind", "width", "depth")]
    for panel, axis, other in zip(panels, ("width", "depth"), ("depth", "width"), strict=True):
        for kind, line in KINDS.items():
            own = [r for r in rows if r["kind"] == kind and r[other] == first[other]]
            for color, name in zip(plt.get_cmap("tab10").colors, quantities, strict=False):
                panel.plot(
                    [r[axis] for r in own], [r[name] for r in own], line, marker="o", ms=3, lw=1,
                    color=color, label=f"{kind}, {name}",
                )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(sorted({r[axis] for r in rows}), sorted({r[axis] for r in rows}))
        panel.minorticks_off()
    panels[0].set_ylabel("RMS movement from the initial value")
    panels[1].legend(fontsize=7, frameon=False)
    _save(figure, path)


def rate_figure(rows: list[dict], path: Path) -> None:
    """Loss against base learning rate, a line per shape, a panel per parameterisation."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    shapes = list(dict.fromkeys((r["width"], r["depth"]) for r in rows))
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(shapes)))
    for panel, kind in zip(panels, KINDS, strict=True):
        for shape, color in zip(shapes, colors, strict=True):
            own = [r for r in rows if r["kind"] == kind and (r["width"], r["depth"]) == shape]
            losses = [r["loss"] for r in own]
            panel.plot(
                [r["lr"] for r in own], losses, "o-", ms=3, lw=1, color=color,
                label=f"width {shape[0]}, depth {shape[1]}",
            )  # fmt: skip
            best = int(np.argmin(losses))
            panel.plot(own[best]["lr"], losses[best], "D", ms=6, mfc="none", color=color)
        label = "base learning rate, matched at the first shape"
        panel.set(xscale="log", xlabel=label, title=kind)
    panels[0].set_ylabel("loss over the last steps")
    panels[0].legend(fontsize=7, frameon=False)
    _save(figure, path)
