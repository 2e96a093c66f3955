"""The GIDD loss of given logits, and fused with the output head.

    xt, x0   [n] int64     noised and clean ids of the full vocabulary; same on tp
    log_snr  [n] float32   noise level per token; same on tp

`impl`: `reference` is the dense definition; the others are the closed form without a tensor of
[tokens, vocabulary], its passes over the vocabulary in plain torch (`chunked`), fused by
torch.compile (`compiled`) or as GPU kernels (`triton`); `auto` is the fastest of them here
(`kernels.vocabulary.passes.choose`). Results are per token, float32 (float64 for float64 inputs),
and only `loss` is differentiable.

Collectives over tp per call on logits, and per chunk of n tokens in the fused form: an all-gather
of 3n and, unless the noise is masked, an all-reduce of 2n floats forward; none backward, except
the sum of the hidden gradient [n, h] where the caller does not do that itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.diffusion.objective import GiddLoss, work_dtype
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.kernels.gidd_loss.closed_form import closed_form
from megatron_ext.kernels.gidd_loss.reference import gidd_loss_reference
from megatron_ext.kernels.vocabulary.passes import Implementation, choose, is_gpu, passes_of
from megatron_ext.kernels.vocabulary.projection import (
    HeadOptions,
    TokenLoss,
    loss_of_hidden,
    loss_of_logits,
)
from megatron_ext.kernels.vocabulary.split_softmax import Gradient, SplitSoftmax, VocabSlice

__all__ = ["GiddLoss", "Implementation", "gidd_loss", "linear_gidd_loss"]


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
    impl = choose(impl, logits.device, logits.dtype, schedule.vocab_size)
    if impl == "reference":
        return gidd_loss_reference(
            logits, xt, x0, log_snr, schedule, tp_group=tp_group, beta_is=beta_is
        )
    rows = logits.reshape(-1, logits.shape[-1])
    vocab = VocabSlice.of(rows.shape[-1], schedule.vocab_size, schedule.mask_token_id, tp_group)
    softmax = SplitSoftmax.of(vocab, passes_of(impl), rows, 1.0)
    flat = (x.reshape(-1) for x in (xt, x0, log_snr))
    values = loss_of_logits(rows, _token_loss(softmax, *flat, schedule, beta_is))
    return GiddLoss(*(x.view(xt.shape) for x in values))


def linear_gidd_loss(  # noqa: PLR0913
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
    summed: bool = False,
    partial_hidden_grad: bool = False,
    weight_grad: Tensor | None = None,
    impl: Implementation = "auto",
) -> GiddLoss:
    """Per-token losses [n] of logits `logit_scale * hidden @ weight.T`, which are never whole.

    `hidden` [n, h] same on tp, `weight` [v_padded/tp, h] split on tp, both differentiable. With
    `summed` the caller promises to add all losses up with one factor, which saves a matrix
    product; a backward pass that breaks the promise raises. The gradient of `hidden` is summed
    over tp unless `partial_hidden_grad` leaves that to the caller (megatron-core's
    sequence-parallel regions do it).

    The gradient of `weight` is added to `weight_grad` [v_padded/tp, h] float32 where that is given,
    and what autograd gets for it has no meaning (megatron-core's `main_grad`). With `summed` that
    happens in the forward pass, and the one factor must be 1.
    """
    impl = choose(impl, hidden.device, hidden.dtype, schedule.vocab_size)
    if impl == "reference":
        if weight_grad is not None:
            raise ValueError("impl is reference: it does not add to weight_grad")
        if tp_group is not None and tp_group.size() > 1 and not partial_hidden_grad:
            hidden = _SumGradient.apply(hidden, tp_group)
        exact = work_dtype(hidden)
        logits = (hidden @ weight.t()).to(exact) * logit_scale
        return gidd_loss_reference(
            logits, xt, x0, log_snr, schedule, tp_group=tp_group, beta_is=beta_is
        )
    vocab = VocabSlice.of(len(weight), schedule.vocab_size, schedule.mask_token_id, tp_group)
    softmax = SplitSoftmax.of(vocab, passes_of(impl), hidden, logit_scale)
    loss = _token_loss(softmax, xt, x0, log_snr, schedule, beta_is)
    options = HeadOptions(
        chunk_size, summed, not partial_hidden_grad, weight_grad, is_gpu(impl, hidden.device)
    )
    return GiddLoss(*loss_of_hidden(hidden, weight, loss, options))


def _token_loss(
    softmax: SplitSoftmax,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    beta_is: float,
) -> TokenLoss:
    log_snr = log_snr.to(softmax.bias.dtype)

    def evaluate(rows: Tensor, part: slice) -> tuple[GiddLoss, Gradient]:
        return closed_form(rows, xt[part], x0[part], log_snr[part], schedule, softmax, beta_is)

    return TokenLoss(softmax, (x0, xt), evaluate)
