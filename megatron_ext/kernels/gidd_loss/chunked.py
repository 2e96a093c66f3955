"""The closed form a chunk of tokens at a time, on given logits or fused with the output head.

    hidden   [n, h]           same on tp
    weight   [v_padded/tp, h] rows of the output head, split on tp
    logits   [n, v_padded/tp] split on tp; in the fused form they exist for `chunk_size` tokens

Forward: one pass over the chunks; the backward computes a chunk's logits again and needs no
reduction over the vocabulary. Collectives over tp per chunk of n tokens: an all-gather of 3n and an
all-reduce of 2n floats forward; none backward, except the sum of the hidden gradient [n, h] where
the caller does not do that itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ext.diffusion.objective import GiddLoss, work_dtype
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.kernels.gidd_loss.closed_form import Gradient, closed_form, gradient_rows
from megatron_ext.kernels.vocab_parallel import VocabSlice, tokens_per_chunk


def chunks(num_tokens: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` tokens."""
    return (slice(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size))


def head_logits(hidden: Tensor, weight: Tensor, scale: float, vocab: VocabSlice) -> Tensor:
    """Masked logits [n, v/tp] in float32 (float64 for float64 inputs)."""
    exact = work_dtype(hidden)
    return vocab.mask_((hidden @ weight.t()).to(exact).mul_(scale))


def _forward(
    rows_of: Callable[[slice], Tensor],
    size: int,
    ids: tuple[Tensor, Tensor, Tensor],
    schedule: MixingSchedule,
    vocab: VocabSlice,
    beta_is: float,
) -> tuple[GiddLoss, Gradient]:
    xt, x0, log_snr = ids
    num_fields = len(GiddLoss._fields) + len(Gradient._fields)
    out = log_snr.new_empty((num_fields, len(xt)))
    for part in chunks(len(xt), size):
        losses, gradient = closed_form(
            rows_of(part), xt[part], x0[part], log_snr[part], schedule, vocab, beta_is
        )
        out[:, part] = torch.stack([*losses, *gradient])
    return GiddLoss(*out[: len(GiddLoss._fields)]), Gradient(*out[len(GiddLoss._fields) :])


class _OnLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, xt, x0, log_snr, schedule, vocab, beta_is):  # type: ignore[no-untyped-def]
        exact = log_snr.dtype
        ctx.size = tokens_per_chunk(vocab.width, None)

        def rows_of(part: slice) -> Tensor:
            return vocab.mask_(logits[part].to(exact, copy=True))

        losses, gradient = _forward(rows_of, ctx.size, (xt, x0, log_snr), schedule, vocab, beta_is)
        ctx.save_for_backward(logits, xt, x0, *gradient)
        ctx.vocab = vocab
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, upstream, *unused):  # type: ignore[no-untyped-def]
        logits, xt, x0, *scalars = ctx.saved_tensors
        gradient, vocab = Gradient(*scalars), ctx.vocab
        grad = torch.empty_like(logits)
        for part in chunks(len(xt), ctx.size):
            rows = vocab.mask_(logits[part].to(upstream.dtype, copy=True))
            of_part = Gradient(*(x[part] for x in gradient))
            grad[part] = gradient_rows(rows, xt[part], x0[part], of_part, upstream[part], vocab)
        return grad, *[None] * 6


class _FusedWithHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, xt, x0, log_snr, schedule, vocab, options):  # type: ignore[no-untyped-def]
        scale, beta_is, chunk_size, ctx.sum_hidden = options
        ctx.size = tokens_per_chunk(vocab.width, chunk_size)
        losses, gradient = _forward(
            lambda part: head_logits(hidden[part], weight, scale, vocab),
            ctx.size, (xt, x0, log_snr), schedule, vocab, beta_is,
        )  # fmt: skip
        ctx.save_for_backward(hidden, weight, xt, x0, *gradient)
        ctx.vocab, ctx.scale = vocab, scale
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, upstream, *unused):  # type: ignore[no-untyped-def]
        hidden, weight, xt, x0, *scalars = ctx.saved_tensors
        gradient, vocab = Gradient(*scalars), ctx.vocab

        def rows_of(part: slice) -> Tensor:
            rows = head_logits(hidden[part], weight, ctx.scale, vocab)
            of_part = Gradient(*(x[part] for x in gradient))
            return gradient_rows(rows, xt[part], x0[part], of_part, upstream[part], vocab)

        grads = head_backward(hidden, weight, rows_of, ctx.scale, ctx.size)
        if ctx.sum_hidden:
            vocab.sum_(grads[0])
        return *grads, *[None] * 6


def head_backward(
    hidden: Tensor, weight: Tensor, rows_of: Callable[[slice], Tensor], scale: float, size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden (partial on tp) and weight from chunks of logit gradients.

    The weight's gradient accumulates in float32 in place.
    """
    exact = work_dtype(hidden)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=exact)
    for part in chunks(len(hidden), size):
        rows = rows_of(part).mul_(scale).to(hidden.dtype)
        torch.mm(rows, weight, out=grad_hidden[part])
        if hidden.dtype == exact:
            grad_weight.addmm_(rows.t(), hidden[part])
        else:
            grad_weight += rows.t() @ hidden[part]
        # Or it would live on while the next chunk's logits are made.
        del rows
    return grad_hidden, grad_weight.to(weight.dtype)


def gidd_loss_chunked(
    logits: Tensor,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    *,
    tp_group: torch.distributed.ProcessGroup | None,
    beta_is: float,
) -> GiddLoss:
    exact = work_dtype(logits)
    vocab = VocabSlice.of(logits.shape[-1], schedule.vocab_size, schedule.mask_token_id, tp_group)
    flat = _OnLogits.apply(
        logits.reshape(-1, logits.shape[-1]), xt.reshape(-1), x0.reshape(-1),
        log_snr.reshape(-1).to(exact), schedule, vocab, beta_is,
    )  # fmt: skip
    return GiddLoss(*(x.view(xt.shape) for x in flat))


def linear_gidd_loss_chunked(
    hidden: Tensor,
    weight: Tensor,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    *,
    logit_scale: float,
    tp_group: torch.distributed.ProcessGroup | None,
    beta_is: float,
    chunk_size: int | None,
    partial_hidden_grad: bool,
) -> GiddLoss:
    exact = work_dtype(hidden)
    vocab = VocabSlice.of(weight.shape[0], schedule.vocab_size, schedule.mask_token_id, tp_group)
    options = (logit_scale, beta_is, chunk_size, not partial_hidden_grad)
    return GiddLoss(
        *_FusedWithHead.apply(hidden, weight, xt, x0, log_snr.to(exact), schedule, vocab, options)
    )
