"""Softmax statistics of logits whose vocabulary is split on tp.

A rank holds `logits` [n, v_padded/tp]: the columns of ids [first, first + v_padded/tp). Padding
columns (ids >= vocab_size) and excluded ids count as minus infinity.

Collectives per call of `log_sum_exp_and_picked`: one all-gather of (2 + picks) floats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VocabSlice:
    """Which columns of the vocabulary a rank holds."""

    first: int
    width: int
    vocab_size: int
    excluded_id: int | None
    group: torch.distributed.ProcessGroup | None

    @classmethod
    def of(
        cls,
        width: int,
        vocab_size: int,
        excluded_id: int | None,
        group: torch.distributed.ProcessGroup | None,
    ) -> VocabSlice:
        """The slice of this rank; raises where the ranks together hold too few columns."""
        size = 1 if group is None else group.size()
        if width * size < vocab_size:
            raise ValueError(
                f"logits have {width} columns on each of {size} ranks, fewer than the vocabulary "
                f"of {vocab_size}"
            )
        rank = 0 if group is None else group.rank()
        shared = group if size > 1 else None
        return cls(rank * width, width, vocab_size, excluded_id, shared)

    def mask_(self, logits: Tensor) -> Tensor:
        """Set this rank's padding and excluded columns to minus infinity, in place."""
        beyond = max(self.vocab_size - self.first, 0)
        if beyond < self.width:
            logits[:, beyond:] = -torch.inf
        if self.excluded_id is not None and 0 <= self.excluded_id - self.first < self.width:
            logits[:, self.excluded_id - self.first] = -torch.inf
        return logits

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(column here, whether the id is here); the column of an absent id is 0."""
        column = ids - self.first
        here = (column >= 0) & (column < self.width)
        return torch.where(here, column, 0), here

    def sum_(self, x: Tensor) -> Tensor:
        """Add `x` over the ranks in place."""
        if self.group is not None:
            torch.distributed.all_reduce(x, group=self.group)
        return x

    def log_sum_exp_and_picked(self, logits: Tensor, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Log-sum-exp [n] of masked `logits` over all ranks, and the logits [k, n] at k id rows.

        A picked id that is excluded or out of the vocabulary yields minus infinity.
        """
        peak = logits.amax(-1)
        # A rank can hold nothing but padding: its peak is -inf and must not make NaNs.
        finite_peak = peak.clamp_min(torch.finfo(logits.dtype).min)
        total = torch.exp(logits - finite_peak.unsqueeze(-1)).sum(-1)
        picked = []
        for row in ids:
            column, here = self.local(row)
            value = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1)
            picked.append(torch.where(here, value, -torch.inf))
        log_total = finite_peak + total.log()
        if self.group is None:
            return log_total, torch.stack(picked)
        mine = torch.stack([log_total, *picked])
        every = mine.new_empty((self.group.size() * len(mine), mine.shape[1]))
        torch.distributed.all_gather_into_tensor(every, mine, group=self.group)
        every = every.unflatten(0, (-1, len(mine)))
        return torch.logsumexp(every[:, 0], dim=0), every[:, 1:].amax(0)


def tokens_per_chunk(width: int, chunk_size: int | None) -> int:
    """Tokens whose logits exist at a time.

    The default bounds a chunk of float32 logits by 64 MiB, within 16 to 1024 tokens: below 256
    rows the matrix product re-reads the head's weight more than it computes, above 1024 nothing
    is gained.
    """
    if chunk_size is not None:
        return chunk_size
    return min(max((64 << 20) // (4 * max(width, 1)), 16), 1024)
