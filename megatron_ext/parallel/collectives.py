"""Collectives with gradients that megatron-core's mappings do not have in this form.

`all_reduce_sum`  x partial on the group -> sum, same on the group; gradient: all-reduced as well,
                  because every rank goes on to use the sum in its own part of the loss.
`gather_sequence` x [s/cp, ...] split on the group -> [s, ...] same on the group; gradient:
                  reduce-scattered, every rank contributes to every position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.parallel.cpu import enable_cpu

enable_cpu()

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def all_reduce_sum(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Sum over the ranks of `group`; no communication in a group of one."""
    return x if group.size() == 1 else _AllReduceSum.apply(x, group)


def gather_sequence(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Concatenate the contiguous sequence pieces of the ranks of `group` along dimension 0."""
    if group.size() == 1:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
