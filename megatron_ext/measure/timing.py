"""Times of several ways to do one thing, taken so that they can be compared.

The ways take turns, and every second turn runs backwards, so that whatever else the machine does
meets them alike. A ratio is the median of the ratios within a turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of every repetition of one way, in the order of the turns."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which half of the repetitions lie."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper

    def relative_to(self, other: Timing) -> float:
        """Median over turns of this time over the other's; both come from one `alternate`."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / others for mine, others in pairs)

    def summary(self, prefix: str = "") -> dict[str, Any]:
        """For a row of a table; `prefix` begins the keys."""
        lower, upper = self.quartiles
        return {
            f"{prefix}median_s": self.median,
            f"{prefix}min_s": min(self.seconds),
            f"{prefix}lower_quartile_s": lower,
            f"{prefix}upper_quartile_s": upper,
            f"{prefix}repetitions": len(self.seconds),
        }


def alternate(
    ways: Mapping[str, Callable[[], object]],
    repetitions: int = 7,
    warmup: int = 1,
    max_seconds: float | None = None,
    before: Mapping[str, Callable[[], object]] | None = None,
    after: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Times of every way over `repetitions` turns after `warmup` turns that are not counted.

    `max_seconds` of counted turns end them early, though never before the first. `before` and
    `after` of a way run around each of its calls and are not timed.
    """
    assert repetitions > 0, "nothing to measure"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-warmup, repetitions):
        if turn == 0:
            begin = time.perf_counter()
        names = list(ways) if turn % 2 == 0 else list(ways)[::-1]
        for name in names:
            if before and name in before:
                before[name]()
            elapsed = _seconds_of(ways[name])
            if after and name in after:
                after[name]()
            if turn >= 0:
                seconds[name].append(elapsed)
        if turn >= 0 and max_seconds is not None and time.perf_counter() - begin > max_seconds:
            break
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _seconds_of(way: Callable[[], object]) -> float:
    _wait_for_device()
    begin = time.perf_counter()
    # The result lives until the clock has stopped: freeing it is not the way's.
    result = way()
    _wait_for_device()
    elapsed = time.perf_counter() - begin
    del result
    return elapsed


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
