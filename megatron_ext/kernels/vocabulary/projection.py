"""A per-token loss of logits as an autograd function: of given logits, or of logits made in chunks.

    hidden   [n, h]           same on tp
    weight   [v_padded/tp, h] rows of the output head, split on tp
    rows     [c, v_padded/tp] logits of a chunk of tokens in the dtype of `hidden`, one buffer

With the output head fused, logits exist for a chunk of tokens at a time. If the losses are only
added up (`summed`), their gradient is known in the forward pass, where it takes the place of the
chunk's logits and is multiplied out at once: three matrix products in all. Otherwise the backward
pass makes the logits again, a fourth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ext.diffusion.objective import work_dtype
from megatron_ext.kernels.vocabulary.split_softmax import Gradient, SplitSoftmax

CHUNK_BYTES, GPU_CHUNK_BYTES = 128 << 20, 2 << 30
"""Of a chunk's logits in float32, by default."""
MOST_TOKENS, GPU_MOST_TOKENS = 1024, 4096
SHARE_ELEMENTS = 1 << 22
"""Of the weight's gradient that a CPU multiplies out at a time before it adds it up in float32."""


class TokenLoss(NamedTuple):
    """A loss as a function of logits."""

    softmax: SplitSoftmax
    ids: tuple[Tensor, Tensor]
    """x0 and xt [n], where the gradient is not that of the softmax alone."""
    evaluate: Callable[[Tensor, slice], tuple[tuple[Tensor, ...], Gradient]]
    """(rows, which tokens they are of) -> values per token, of which the first is differentiable,
    and its gradient."""

    def write_gradient(
        self, rows: Tensor, out: Tensor, gradient: Gradient, part: slice, upstream: Tensor | None
    ) -> None:
        ids = self.ids[0][part], self.ids[1][part]
        self.softmax.write_gradient(rows, out, gradient, ids, upstream)


class HeadOptions(NamedTuple):
    """How to work through the tokens."""

    chunk_size: int | None
    """Tokens whose logits exist at a time."""
    summed: bool
    """The caller adds the losses up: all of them have one and the same gradient."""
    sum_hidden_grad: bool
    """Sum the gradient of `hidden` over tp; else it is partial on tp."""
    weight_grad: Tensor | None = None
    """Where the weight's gradient is added, in the dtype of sums; else autograd gets it."""
    on_gpu: bool = False


