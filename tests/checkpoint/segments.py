"""Runs in pieces: train to a step, save, and go on from there, possibly at another layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.training import CheckpointWriter
from megatron_ext.config import Config
from megatron_ext.training.loop import Trainer


@dataclass
class Segment:
    """What a rank saw of one piece."""

    first: int
    losses: list[float]
    grad_norms: list[float]
    weights: list[torch.Tensor]
    """This rank's parameters after the last step."""
    optimizer: list[Any]
    """Steps taken and averages of this rank's share, by parameter group."""


def optimizer_state(trainer: Trainer) -> list[Any]:
    inner = trainer.optimizer.optimizer
    state: list[Any] = []
    for group in inner.param_groups:
        state.append(group["step"])
        for parameter in group["params"]:
            averages = inner.state[parameter]
            state += [parameter.detach(), averages["exp_avg"], averages["exp_avg_sq"]]
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in state]


def train_segment(config: Config, last: int) -> Segment:
    """Train from `--load` (or from scratch) to step `last` and save to `--save`."""
    trainer = Trainer.build(config)
    trainer.load()
    first, losses, norms = trainer.position.step, [], []
    for step in range(first, last):
        result = trainer.train_step(trainer.source.step(step))
        assert result.applied
        losses.append(result.sums.loss.item() / result.sums.count.item())
        norms.append(result.grad_norm)
    if config.checkpoint.save is not None:
        checkpoint = config.checkpoint
        writer = CheckpointWriter(checkpoint.save, async_save=checkpoint.async_save)
        writer.save(trainer.model, trainer.optimizer, trainer.position)
        writer.finish()
    weights = [p.detach().clone() for chunk in trainer.model for p in chunk.parameters()]
    return Segment(first, losses, norms, weights, optimizer_state(trainer))


def with_folders(
    config: Config, *, load: Path | None = None, save: Path | None = None, **more: Any
) -> Config:
    return config.with_sections(
        checkpoint={
            "load": None if load is None else str(load),
            "save": None if save is None else str(save),
            **more,
        }
    )


def train_segments(rank: int, pieces: dict[str, tuple[Config, int]]) -> dict[str, Segment]:
    """Pieces in order on the same ranks, each a configuration and its last step."""
    del rank
    return {name: train_segment(*piece) for name, piece in pieces.items()}


def whole_and_halves(
    name: str, config: Config, folder: Path, half: int
) -> dict[str, tuple[Config, int]]:
    """`2 half` steps without a stop, and the same in two pieces."""
    return {
        f"{name}/whole": (config, 2 * half),
        f"{name}/first": (
            with_folders(config, save=folder, async_save=config.checkpoint.async_save),
            half,
        ),
        f"{name}/second": (with_folders(config, load=folder), 2 * half),
    }
