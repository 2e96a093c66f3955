"""Next-token cross-entropy fused with the output head, vocabulary-parallel, in chunks of tokens.

The autoregressive baseline's loss on the diffusion loss's machinery and implementations, without
the tail's sums. Collectives over tp per chunk of n tokens: an all-gather of 2n floats forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.kernels.vocabulary.passes import Implementation, choose, is_gpu, passes_of
from megatron_ext.kernels.vocabulary.projection import HeadOptions, TokenLoss, loss_of_hidden
from megatron_ext.kernels.vocabulary.split_softmax import Gradient, SplitSoftmax, VocabSlice

IGNORED = -1
"""Target of a position without loss."""


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
    summed: bool = False,
    partial_hidden_grad: bool = False,
    weight_grad: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Negative log-likelihood [n] in nats of `targets` [n] int64 (-1: no loss).

    `hidden` [n, h] same on tp, `weight` [v_padded/tp, h] split on tp; both differentiable. The
    probability of `excluded_id` and of padding columns is zero. `summed`, `partial_hidden_grad`,
    `weight_grad` and `impl` as in `linear_gidd_loss`; there is no `reference`, torch's
    cross-entropy is that.
    """
    impl = choose(impl, hidden.device, hidden.dtype, vocab_size)
    vocab = VocabSlice.of(len(weight), vocab_size, excluded_id, tp_group)
    softmax = SplitSoftmax.of(
        vocab, passes_of("chunked" if impl == "reference" else impl), hidden, logit_scale
    )

    def evaluate(rows: Tensor, part: slice) -> tuple[tuple[Tensor], Gradient]:
        in_loss = targets[part] != IGNORED
        lse, (logit,) = softmax.log_sum_exp_and_picked(rows, [targets[part]])
        nll = torch.where(in_loss, lse - logit, 0.0)
        at_target = torch.where(in_loss, torch.expm1(-nll), 0.0)
        return (nll,), Gradient(lse, in_loss.to(lse.dtype), at_target, at_target)

    loss = TokenLoss(softmax, (targets, targets), evaluate)
    options = HeadOptions(
        chunk_size, summed, not partial_hidden_grad, weight_grad, is_gpu(impl, hidden.device)
    )
    (nll,) = loss_of_hidden(hidden, weight, loss, options)
    return nll
