"""The dense loss behind the kernel's signature: all logits in memory, gradients by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.diffusion.objective import GiddLoss, dense_gidd_loss
from megatron_ext.diffusion.schedule import MixingSchedule


class _GatherVocabulary(torch.autograd.Function):
    """[..., v/tp] -> [..., v] on every rank; the gradient is this rank's slice."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group, ctx.width = group, logits.shape[-1]
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        torch.distributed.all_gather(parts, logits.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.group.rank() * ctx.width, ctx.width).contiguous(), None


def gidd_loss_reference(
    logits: Tensor,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    *,
    tp_group: torch.distributed.ProcessGroup | None,
    beta_is: float,
) -> GiddLoss:
    if tp_group is not None and tp_group.size() > 1:
        logits = _GatherVocabulary.apply(logits, tp_group)
    logits = logits[..., : schedule.vocab_size]
    return dense_gidd_loss(logits, xt, x0, log_snr, schedule, beta_is=beta_is)
