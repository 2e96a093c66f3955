"""Next-token cross-entropy fused with the output head, vocabulary-parallel, in chunks of tokens.

The autoregressive baseline's loss on the same machinery as the diffusion loss: logits exist for a
chunk at a time, forward and (computed again) backward. Collectives over tp per chunk of n tokens:
an all-gather of 2n floats forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.diffusion.objective import work_dtype
from megatron_ext.kernels.gidd_loss.chunked import chunks, head_backward, head_logits
from megatron_ext.kernels.vocab_parallel import VocabSlice, tokens_per_chunk

IGNORED = -1
"""Target of a position without loss."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, vocab, options):  # type: ignore[no-untyped-def]
        scale, chunk_size, ctx.sum_hidden = options
        ctx.size = tokens_per_chunk(vocab.width, chunk_size)
        exact = work_dtype(hidden)
        lse, nll = hidden.new_empty((2, len(targets)), dtype=exact)
        for part in chunks(len(targets), ctx.size):
            logits = head_logits(hidden[part], weight, scale, vocab)
            lse[part], picked = vocab.log_sum_exp_and_picked(logits, [targets[part]])
            nll[part] = torch.where(targets[part] == IGNORED, 0.0, lse[part] - picked[0])
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.vocab, ctx.scale = vocab, scale
        return nll

    @staticmethod
    def backward(ctx: Any, upstream):  # type: ignore[no-untyped-def]
        hidden, weight, targets, lse = ctx.saved_tensors
        vocab = ctx.vocab
        upstream = torch.where(targets == IGNORED, 0.0, upstream)

        def rows_of(part: slice) -> Tensor:
            logits = head_logits(hidden[part], weight, ctx.scale, vocab)
            rows = logits.sub_(lse[part].unsqueeze(-1)).exp_().mul_(upstream[part].unsqueeze(-1))
            column, here = vocab.local(targets[part])
            addend = torch.where(here, -upstream[part], 0.0)
            return rows.scatter_add_(-1, column.unsqueeze(-1), addend.unsqueeze(-1))

        grads = head_backward(hidden, weight, rows_of, ctx.scale, ctx.size)
        if ctx.sum_hidden:
            vocab.sum_(grads[0])
        return *grads, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    logit_scale: float = 1.0,
    excluded_id: int | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    chunk_size: int | None = None,
    partial_hidden_grad: bool = False,
) -> Tensor:
    """Negative log-likelihood [n] in nats of `targets` [n] int64 (-1: no loss).

    `hidden` [n, h] same on tp, `weight` [v_padded/tp, h] split on tp; both differentiable. The
    probability of `excluded_id` and of padding columns is zero.
    """
    vocab = VocabSlice.of(weight.shape[0], vocab_size, excluded_id, tp_group)
    options = (logit_scale, chunk_size, not partial_hidden_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab, options)
