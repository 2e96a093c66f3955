"""Made-up tokens for benchmarks and dry runs: every sample a function of (seed, index)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ext.data.packing import PackedSample
from megatron_ext.diffusion.random import Purpose, generator


@dataclass(frozen=True)
class MockDataset:
    """Random walks over the vocabulary, so that there is something to learn.

    Ids below `first_id` (special tokens) do not occur. `length` tokens per sample.
    """

    vocab_size: int
    length: int
    seed: int
    first_id: int = 4
    bytes_per_token: float | None = None

    def sample(self, index: int) -> PackedSample:
        numbers = generator(self.seed, index, Purpose.MOCK_DATA)
        width = self.vocab_size - self.first_id
        steps = numbers.integers(0, 4, self.length)
        steps[0] = numbers.integers(0, width)
        tokens = np.cumsum(steps) % width + self.first_id
        return PackedSample(tokens, np.zeros(self.length, dtype=np.int32))

    def __len__(self) -> int:
        return 1 << 40
