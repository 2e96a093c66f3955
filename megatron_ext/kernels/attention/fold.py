"""The key/value token folded into attention over the other keys, exactly, without a longer key.

    query, output  [s_q, b, a, d]   lse [b, a, s_q] float32 (float64): log-sum-exp over the keys
    k_bias, v_bias [a, d]           one more key and value that every query sees

A softmax over keys and token is the two softmaxes weighted by their sums of exponentials:

    s = cap(q . k_bias / sqrt(d)),   w = 1 / (1 + exp(lse - s)),   lse' = log(exp(lse) + exp(s)),
    output' = (1 - w) output + w v_bias

Backwards, the gradient of a score is p (grad . value - grad . output') with p = exp(score - lse'):
it needs nothing of the other keys but output' and lse'. So a kernel's backward pass for its own
keys, given output' and lse' in place of its own output and lse, returns their exact gradients,
although it knows nothing of the token; the token's are added by the same formula.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class Kernel(Protocol):
    """Attention over the keys alone."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output [s_q, b, a, d] and log-sum-exp [b, a, s_q]."""
        ...

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key, value from output and log-sum-exp over all keys there are."""
        ...


def token_score(query: Tensor, k_bias: Tensor, softcap: float | None) -> Tensor:
    """Score [s_q, b, a] of the token, float32 (float64 for float64), differentiable."""
    exact = torch.promote_types(query.dtype, torch.float32)
    product = torch.einsum("sbad,ad->sba", query.to(exact), k_bias.to(exact))
    score = product * (1.0 / math.sqrt(query.shape[-1]))
    return score if softcap is None else softcap * torch.tanh(score / softcap)


def fold_token(output: Tensor, lse: Tensor, score: Tensor, v_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Output [s_q, b, a, d] and log-sum-exp [b, a, s_q] in float64 with the token; differentiable.

    A rounding of a log-sum-exp is an error of all of a query's weights; these numbers are few.
    """
    score, lse = score.double(), lse.double()
    difference = score - lse.permute(2, 0, 1)
    exact = torch.promote_types(output.dtype, torch.float32)
    token, keys = (torch.sigmoid(x).to(exact).unsqueeze(-1) for x in (difference, -difference))
    folded = keys * output + token * v_bias.to(exact)
    return folded.to(output.dtype), torch.logaddexp(lse, score.permute(1, 2, 0))


def token_gradients(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    k_bias: Tensor,
    v_bias: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The token's part of the gradient of `query`, and the gradients of `k_bias` and `v_bias`.

    `output` and `lse`, float64, are those with the token.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    query, grad, k_bias = query.to(exact), grad.to(exact), k_bias.to(exact)
    score = token_score(query, k_bias, softcap)
    weight = torch.exp(score.double() - lse.permute(2, 0, 1)).to(exact)
    value_part = torch.einsum("sbad,ad->sba", grad, v_bias.to(exact))
    change = weight * (value_part - torch.einsum("sbad,sbad->sba", grad, output.to(exact)))
    if softcap is not None:
        change = change * (1 - (score / softcap).square())
    change = change * (1.0 / math.sqrt(query.shape[-1]))
    # By sequence first: a plain sum over all tokens loses digits.
    k_bias_grad = torch.einsum("sba,sbad->bad", change, query).sum(0)
    v_bias_grad = torch.einsum("sba,sbad->bad", weight, grad).sum(0)
    return change.unsqueeze(-1) * k_bias, k_bias_grad, v_bias_grad


class _Folded(torch.autograd.Function):
    """A kernel with the key/value token; saves its inputs, output and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_bias: Tensor | None,
        v_bias: Tensor | None,
        kernel: Kernel,
        softcap: float | None,
    ) -> Tensor:
        output, lse = kernel.forward(query, key, value)
        if k_bias is not None and v_bias is not None:
            score = token_score(query, k_bias, softcap)
            output, lse = fold_token(output, lse, score, v_bias)
        ctx.save_for_backward(query, key, value, k_bias, v_bias, output, lse)
        ctx.kernel, ctx.softcap = kernel, softcap
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, k_bias, v_bias, output, lse = ctx.saved_tensors
        exact = torch.promote_types(query.dtype, torch.float32)
        gradients = ctx.kernel.backward(grad, query, key, value, output, lse.to(exact))
        if k_bias is None:
            return *gradients, None, None, None, None
        query_part, k_bias_grad, v_bias_grad = token_gradients(
            grad, query, output, lse, k_bias, v_bias, ctx.softcap
        )
        query_grad = (gradients[0] + query_part).to(query.dtype)
        biases = k_bias_grad.to(k_bias.dtype), v_bias_grad.to(v_bias.dtype)
        return query_grad, *gradients[1:], *biases, None, None


def folded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    kernel: Kernel,
    softcap: float | None,
) -> Tensor:
    """[s_q, b, a, d] in the dtype of `query`; differentiable in every float input."""
    return _Folded.apply(query, key, value, k_bias, v_bias, kernel, softcap)
