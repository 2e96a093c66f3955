"""Rates of the step-time model, fitted on one group of published runs and tested on another.

Two numbers are fitted for BF16 and one for FP8, by the squares of relative errors, on a grid that
is refined around its best point. What plans use (`RATES`) is fitted on all BF16 runs and on the
first group of FP8 ones; the errors that plans state are those on runs that the fit has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from statistics import median
from typing import NamedTuple

from megatron_ext.planning.anchors import ANCHOR_GPUS, Anchor, Group, anchors_of
from megatron_ext.planning.step_time import FUSED_LAYER, Rates, step_time

OTHER_STACKS: tuple[Group, ...] = ("torchtitan", "MegaDLMs")
"""Of other software or hardware than what the fit saw; their errors are stated, and no bands."""
_ROUNDS = 7


class Test(NamedTuple):
    """Errors of a fit on runs, as planned / measured - 1."""

    fitted_on: tuple[Group, ...]
    tested_on: Group
    rates: Rates
    errors: dict[str, float]

    @property
    def worst(self) -> float:
        return max(abs(x) for x in self.errors.values())

    @property
    def mean(self) -> float:
        return sum(abs(x) for x in self.errors.values()) / len(self.errors)

    @property
    def median(self) -> float:
        return median(abs(x) for x in self.errors.values())


def error_of(anchor: Anchor, rates: Rates) -> float:
    """Of the planned step time."""
    planned = step_time(anchor.shape, anchor.spread, ANCHOR_GPUS[anchor.gpu], rates, FUSED_LAYER)
    return planned.total / anchor.seconds - 1


def _squares(anchors: Iterable[Anchor], rates: Rates) -> float:
    return sum(error_of(anchor, rates) ** 2 for anchor in anchors)


def _refined(score: Callable[..., float], *ranges: tuple[float, float]) -> tuple[float, ...]:
    """The best point of a grid of 9 values per dimension, refined around it."""
    points: tuple[float, ...] = ()
    for _ in range(_ROUNDS):
        grids = [[low + (high - low) * i / 8 for i in range(9)] for low, high in ranges]
        candidates = [(x,) for x in grids[0]]
        for grid in grids[1:]:
            candidates = [(*point, x) for point in candidates for x in grid]
        points = min(candidates, key=lambda point: score(*point))
        ranges = tuple(
            (max(x - (high - low) / 6, 1e-3), x + (high - low) / 6)
            for x, (low, high) in zip(points, ranges, strict=True)
        )
    return points


def fit_bf16(*groups: Group) -> Rates:
    anchors = [anchor for group in groups for anchor in anchors_of(group)]
    product, narrow = _refined(
        lambda product, narrow: _squares(anchors, Rates(product, narrow, 1.0)),
        (0.4, 1.0), (0.0, 3000.0),
    )  # fmt: skip
    return Rates(product, narrow, 1.0)


def fit_fp8(rates: Rates, *groups: Group) -> Rates:
    """The same with the FP8 rate of these runs."""
    anchors = [anchor for group in groups for anchor in anchors_of(group)]
    (fp8,) = _refined(lambda fp8: _squares(anchors, replace(rates, fp8=fp8)), (0.2, 1.0))
    return replace(rates, fp8=fp8)


def test(rates: Rates, fitted_on: tuple[Group, ...], tested_on: Group) -> Test:
    errors = {
        f"{number + 1}. {anchor.name}": error_of(anchor, rates)
        for number, anchor in enumerate(anchors_of(tested_on))
    }
    return Test(fitted_on, tested_on, rates, errors)


@lru_cache
def all_tests() -> tuple[Test, ...]:
    """Each BF16 group from the other, and newer FP8 runs and GPUs from older ones."""
    foundry, megatron = fit_bf16("llm-foundry"), fit_bf16("Megatron-LM")
    return (
        test(foundry, ("llm-foundry",), "Megatron-LM"),
        test(megatron, ("Megatron-LM",), "llm-foundry"),
        test(
            rates(), ("llm-foundry", "Megatron-LM", "Bridge FP8, 2025"),
            "Bridge FP8, 2026 and B200",
        ),
        *(
            test(rates(), ("llm-foundry", "Megatron-LM", "Bridge FP8, 2025"), group)
            for group in OTHER_STACKS
        ),
    )  # fmt: skip


@lru_cache
def rates() -> Rates:
    """What plans use."""
    return fit_fp8(fit_bf16("llm-foundry", "Megatron-LM"), "Bridge FP8, 2025")
