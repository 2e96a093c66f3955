"""The attention core: soft-capped, with a key/value token and visibility, in several ways.

    query          [s_q, b, a, d]     any float dtype; output alike
    key, value     [s_k, b, a, d]     s_k > s_q where cp cuts the sequence
    visibility     [b, 2, s_k] int32  level and document of every key (`diffusion.visibility`), or
                   [b, s_q, s_k] bool any pattern; absent for everywhere
    k_bias, v_bias [a, d]             a key and value that every query sees, at no position

`impl`: `reference` is the definition, with dense scores and mask; `blocked` plain torch in blocks
of queries; `sdpa` torch's fused attention, where there is no soft cap; `flex` compiled
FlexAttention; `flash` flash-attn. `auto` is the fastest of them here. `te` is known and refused:
`choose` says why. No process group: with context parallelism the caller gathers keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.diffusion.visibility import attention_mask_from_visibility
from megatron_ext.kernels.attention.blocked import attention_blocked
from megatron_ext.kernels.attention.choose import (
    Implementation,
    choose_attention,
    for_pattern,
)
from megatron_ext.kernels.attention.described import DescribedFlash, require_fake
from megatron_ext.kernels.attention.flash import FlashKernel, flash_library
from megatron_ext.kernels.attention.flex import attention_flex
from megatron_ext.kernels.attention.fold import folded_attention
from megatron_ext.kernels.attention.pieces import Rules
from megatron_ext.kernels.attention.reference import attention_reference
from megatron_ext.kernels.attention.sdpa import FusedCpuKernel, attention_sdpa

__all__ = [
    "Implementation",
    "attention",
    "attention_reference",
    "choose_attention",
    "for_pattern",
]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Tensor | None = None,
    *,
    first_query: int = 0,
    causal: bool = False,
    causal_prompt: bool = False,
    softcap: float | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Return [s_q, b, a, d] in the dtype of `query`; differentiable in every float input.

    `first_query` is the position of the first query among the keys. `causal` hides later keys from
    every query, `causal_prompt` from those of the prompt; a bool `visibility` says all there is to
    say, so neither applies to it. Every query must see a key, as it does under integers. Raises
    `ValueError` where `impl` cannot do this here.
    """
    inputs = (query, key, value, k_bias, v_bias)
    is_pattern = visibility is not None and visibility.dtype == torch.bool
    impl = choose_attention(
        impl, device=query.device, dtype=query.dtype, head_width=query.shape[-1], softcap=softcap,
        trains=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs),
    )  # fmt: skip
    if is_pattern and for_pattern(impl) != impl:
        raise ValueError(f"impl is {impl!r}: it takes visibility as integers, not as a bool mask")
    if visibility is None and causal:
        visibility = torch.zeros(query.shape[1], 2, len(key), dtype=torch.int32)
    rules = Rules() if is_pattern else Rules(first_query, causal, causal_prompt)
    seen = {"visibility": visibility, "rules": rules}
    match impl:
        case "reference":
            mask = _dense_mask(query, visibility, rules)
            return attention_reference(
                query, key, value, mask, softcap=softcap, k_bias=k_bias, v_bias=v_bias
            )
        case "blocked":
            return attention_blocked(*inputs, **seen, softcap=softcap)
        case "flex":
            return attention_flex(*inputs, **seen, softcap=softcap)
        case "flash":
            kernel = FlashKernel(**seen, softcap=softcap, library=flash_library())
            return folded_attention(*inputs, kernel, softcap)
        case "described":
            require_fake(query)
            return folded_attention(
                *inputs, FlashKernel(**seen, softcap=softcap, library=DescribedFlash), softcap
            )
        case "sdpa" if query.device.type == "cpu":
            return folded_attention(*inputs, FusedCpuKernel(**seen), softcap)
        case "sdpa":
            mask = _dense_mask(query, visibility, rules)
            return attention_sdpa(query, key, value, mask, k_bias, v_bias)
    raise AssertionError(f"no such implementation: {impl}")


def _dense_mask(query: Tensor, visibility: Tensor | None, rules: Rules) -> Tensor | None:
    """bool [b, s_q, s_k] on the device of `query`; absent where everything is visible."""
    if visibility is None or visibility.dtype == torch.bool:
        return visibility
    mask = attention_mask_from_visibility(
        visibility.to(query.device), causal=rules.causal, causal_prompt=rules.causal_prompt
    )
    return mask[:, rules.first_query : rules.first_query + len(query)]
