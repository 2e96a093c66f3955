"""Take one recorded step of a run again, from its keys, and look at every sequence of it.

A step is a function of the weights before it and of (seed, sample indices): nothing of it has to be
recorded to repeat it. The weights come from the last checkpoint before the step; where that is
several steps earlier those are taken again, too, without a word. At the layout and on the machine
of the run the numbers come out to the last bit (on GPUs with `--deterministic`), at another layout
to rounding.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint import manifest
from megatron_ext.config import Config, require
from megatron_ext.training.loop import Trainer
from megatron_ext.training.sequences import SequenceReport


@dataclass(frozen=True)
class Replay:
    """A step taken again."""

    step: int
    from_checkpoint: int
    loss: float
    elbo: float
    grad_norm: float
    applied: bool
    sequences: list[SequenceReport]
    """By sample index; the noise levels and losses of each."""
    recorded: dict[str, float]
    """What metrics.jsonl has of the step: its loss where every step was logged, and the norm of
    its gradient."""

    @property
    def differences(self) -> dict[str, float]:
        """Relative difference to what was recorded, by name."""
        mine = {"loss": self.loss, "grad_norm": self.grad_norm}
        return {
            name: 0.0 if mine[name] == value else abs(mine[name] - value) / abs(value or 1.0)
            for name, value in self.recorded.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {
            "sequences": [report._asdict() for report in self.sequences],
            "differences": self.differences,
        }


def replay_step(config: Config, step: int) -> Replay:
    """Repeat step `step` (the one that completes it) of the run in `--load`. A collective."""
    load = config.checkpoint.load
    require(load is not None, "load", load, "give the folder of the run.")
    assert load is not None
    last = config.training.train_iters
    require(1 <= step <= last, "step", step, f"the run has steps 1 to {last}.")
    start = max((known for known in manifest.complete_steps(Path(load)) if known < step), default=0)
    config = config.with_sections(
        checkpoint={
            "save": None, "save_interval": 0, "ckpt_step": start or None, "finetune": False,
            "load": load if start else None,
        },
        resilience={"loss_spike_action": "off"},
    )  # fmt: skip
    trainer = Trainer.build(config)
    trainer.load()
    result = batches = None
    for batches in trainer.batches(step):
        result = trainer.train_step(batches)
    assert result is not None and batches is not None, "a step after the checkpoint was asked for"
    count = max(result.sums.count.item(), 1.0)
    return Replay(
        step, start, result.sums.loss.item() / count, result.sums.elbo.item() / count,
        result.grad_norm, result.applied, trainer.sequences(batches, result),
        recorded_values(Path(load), step, config.logging.log_interval),
    )  # fmt: skip


def recorded_values(root: Path, step: int, log_interval: int) -> dict[str, float]:
    """The last that metrics.jsonl says of a step (a restart may have taken it twice)."""
    path, found = root / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        record = json.loads(line) if line.startswith("{") else {}
        if record.get("step") == step and "train/grad_norm" in record:
            found = record
    values = {"grad_norm": found.get("train/grad_norm"), "loss": found.get("train/loss")}
    if log_interval > 1:
        del values["loss"]
    return {
        name: value for name, value in values.items() if value is not None and math.isfinite(value)
    }


def is_first_rank() -> bool:
    return torch.distributed.get_rank() == 0
