"""torch's FlexAttention, compiled: soft cap as a score function, visibility as a block mask.

The block mask is built once per batch from two integers per position, through a mask [b, s_q, s_k]
that exists only meanwhile. On CUDA the key/value token is folded in through the log-sum-exp, whose
gradient FlexAttention propagates. On CPUs it returns no log-sum-exp and has no backward pass (torch
2.13), so there it serves inference, with the token as an additional key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from megatron_ext.kernels.attention.fold import fold_token, token_score
from megatron_ext.kernels.attention.pieces import Rules, remembered


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(torch_flex.flex_attention, dynamic=False)


@lru_cache
def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del b, h, q, k
        return softcap * torch.tanh(score / softcap)

    return score


@remembered
def _block_mask(
    visibility: Tensor,
    shape: tuple[int, int, int],
    rules: Rules,
    num_extra: int,
    device: torch.device,
) -> Any:
    """Block mask of `shape` = (sequences, queries, keys); `num_extra` keys in front are visible."""
    visibility = visibility.to(device)

    def from_pattern(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del h
        return (k < num_extra) | visibility[b, q, (k - num_extra).clamp(min=0)]

    def from_integers(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del h
        query, key = q + rules.first_query, (k - num_extra).clamp(min=0)
        level, document = visibility[b, 0], visibility[b, 1]
        allowed = (level[query] >= level[key]) & (document[query] == document[key])
        if rules.causal:
            allowed = allowed & (query >= key)
        elif rules.causal_prompt:
            allowed = allowed & ((query >= key) | (level[query] > 0))
        return (k < num_extra) | allowed

    is_pattern = visibility.dtype == torch.bool
    return torch_flex.create_block_mask(
        from_pattern if is_pattern else from_integers,
        shape[0], None, shape[1], shape[2] + num_extra, device=device,
    )  # fmt: skip


def attention_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    *,
    visibility: Tensor | None,
    rules: Rules,
    softcap: float | None,
    function: Callable[..., Any] | None = None,
) -> Tensor:
    """Return [s_q, b, a, d] in the dtype of `query`; differentiable where FlexAttention is.

    `function` replaces the compiled `flex_attention`.
    """
    shape = (query.shape[1], len(query), len(key))
    has_token = k_bias is not None and v_bias is not None
    returns_lse = query.device.type != "cpu" or function is not None
    num_extra = int(has_token and not returns_lse)
    if num_extra:
        key, value = (
            torch.cat([bias.to(x.dtype).expand(1, *x.shape[1:]), x])
            for bias, x in ((k_bias, key), (v_bias, value))
        )
    options: dict[str, Any] = {"score_mod": _capped(softcap)}
    if visibility is not None:
        options["block_mask"] = _block_mask(visibility, shape, rules, num_extra, query.device)
    inputs = tuple(x.permute(1, 2, 0, 3) for x in (query, key, value))
    if not has_token or num_extra:
        return (function or _compiled())(*inputs, **options).permute(2, 0, 1, 3)
    output, lse = _with_lse(function or _compiled(), *inputs, **options)
    score = token_score(query, k_bias, softcap)
    return fold_token(output.permute(2, 0, 1, 3), lse, score, v_bias)[0]


def _with_lse(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> Any:
    """Output and log-sum-exp; older versions of torch ask for it by another name."""
    if hasattr(torch_flex, "AuxRequest"):
        request = torch_flex.AuxRequest(lse=True)
        output, extra = function(*inputs, **options, return_aux=request)
        return output, extra.lse
    return function(*inputs, **options, return_lse=True)
