"""The learning rate as a pure function of completed updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up from zero, then a shape; update k (from 0) uses `lr(k)`.

    WSD: constant, then base (1 - sqrt((k - T + C) / C)) over the last C of T steps; where warm-up
    and cooldown overlap the cooldown wins. cosine: from base to `min_lr` at T.
    """

    base_lr: float
    total_steps: int
    warmup_steps: int = 0
    cooldown_steps: float = 0.0
    """Below 1: a share of `total_steps`."""
    style: Literal["WSD", "constant", "cosine"] = "WSD"
    min_lr: float = 0.0

    @property
    def cooldown(self) -> int:
        if 0 < self.cooldown_steps < 1:
            return int(self.cooldown_steps * self.total_steps)
        return int(self.cooldown_steps)

    def lr(self, step: int) -> float:
        """Base learning rate after `step` completed updates."""
        cooldown, total = self.cooldown, self.total_steps
        if self.style == "WSD" and cooldown > 0 and step >= total - cooldown:
            return self.base_lr * (
                1 - math.sqrt(min(step - (total - cooldown), cooldown) / cooldown)
            )
        if step < self.warmup_steps:
            return self.base_lr * step / self.warmup_steps
        if self.style == "cosine":
            decay = max(total - self.warmup_steps, 1)
            progress = min((step - self.warmup_steps) / decay, 1.0)
            return self.min_lr + (self.base_lr - self.min_lr) * 0.5 * (
                1 + math.cos(math.pi * progress)
            )
        return self.base_lr
