"""The GIDD loss of given logits, and fused with the output head.

    xt, x0   [n] int64     noised and clean ids of the full vocabulary; same on tp
    log_snr  [n] float32   noise level per token; same on tp

`impl`: `reference` is the dense definition; `chunked` the closed form without a tensor of
[tokens, vocabulary]; `auto` is `chunked`. Results are per token, float32 (float64 for float64
inputs), and only `loss` is differentiable.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.diffusion.objective import GiddLoss, work_dtype
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.kernels.gidd_loss.chunked import gidd_loss_chunked, linear_gidd_loss_chunked
from megatron_ext.kernels.gidd_loss.reference import gidd_loss_reference

__all__ = ["GiddLoss", "Implementation", "gidd_loss", "linear_gidd_loss"]

Implementation = Literal["auto", "reference", "chunked"]


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def gidd_loss(
    logits: Tensor,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    *,
    tp_group: torch.distributed.ProcessGroup | None = None,
    beta_is: float = 1.0,
    impl: Implementation = "auto",
) -> GiddLoss:
    """Per-token losses [...] of `logits` [..., v_padded/tp], split on `tp_group`.

    Columns at and beyond `schedule.vocab_size` are padding. Differentiable in `logits`.
    """
    match impl:
        case "reference":
            function = gidd_loss_reference
        case "chunked" | "auto":
            function = gidd_loss_chunked
        case _:
            raise ValueError(f"impl is {impl!r}: choose auto, reference or chunked")
    return function(logits, xt, x0, log_snr, schedule, tp_group=tp_group, beta_is=beta_is)


def linear_gidd_loss(
    hidden: Tensor,
    weight: Tensor,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    *,
    logit_scale: float = 1.0,
    tp_group: torch.distributed.ProcessGroup | None = None,
    beta_is: float = 1.0,
    chunk_size: int | None = None,
    partial_hidden_grad: bool = False,
    impl: Implementation = "auto",
) -> GiddLoss:
    """Per-token losses [n] of logits `logit_scale * hidden @ weight.T`, which are never whole.

    `hidden` [n, h] same on tp, `weight` [v_padded/tp, h] split on tp, both differentiable. The
    gradient of `hidden` is summed over tp unless `partial_hidden_grad` leaves that to the caller
    (megatron-core's sequence-parallel regions do it).
    """
    if impl not in ("auto", "reference", "chunked"):
        raise ValueError(f"impl is {impl!r}: choose auto, reference or chunked")
    if impl == "reference":
        if tp_group is not None and tp_group.size() > 1 and not partial_hidden_grad:
            hidden = _SumGradient.apply(hidden, tp_group)
        exact = work_dtype(hidden)
        logits = (hidden @ weight.t()).to(exact) * logit_scale
        return gidd_loss_reference(
            logits, xt, x0, log_snr, schedule, tp_group=tp_group, beta_is=beta_is
        )
    return linear_gidd_loss_chunked(
        hidden, weight, xt, x0, log_snr, schedule,
        logit_scale=logit_scale, tp_group=tp_group, beta_is=beta_is, chunk_size=chunk_size,
        partial_hidden_grad=partial_hidden_grad,
    )  # fmt: skip
