"""Does CompleteP do what it says: updates that keep their size, a learning rate that transfers.

`coordinates` trains a few steps at several widths and depths and measures, on one fixed batch, the
root mean square of how far the embedding, the residual stream and the logits moved from their
initial values. Under CompleteP it does not depend on width and depth; under the standard
parameterisation it grows. `rates` trains a grid of learning rates per shape; the best must not move
by a grid step.

The standard parameterisation is one learning rate for all weights, no multipliers of branches and
logits, and one standard deviation of matrices: existing fields (`standard`). It is matched to
CompleteP at the first width and depth, so that both begin from the same place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.training.loop import Trainer

Parameterization = Literal["completep", "standard"]
QUANTITIES = ("embedding", "residual", "logits")


@dataclass(frozen=True)
class Shape:
    """Width and depth; heads keep their width."""

    width: int
    depth: int
    head_width: int = 16


def standard(config: Config, base: Shape) -> Config:
    """The standard parameterisation that equals CompleteP's matrices at `base`."""
    return config.with_sections(
        optimizer={
            "parameterization": "standard", "lr": config.optimizer.lr / base.width,
            "adam_eps": 1e-8 / (base.width * base.depth),
        },
        model={
            "residual_scale": None, "head_scale": None,
            "init_method_std": config.model.init_scale / math.sqrt(base.width),
        },
    )  # fmt: skip


def shaped(config: Config, shape: Shape, kind: Parameterization, base: Shape, lr: float) -> Config:
    """`config` at a shape and base learning rate (CompleteP's; standard's follows from it)."""
    head = shape.head_width
    if shape.width % head:
        raise ValueError(f"--widths has {shape.width}: give multiples of --head-width ({head}).")
    sized = config.with_sections(
        model={
            "hidden_size": shape.width, "num_layers": shape.depth, "kv_channels": None,
            "ffn_hidden_size": None, "num_attention_heads": shape.width // head,
        },
        optimizer={"lr": lr, "lr_decay_style": "constant"},
    )  # fmt: skip
    return standard(sized, base) if kind == "standard" else sized


@contextmanager
def _outputs(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs of the embedding and of the last layer, filled in by every forward pass."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: torch.nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            value = output[0] if isinstance(output, tuple) else output
            seen[name] = value.detach().float().clone()

        return hook

    handles = [
        model.embedding.register_forward_hook(keep("embedding")),
        model.decoder.layers[-1].register_forward_hook(keep("residual")),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _look(trainer: Trainer, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model = trainer.model[0].module
    with _outputs(model) as seen:
        logits = model(*inputs)
    return {**seen, "logits": logits.float()}


def movement(config: Config, steps: int) -> dict[str, float]:
    """RMS movement of `QUANTITIES` after `steps` updates, on the first batch of the run."""
    trainer = Trainer.build(config)
    first = trainer.source.step(0)[0].to(trainer.device)
    inputs = (first.input_ids, first.visibility)
    start = _look(trainer, inputs)
    for step in range(steps):
        result = trainer.train_step(trainer.source.step(step))
        if not result.applied:
            return dict.fromkeys(QUANTITIES, math.inf)
    end = _look(trainer, inputs)
    return {name: (end[name] - start[name]).square().mean().sqrt().item() for name in QUANTITIES}


def coordinates(
    config: Config, shapes: Sequence[Shape], kind: Parameterization, steps: int, lr: float
) -> list[dict]:
    """A row per shape: width, depth and the movement of every quantity."""
    rows = []
    for shape in shapes:
        at_once = config.with_sections(optimizer={"lr_warmup_iters": 0})
        moved = movement(shaped(at_once, shape, kind, shapes[0], lr), steps)
        rows.append({"kind": kind, "width": shape.width, "depth": shape.depth, **moved})
    return rows


def slopes(rows: Sequence[dict], axis: Literal["width", "depth"]) -> dict[str, float]:
    """Exponent of every quantity's movement in width (or depth), the other held at its first."""
    other = "depth" if axis == "width" else "width"
    own = [row for row in rows if row[other] == rows[0][other]]
    x = np.log([row[axis] for row in own])
    if len(set(x)) < 2:
        return {}
    result = {}
    for name in QUANTITIES:
        y = np.log([row[name] for row in own])
        result[name] = float(np.polyfit(x, y, 1)[0]) if np.isfinite(y).all() else math.inf
    return result


def final_loss(config: Config, steps: int, last: int) -> float:
    """Mean bound over the last steps of a run; infinity where it diverged."""
    trainer = Trainer.build(config)
    losses = []
    for step in range(steps):
        result = trainer.train_step(trainer.source.step(step))
        if not result.applied:
            return math.inf
        losses.append(result.sums.loss.item() / result.sums.count.item())
    return float(np.mean(losses[-last:]))


def rates(
    config: Config, shapes: Sequence[Shape], kind: Parameterization, steps: int,
    learning_rates: Sequence[float],
) -> list[dict]:  # fmt: skip
    """A row per shape and learning rate with the loss over the last fifth of the steps."""
    rows = []
    for shape in shapes:
        for lr in learning_rates:
            loss = final_loss(shaped(config, shape, kind, shapes[0], lr), steps, max(steps // 5, 1))
            rows.append(
                {"kind": kind, "width": shape.width, "depth": shape.depth, "lr": lr, "loss": loss}
            )
    return rows


@dataclass(frozen=True)
class Best:
    """Where a shape's loss is lowest: vertex of the parabola through the best three rates."""

    width: int
    depth: int
    lr: float
    is_inside: bool
    """False where the best rate is the first or last of the grid."""


def best_rates(rows: Sequence[dict]) -> list[Best]:
    """Of every shape, in the order of the rows."""
    result = []
    for width, depth in dict.fromkeys((row["width"], row["depth"]) for row in rows):
        own = sorted(
            (row["lr"], row["loss"]) for row in rows
            if (row["width"], row["depth"]) == (width, depth)
        )  # fmt: skip
        x, y = np.log([lr for lr, _ in own]), np.array([loss for _, loss in own])
        i = int(np.argmin(y))
        inside = 0 < i < len(x) - 1
        vertex = x[i]
        if inside and np.isfinite(y[i - 1 : i + 2]).all():
            c2, c1, _ = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
            vertex = x[i] - c1 / (2 * c2)
        result.append(Best(width, depth, float(np.exp(vertex)), inside))
    return result


def grid_steps_moved(best: Sequence[Best], learning_rates: Sequence[float]) -> float:
    """Largest distance between best rates of two shapes, in steps of the (geometric) grid."""
    logs = np.log([item.lr for item in best])
    grid = np.log(sorted(learning_rates))
    return float(np.ptp(logs) / (np.ptp(grid) / (len(grid) - 1)))
