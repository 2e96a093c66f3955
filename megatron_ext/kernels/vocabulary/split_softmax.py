"""A softmax over a vocabulary that is split on tp, as statistics, sums and gradients of it.

A rank holds rows [n, v_padded/tp] of logits: the columns of ids [first, first + v_padded/tp).
Padding columns (ids >= vocab_size) and an excluded id count as minus infinity. Results are per
token and the same on all ranks, float32 (float64 for float64 rows).

Collectives over tp: `log_sum_exp_and_picked` one all-gather of (1 + picks) n floats, `tail_sums`
one all-reduce of 2n floats; gradients none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.diffusion.objective import work_dtype
from megatron_ext.kernels.vocabulary.passes import Passes


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

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[width]: minus infinity in padding and excluded columns, else 0."""
        bias = torch.zeros(self.width, dtype=dtype, device=device)
        bias[max(self.vocab_size - self.first, 0) :] = -torch.inf
        if self.excluded_id is not None and 0 <= self.excluded_id - self.first < self.width:
            bias[self.excluded_id - self.first] = -torch.inf
        return bias

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


class Gradient(NamedTuple):
    """Gradient of a token's loss by its logits in [n] scalars: p (weight_p - weight_v / (1 + r p)).

    At the ids x0 and xt it is something else, given as the value it has there.
    """

    lse: Tensor
    weight_p: Tensor
    at_x0: Tensor
    at_xt: Tensor
    r: Tensor | None = None
    """Absent with `weight_v` where that is zero."""
    weight_v: Tensor | None = None


@dataclass(frozen=True)
class SplitSoftmax:
    """Softmax of `scale * rows` over this rank's columns and the others'."""

    vocab: VocabSlice
    passes: Passes
    bias: Tensor
    scale: Tensor

    @classmethod
    def of(cls, vocab: VocabSlice, passes: Passes, like: Tensor, scale: float) -> SplitSoftmax:
        """For rows of the dtype and device of `like`."""
        dtype = work_dtype(like)
        factor = torch.full((), scale, dtype=dtype, device=like.device)
        return cls(vocab, passes, vocab.bias(dtype, like.device), factor)

    def log_sum_exp_and_picked(self, rows: Tensor, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Log-sum-exp [n] over all ranks, and the logits [k, n] of k rows of ids.

        A picked id that is excluded or out of the vocabulary yields minus infinity.
        """
        peak, total = self.passes.statistics(rows, self.bias, self.scale)
        picked = []
        for row in ids:
            column, here = self.vocab.local(row)
            value = rows.gather(-1, column.unsqueeze(-1)).squeeze(-1).to(self.bias.dtype)
            value = value * self.scale + self.bias[column]
            picked.append(torch.where(here, value, -torch.inf))
        log_total = peak + total.log()
        group = self.vocab.group
        if group is None:
            return log_total, torch.stack(picked)
        mine = torch.stack([log_total, *picked])
        every = mine.new_empty((group.size() * len(mine), mine.shape[1]))
        torch.distributed.all_gather_into_tensor(every, mine, group=group)
        every = every.unflatten(0, (-1, len(mine)))
        return torch.logsumexp(every[:, 0], dim=0), every[:, 1:].amax(0)

    def tail_sums(self, rows: Tensor, shift: Tensor, skipped: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over all ids but `skipped` of v - log(1 + v) and v / (1 + v), v = exp(l + shift)."""
        column, here = self.vocab.local(skipped)
        skip = torch.where(here, column, -1)
        sums = self.passes.tail_sums(rows, self.bias, self.scale, shift, skip)
        both = self.vocab.sum_(torch.stack(sums))
        return both[0], both[1]

    def write_gradient(
        self,
        rows: Tensor,
        out: Tensor,
        gradient: Gradient,
        ids: tuple[Tensor, Tensor],
        upstream: Tensor | None,
    ) -> None:
        """Gradient of sum(upstream * loss) by the unscaled `rows` into `out`, which may be `rows`.

        `ids` are x0 and xt, `upstream` [n] is 1 where absent.
        """
        factor = self.scale if upstream is None else self.scale * upstream
        weight_v = None if gradient.weight_v is None else gradient.weight_v * factor
        self.passes.gradient(
            rows, out, self.bias, self.scale, gradient.lse, gradient.weight_p * factor,
            gradient.r, weight_v,
        )  # fmt: skip
        # By indices: torch's scatter_ copies all of a bfloat16 tensor to float32 and back on CPUs.
        tokens = torch.arange(len(out), device=out.device)
        for row, value in zip(ids, (gradient.at_x0, gradient.at_xt), strict=True):
            column, here = self.vocab.local(row)
            counts = here & (self.bias[column] == 0)
            value = (value * factor).to(out.dtype)
            out[tokens, column] = torch.where(counts, value, out[tokens, column])