def tokens_per_chunk(width: int, chunk_size: int | None, on_gpu: bool = False) -> int:
    """Tokens whose logits exist at a time.

    On CPUs the default is 16 to 1024: below 256 rows the matrix product re-reads the head's weight
    more than it computes, above 1024 nothing is gained. On GPUs it is up to 4096: with every chunk
    of c tokens 12 bytes move per weight, as its share of the gradient is added up, while 6 c FLOPs
    are computed. At 600 TFLOP/s and 3.3 TB/s that takes 1.4 times as long as the products at
    c = 256, and 9 % at 4096.
    """
    if chunk_size is not None:
        return chunk_size
    num_bytes, most = (GPU_CHUNK_BYTES, GPU_MOST_TOKENS) if on_gpu else (CHUNK_BYTES, MOST_TOKENS)
    return min(max(num_bytes // (4 * max(width, 1)), 16), most)


def loss_of_logits(logits: Tensor, loss: TokenLoss) -> tuple[Tensor, ...]:
    """Values [n] of `logits` [n, v/tp]."""
    return _OfLogits.apply(logits, loss)


def loss_of_hidden(
    hidden: Tensor, weight: Tensor, loss: TokenLoss, options: HeadOptions
) -> tuple[Tensor, ...]:
    """Values [n] of logits `hidden @ weight.T`."""
    return _OfHidden.apply(hidden, weight, loss, options)


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: TokenLoss) -> tuple[Tensor, ...]:  # type: ignore[override]
        values, gradient = loss.evaluate(logits, slice(None))
        ctx.save_for_backward(logits, *(x for x in gradient if x is not None))
        ctx.loss = loss
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, *gradient = ctx.saved_tensors
        grad = torch.empty_like(logits)
        ctx.loss.write_gradient(logits, grad, Gradient(*gradient), slice(None), upstream)
        return grad, None


class _OfHidden(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, loss: TokenLoss, options: HeadOptions
    ) -> tuple[Tensor, ...]:
        ctx.loss, ctx.options = loss, options
        ctx.is_made = options.summed and any(ctx.needs_input_grad[:2])
        grads = HeadGradients(hidden, weight, options) if ctx.is_made else None
        values, gradients = [], []
        for part, rows in chunks_of_logits(hidden, weight, options):
            value, gradient = loss.evaluate(rows, part)
            values.append(value)
            if grads is not None:
                loss.write_gradient(rows, rows, gradient, part, None)
                grads.add(rows, part)
            else:
                gradients.append(gradient)
        if grads is not None:
            ctx.save_for_backward(*grads.finished())
        else:
            fields = (x for x in zip(*gradients, strict=True) if x[0] is not None)
            ctx.save_for_backward(hidden, weight, *(torch.cat(x) for x in fields))
        outputs = tuple(torch.cat(x) for x in zip(*values, strict=True))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = (_scaled if ctx.is_made else _made_again)(ctx, upstream)
        if grad_weight is None:
            # Of no value, but hooks of the weight wait for it.
            grad_weight = torch.empty_like(ctx.options.weight_grad, dtype=grad_hidden.dtype)
        if ctx.options.sum_hidden_grad:
            ctx.loss.softmax.vocab.sum_(grad_hidden)
        return grad_hidden, grad_weight, None, None


def _scaled(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients that the forward pass made, times the one factor of all losses."""
    grad_hidden, grad_weight = ctx.saved_tensors
    # What was added elsewhere was added as it is.
    first = upstream[:1] if grad_weight is not None else torch.ones_like(upstream[:1])
    # A step that went wrong upstream is for the caller to find: NaN is no broken promise, it stays.
    is_kept = (upstream == first) | upstream.isnan() | first.isnan()
    torch._assert_async(
        is_kept.all(),
        "the losses were announced as summed, but their gradients differ, or are not 1 though "
        "weight_grad has been added to",
    )
    factor = first.sum() + 0 * upstream.sum()
    # In place: a second backward pass through this node raises, as autograd sees the change.
    grad_hidden.mul_(factor.to(grad_hidden.dtype))
    if grad_weight is not None:
        grad_weight.mul_(factor.to(grad_weight.dtype))
    return grad_hidden, grad_weight


def _made_again(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
    hidden, weight, *fields = ctx.saved_tensors
    gradient, loss = Gradient(*fields), ctx.loss
    grads = HeadGradients(hidden, weight, ctx.options)
    for part, rows in chunks_of_logits(hidden, weight, ctx.options):
        of_part = Gradient(*(None if x is None else x[part] for x in gradient))
        loss.write_gradient(rows, rows, of_part, part, upstream[part])
        grads.add(rows, part)
    return grads.finished()


def chunks_of_logits(
    hidden: Tensor, weight: Tensor, options: HeadOptions
) -> Iterator[tuple[slice, Tensor]]:
    """Unscaled logits of consecutive tokens, in one buffer; one chunk where there is no token."""
    num_tokens, width = len(hidden), len(weight)
    size = tokens_per_chunk(width, options.chunk_size, options.on_gpu)
    buffer = hidden.new_empty((min(size, num_tokens), width))
    for first in range(0, max(num_tokens, 1), size):
        part = slice(first, min(first + size, num_tokens))
        yield part, torch.mm(hidden[part], weight.t(), out=buffer[: part.stop - first])


class HeadGradients:
    """Gradients of hidden (partial on tp) and weight from chunks of logit gradients.

    The weight's accumulates in float32 in place, in `options.weight_grad` where that is given.
    Matrix products of lower precision round a chunk's share of it once: a GPU the whole share, a
    CPU, which adds numbers of two types through a copy in the wider one, a piece at a time.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, options: HeadOptions) -> None:
        self.inputs = hidden, weight
        self.hidden = torch.empty_like(hidden)
        self.is_own = options.weight_grad is None
        self.weight = options.weight_grad
        if self.weight is None:
            self.weight = torch.zeros_like(weight, dtype=work_dtype(weight))
        self.share = None
        if self.weight.dtype != weight.dtype:
            piece = max(SHARE_ELEMENTS // weight.shape[1], 1)
            self.share = torch.empty_like(weight if options.on_gpu else weight[:piece])

    def add(self, rows: Tensor, part: slice) -> None:
        hidden, weight = self.inputs
        torch.mm(rows, weight, out=self.hidden[part])
        if self.share is None:
            self.weight.addmm_(rows.t(), hidden[part])
            return
        for first in range(0, len(weight), len(self.share)):
            ids = slice(first, min(first + len(self.share), len(weight)))
            share = self.share[: ids.stop - first]
            self.weight[ids] += torch.mm(rows[:, ids].t(), hidden[part], out=share)

    def finished(self) -> tuple[Tensor, Tensor | None]:
        """In the dtypes of the inputs; no weight's where that was added elsewhere."""
        return self.hidden, self.weight.to(self.inputs[1].dtype) if self.is_own else None
