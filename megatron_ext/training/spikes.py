"""Loss spikes: a step's loss far above those before it.

The loss of a step is compared with mean and standard deviation of the last `--loss-spike-window`
applied steps, before the update. The window is part of a checkpoint, so a continued run decides as
the uninterrupted one does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from megatron_ext.config import ResilienceConfig


class Spike(NamedTuple):
    """A loss and what it was compared with, nats per token."""

    loss: float
    mean: float
    deviation: float

    def __str__(self) -> str:
        height = (self.loss - self.mean) / self.deviation
        return (
            f"loss {self.loss:.4f} is {height:.1f} standard deviations ({self.deviation:.4f}) "
            f"above the mean {self.mean:.4f}"
        )


class LossSpikes:
    """Remembers losses and recognises spikes; a function of the losses alone."""

    def __init__(self, config: ResilienceConfig, losses: Iterable[float] = ()) -> None:
        self.config = config
        self.losses: deque[float] = deque(losses, maxlen=config.loss_spike_window)

    @property
    def is_on(self) -> bool:
        return self.config.loss_spike_action != "off"

    def judge(self, loss: float) -> Spike | None:
        """The spike that this loss is, if it is one."""
        if not self.is_on or len(self.losses) < self.config.loss_spike_window:
            return None
        known = np.array(self.losses)
        mean = float(known.mean())
        deviation = max(float(known.std(ddof=1)), 1e-6 * abs(mean))
        is_spike = loss - mean > self.config.loss_spike_threshold * deviation
        return Spike(loss, mean, deviation) if is_spike else None

    def remember(self, loss: float) -> None:
        """Add the loss of an applied step."""
        if self.is_on:
            self.losses.append(loss)
