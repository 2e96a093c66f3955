"""Attention in blocks of queries, in plain torch: scores exist for one block at a time.

    query, output [s_q, b, a, d], key and value [s_k, b, a, d]   float64, float32 or 16 bits
    top, total    [b, a, s_q, 1]   largest score, and sum of exp(score - top)

The forward pass keeps its inputs, `top` and `total`; the backward pass computes scores again. A
block fits a core's cache per thread: on CPUs the passes over scores in memory, above all over
fresh memory, cost more than the products. Products are in the dtype of the inputs, everything else
in float32 (float64 for float64). tanh goes through expm1, and exp through exp2, which torch's CPU
kernels compute several times faster.

The key/value token is one more score per query and joins a sequence's sums after its blocks. The
backward pass normalises with the numbers of the forward pass and sums weight x gradient itself;
kernels that keep a log-sum-exp and the rounded output instead lose digits of the gradients of
queries and keys where a softmax is saturated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ext.kernels.attention.pieces import Piece, Rules, make_pieces

_SCORES_PER_THREAD = 2**18
"""Scores of a block for each thread: 1 MiB in float32."""
_MIN_QUERIES = 128
"""Shorter blocks make slow matrix products; heads are split first."""
_LOG2E = 1 / math.log(2)


def attention_blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    *,
    visibility: Tensor | None,
    rules: Rules,
    softcap: float | None,
) -> Tensor:
    """Return [s_q, b, a, d] in the dtype of `query`; differentiable in every float input.

    A query that sees nothing, not even a token, gets zero.
    """
    return _Blocked.apply(query, key, value, k_bias, v_bias, visibility, rules, softcap)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, k_bias, v_bias, visibility, rules, softcap = inputs
        work = _Work(query, key, visibility, rules, softcap)
        token = _Token.of(k_bias, v_bias, work.dtype)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        num_queries, batch, heads, _ = query.shape
        top, total = query.new_empty(2, batch, heads, num_queries, 1, dtype=work.dtype)
        for row, blocks in work.rows():
            q, k, v = (_by_head(x, row) for x in (query, key, value))
            weighted = torch.empty_like(q, dtype=work.dtype)
            for block in blocks:
                work.attend(block, q, k, v, weighted, top[row], total[row])
            if token is not None:
                work.add_token(token, q, weighted, top[row], total[row])
            floor = torch.finfo(work.dtype).tiny
            output[:, row] = weighted.div_(total[row].clamp(min=floor)).transpose(0, 1)
        ctx.save_for_backward(query, key, value, k_bias, v_bias, top, total)
        ctx.visibility, ctx.rules, ctx.softcap = visibility, rules, softcap
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, k_bias, v_bias, top, total = ctx.saved_tensors
        work = _Work(query, key, ctx.visibility, ctx.rules, ctx.softcap)
        token = _Token.of(k_bias, v_bias, work.dtype)
        grads = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        ]
        token_grads = None if token is None else [torch.zeros_like(x) for x in token]
        sums = query.new_empty(2, query.shape[2], query.shape[3], len(key), dtype=work.dtype)
        for row, blocks in work.rows():
            q, k, v, g = (_by_head(x, row) for x in (query, key, value, grad))
            q_grad, delta = torch.empty_like(q, dtype=work.dtype), torch.zeros_like(top[row])
            sums.zero_()
            saved = (top[row], total[row].reciprocal())
            if token is not None:
                share = work.token_share(token, q, g, *saved)
                delta += share.weight * share.change
            for block in blocks:
                work.differentiate(block, q, k, v, g, *saved, delta, q_grad, *sums)
            if token is not None:
                work.differentiate_token(token, share, q, g, delta, q_grad, *token_grads)
            grads[0][:, row] = q_grad.transpose(0, 1)
            for result, total_grad in zip(grads[1:], sums, strict=True):
                result[:, row] = total_grad.permute(2, 0, 1)
        biases = (None, None)
        if token_grads is not None:
            biases = (token_grads[0].squeeze(-1).to(k_bias), token_grads[1].squeeze(1).to(v_bias))
        return *grads, *biases, None, None, None


def _exp(x: Tensor) -> Tensor:
    """exp(x) in place."""
    return x.mul_(_LOG2E).exp2_()


def _by_head(x: Tensor, row: int) -> Tensor:
    """[a, s, d] of one sequence, contiguous: products of strided bfloat16 are slow on CPUs."""
    return x[:, row].transpose(0, 1).contiguous()


class _Token(NamedTuple):
    """The learned key and value."""

    key: Tensor
    """[a, d, 1]."""
    value: Tensor
    """[a, 1, d]."""

    @classmethod
    def of(cls, k_bias: Tensor | None, v_bias: Tensor | None, dtype: torch.dtype) -> _Token | None:
        if k_bias is None or v_bias is None:
            return None
        return cls(k_bias.to(dtype).unsqueeze(-1), v_bias.to(dtype).unsqueeze(1))


class _Share(NamedTuple):
    """The token's part in a sequence's softmax, each [a, s, 1]."""

    weight: Tensor
    slope: Tensor
    """1 - tanh^2, or 1."""
    change: Tensor
    """Gradient of the weight."""


class _Block(NamedTuple):
    """A piece for some of the heads."""

    queries: tuple[slice, slice]
    keys: tuple[slice, slice]
    piece: Piece


class _Work:
    """Buffers of one call, large enough for its blocks, and the arithmetic on them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        visibility: Tensor | None,
        rules: Rules,
        softcap: float | None,
    ) -> None:
        num_queries, batch, heads, width = query.shape
        num_keys = len(key)
        self.softcap = softcap
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.is_exact = self.dtype == query.dtype
        self.scale = 1 / math.sqrt(width)
        threads = torch.get_num_threads() if query.device.type == "cpu" else 64
        budget = _SCORES_PER_THREAD * threads
        num_heads = min(max(1, budget // (_MIN_QUERIES * num_keys)), heads)
        longest = min(max(_MIN_QUERIES, budget // (num_heads * num_keys)), num_queries)
        self._parts = [slice(h, min(h + num_heads, heads)) for h in range(0, heads, num_heads)]
        self._pieces = make_pieces(visibility, (batch, num_queries, num_keys), rules, longest)
        size = num_heads * longest * num_keys
        self._buffers = query.new_empty(3, size, dtype=self.dtype)
        self._low = None if self.is_exact else query.new_empty(size)

    def rows(self) -> Iterator[tuple[int, list[_Block]]]:
        """Sequences and their blocks; every query of every head is in one of them."""
        for row, pieces in groupby(self._pieces, key=lambda piece: piece.row):
            yield (
                row,
                [
                    _Block((part, piece.queries), (part, piece.keys), piece)
                    for piece in pieces
                    for part in self._parts
                ],
            )

    def attend(
        self, block: _Block, q: Tensor, k: Tensor, v: Tensor,
        weighted: Tensor, top: Tensor, total: Tensor,
    ) -> None:  # fmt: skip
        """Fill in the block's rows of weights x values [a, s, d], `top` and `total` [a, s, 1]."""
        scores, _ = self._scores(block, q, k)
        best = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(self.dtype).min)
        _exp(scores.sub_(best))
        weighted[block.queries] = self._product(self._rounded(scores), v[block.keys])
        top[block.queries], total[block.queries] = best, scores.sum(-1, keepdim=True)

    def differentiate(
        self, block: _Block, q: Tensor, k: Tensor, v: Tensor, g: Tensor,
        top: Tensor, inverse: Tensor, delta: Tensor,
        q_grad: Tensor, k_grad: Tensor, v_grad: Tensor,
    ) -> None:  # fmt: skip
        """Add the block's gradients; those of keys and values are [a, d, s_k].

        `inverse` is 1 / `total`, `delta` the sum of weight x its gradient, added to what is there.
        """
        at, sums = block.queries, (block.keys[0], slice(None), block.keys[1])
        scores, slope = self._scores(block, q, k)
        weight = _exp(scores.sub_(top[at])).mul_(inverse[at])
        self._add_product(v_grad[sums], g[at].transpose(1, 2), self._rounded(weight))
        buffer = self._buffer(2, weight.shape)
        change = self._product(g[at], v[block.keys].transpose(1, 2), buffer).mul_(weight)
        delta[at] += change.sum(-1, keepdim=True)
        change.sub_(weight.mul_(delta[at]))
        if slope is not None:
            change.mul_(slope)
        rounded = self._rounded(change.mul_(self.scale))
        q_grad[at] = self._product(rounded, k[block.keys])
        self._add_product(k_grad[sums], q[at].transpose(1, 2), rounded)

    def add_token(
        self, token: _Token, q: Tensor, weighted: Tensor, top: Tensor, total: Tensor
    ) -> None:
        """Count the token among a sequence's keys."""
        score, _ = self._token_score(token, q)
        best = torch.maximum(top, score)
        keys, extra = torch.exp(top - best), torch.exp(score - best)
        weighted.mul_(keys).add_(extra * token.value)
        total.mul_(keys).add_(extra)
        top.copy_(best)

    def token_share(
        self, token: _Token, q: Tensor, g: Tensor, top: Tensor, inverse: Tensor
    ) -> _Share:
        score, slope = self._token_score(token, q)
        change = g.to(self.dtype) @ token.value.transpose(1, 2)
        return _Share(torch.exp(score - top) * inverse, slope, change)

    def differentiate_token(
        self, token: _Token, share: _Share, q: Tensor, g: Tensor, delta: Tensor,
        q_grad: Tensor, key_grad: Tensor, value_grad: Tensor,
    ) -> None:  # fmt: skip
        """Add a sequence's gradients through the token."""
        change = share.weight * (share.change - delta) * share.slope * self.scale
        q_grad.add_(change * token.key.transpose(1, 2))
        key_grad.add_(q.to(self.dtype).transpose(1, 2) @ change)
        value_grad.add_(share.weight.transpose(1, 2) @ g.to(self.dtype))

    def _token_score(self, token: _Token, q: Tensor) -> tuple[Tensor, Tensor]:
        """Score [a, s, 1] and 1 - tanh^2."""
        score = (q.to(self.dtype) @ token.key) * self.scale
        if self.softcap is None:
            return score, torch.ones_like(score)
        bounded = torch.tanh(score / self.softcap)
        return bounded * self.softcap, 1 - bounded.square()

    def _scores(self, block: _Block, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """[h, n, m], minus infinity where hidden, and 1 - tanh^2 if capped."""
        q, k = q[block.queries], k[block.keys].transpose(1, 2)
        shape = (*q.shape[:2], k.shape[2])
        scores, slope = self._buffer(0, shape), None
        scale = self.scale if self.softcap is None else 2 * self.scale
        # The scalar of a division is exact, that of a product rounded: a bias in all scores.
        if self.is_exact and self.softcap is not None:
            torch.bmm(q.mul(scale).div_(self.softcap), k, out=scores)
        elif self.is_exact:
            torch.baddbmm(scores, q, k, beta=0, alpha=scale, out=scores)
        else:
            self._product(q, k, scores).mul_(scale / (self.softcap or 1.0))
        if self.softcap is not None:
            self._tanh_of_half(scores)
            slope = self._buffer(1, shape)
            torch.mul(scores, scores, out=slope).neg_().add_(1.0)
            scores.mul_(self.softcap)
        hidden = block.piece.hidden(q.device)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        return scores, slope

    def _tanh_of_half(self, x: Tensor) -> None:
        """tanh(x / 2) in place."""
        if self.is_exact:
            # Of |x|, as the rounding of expm1 counts twice below zero. Beyond 80, tanh is one and
            # expm1 nearly infinite.
            size, spare = (self._buffer(index, x.shape) for index in (1, 2))
            torch.abs(x, out=size).clamp_(max=80.0).expm1_()
            size.div_(torch.add(size, 2.0, out=spare))
            torch.copysign(size, x, out=x)
        else:
            # 1 - 2 / (e^x + 1) cancels near zero, below what scores of 16 bits resolve.
            x.mul_(_LOG2E).exp2_().add_(1.0).reciprocal_().mul_(-2.0).add_(1.0)

    def _buffer(self, index: int, shape: tuple[int, ...]) -> Tensor:
        return self._buffers[index, : math.prod(shape)].view(shape)

    def _rounded(self, x: Tensor) -> Tensor:
        """`x` in the dtype of the inputs, valid until the next call."""
        return x if self._low is None else self._low[: x.numel()].view(x.shape).copy_(x)

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b, rounded to the dtype of the inputs, in `self.dtype`."""
        if self.is_exact:
            return torch.bmm(a, b, out=out)
        if out is None:
            return torch.bmm(a, b).to(self.dtype)
        assert self._low is not None
        low = self._low[: out.numel()].view(out.shape)
        return out.copy_(torch.bmm(a, b, out=low))

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b."""
        if self.is_exact:
            total.baddbmm_(a, b)
        else:
            total.add_(torch.bmm(a, b))
