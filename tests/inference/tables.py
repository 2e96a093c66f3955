"""A denoiser small enough to enumerate, and the exact distributions of what it generates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.hf.steps_gidd import log_snr_grid

VOCABULARY, MASK = 4, 3
LENGTH = 2


class TableDenoiser:
    """Logits of two positions that depend on both tokens; counts its calls."""

    def __init__(self, table: Tensor | None = None) -> None:
        if table is None:
            numbers = np.random.default_rng(0).normal(size=(LENGTH, 4, 4, VOCABULARY))
            table = torch.from_numpy(numbers * 1.5).float()
        self.table, self.calls = table, 0
        self.prefix = torch.zeros(0, 0, dtype=torch.int64)

    def begin_block(self, ids: Tensor, positions: Tensor, is_token: Tensor | None) -> None:
        self.prefix = ids.clone()

    def logits(
        self, ids: Tensor, positions: Tensor, is_token: Tensor | None, num_active: int
    ) -> Tensor:
        self.calls += 1
        whole = torch.cat([self.prefix, ids], dim=1)
        first = self.prefix.shape[1]
        both = torch.stack([self.table[i, whole[:, 0], whole[:, 1]] for i in range(LENGTH)], dim=1)
        return both[:, first : first + num_active].clone()


def denoised(table: Tensor, states: Tensor) -> Tensor:
    """[n, 2, v] float64 probabilities of clean tokens in each of `states` [n, 2]."""
    logits = torch.stack([table[i, states[:, 0], states[:, 1]] for i in range(LENGTH)], dim=1)
    logits[..., MASK] = -torch.inf
    return torch.softmax(logits.double(), dim=-1)


def exact_distribution(
    table: Tensor, schedule: MixingSchedule, steps: int, block_length: int
) -> np.ndarray:
    """[v, v] probabilities of the two final tokens, by multiplying all transitions in float64.

    In blocks of one token the second stays noise while the first is denoised.
    """
    states = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    levels = log_snr_grid(schedule, steps, "cosine")
    first = schedule.pi(torch.tensor(levels[-1], dtype=torch.float64))
    state = torch.outer(first, first).reshape(-1)
    probs = denoised(table, states)
    stays = torch.nn.functional.one_hot(states, VOCABULARY).double()
    for active in [{0, 1}] if block_length == LENGTH else [{0}, {1}]:
        for step in range(steps, 0, -1):
            now, after = (
                torch.full(states.shape, levels[i], dtype=torch.float64) for i in (step, step - 1)
            )
            moves = schedule.posterior(probs, states, now, after)
            new = [moves[:, i] if i in active else stays[:, i] for i in range(LENGTH)]
            state = state @ (new[0][:, :, None] * new[1][:, None, :]).reshape(len(states), -1)
    return state.reshape(VOCABULARY, VOCABULARY).numpy()
