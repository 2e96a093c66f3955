"""Blends of datasets: which dataset sample i of a blend comes from, by arithmetic alone.

Weights become whole shares of a period of at most about 2^16 samples (exactly where they are
decimal fractions such as 0.7 and 0.3, whose period is 10; otherwise rounded). Within a period the
datasets are interleaved by Tijdeman's rule for the chairman assignment problem: in every prefix
each of k datasets is within 1 - 1/(2k - 2) of its share, so a batch mixes the datasets as evenly as
whole samples allow. (The usual greedy choice of the dataset furthest behind has no such bound for
k > 2.) There is no randomness in it; each dataset has its own order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_ext.data.packing import PackedDataset, PackedSample

LARGEST_PERIOD = 1 << 16


def whole_shares(weights: Sequence[Fraction | float | int]) -> list[int]:
    """Samples of each dataset in a period: exact where the common denominator is small enough,
    else rounded to 65,536ths, but at least one."""
    exact = [Fraction(weight) for weight in weights]
    if not exact or any(weight <= 0 for weight in exact):
        raise ValueError(f"weights are {[float(weight) for weight in exact]}: give positive ones.")
    fractions = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(fraction.denominator for fraction in fractions))
    if period > LARGEST_PERIOD:
        return [max(1, round(fraction * LARGEST_PERIOD)) for fraction in fractions]
    return [int(fraction * period) for fraction in fractions]


def interleave(shares: Sequence[int]) -> np.ndarray:
    """int [sum(shares)]: the dataset of every sample of a period (Tijdeman 1980)."""
    period, count = sum(shares), len(shares)
    if count == 1:
        return np.zeros(period, np.int64)
    share = np.array(shares, np.int64)
    taken = np.zeros(count, np.int64)
    choice = np.empty(period, np.int64)
    scale = 2 * count - 2
    for n in range(1, period + 1):
        behind = scale * (share * n - taken * period)
        deadline = ((scale - 1) * period - behind) / share
        deadline[behind < period] = np.inf
        chosen = int(np.argmin(deadline))
        choice[n - 1] = chosen
        taken[chosen] += 1
    return choice


class BlendedDataset:
    """Samples of several datasets in the proportions of `weights`.

    Every dataset hands out its own samples 0, 1, 2, ... in order. Of finite datasets (validation)
    the blend is as long as the proportions hold: it ends before the first sample that one of them
    no longer has.
    """

    def __init__(
        self, datasets: Sequence[PackedDataset], weights: Sequence[Fraction | float | int]
    ) -> None:
        assert len(datasets) == len(weights), "a blend needs one weight per dataset"
        self.datasets = list(datasets)
        self._shares = whole_shares(weights)
        self._choice = interleave(self._shares)
        self._own = np.empty_like(self._choice)
        for number, share in enumerate(self._shares):
            self._own[self._choice == number] = np.arange(share)

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset, its own sample index) of sample `index`."""
        period, slot = divmod(index, len(self._choice))
        number = int(self._choice[slot])
        return number, period * self._shares[number] + int(self._own[slot])

    def sample(self, index: int) -> PackedSample:
        number, own = self.locate(index)
        return self.datasets[number].sample(own)

    def __len__(self) -> int:
        return min(
            self._first_index(number, len(dataset)) for number, dataset in enumerate(self.datasets)
        )

    def _first_index(self, number: int, own: int) -> int:
        """The blend's index of a dataset's sample `own`."""
        periods, rest = divmod(own, self._shares[number])
        slots = np.flatnonzero(self._choice == number)
        return periods * len(self._choice) + int(slots[rest])

    @property
    def identity(self) -> list[dict[str, str | int]]:
        """Each dataset's file and its share of a period; another one gives other samples."""
        return [
            {**dataset.identity, "share": share, "period": len(self._choice)}
            for dataset, share in zip(self.datasets, self._shares, strict=True)
        ]

    @property
    def bytes_per_token(self) -> float | None:
        """Mean over the blend; None where one of the datasets does not know."""
        values = [dataset.bytes_per_token for dataset in self.datasets]
        if None in values:
            return None
        return float(np.average(values, weights=self._shares))

    @property
    def num_tokens(self) -> int:
        """Tokens of all datasets, each counted once."""
        return sum(dataset.num_tokens for dataset in self.datasets)
