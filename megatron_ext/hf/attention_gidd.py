"""Attention of the Hugging Face model: rotary positions, masks, and three ways to compute it.

    query             [b, a, s, d]
    key, value        [b, a, t, d]
    mask              [b, 1, s, t] bool  which keys each query may attend to; absent for all
    result            [b, a, s, d]

`attend_eager` is the definition, with a soft cap on the scores before the mask.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


def rotary_angles(positions: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [b, 1, s, d / 2] float32 at `positions` [b, s]; computed, never stored."""
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions[:, None, :, None].float() * (1.0 / base**exponent)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `x` [b, a, s, d], first half against second half."""
    cos, sin = angles
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attention_probs(
    query: Tensor, key: Tensor, mask: Tensor | None, soft_cap: float | None
) -> Tensor:
    """Scores, soft cap, mask, softmax: [b, a, s, t] in float32 at least."""
    scores = query @ key.transpose(-1, -2) * (1.0 / math.sqrt(query.shape[-1]))
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    exact = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=exact)


def attend_eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, soft_cap: float | None
) -> Tensor:
    """The definition."""
    return attention_probs(query, key, mask, soft_cap).to(value.dtype) @ value


def attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, soft_cap: float | None
) -> Tensor:
    """torch's fused attention, which has no soft cap."""
    if soft_cap:
        raise ValueError(
            f"attn_performer is 'sdpa' with attn_soft_cap {soft_cap}: that computes without the "
            "cap; use 'eager' or 'flex'."
        )
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, soft_cap: float | None
) -> Tensor:
    """FlexAttention: one fused kernel with cap and mask; compiled at first use of a shape."""

    def score(value: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if soft_cap:
            value = soft_cap * torch.tanh(value / soft_cap)
        if mask is not None:
            value = torch.where(mask[b, 0, q, k], value, torch.finfo(value.dtype).min)
        return value

    return _compiled_flex()(query, key, value, score_mod=score)


def key_mask(attention_mask: Tensor | None, num_queries: int, num_extra: int) -> Tensor | None:
    """bool [b, 1, s, t] from a mask of keys [b, t] or of pairs [b, s, t] (or [b, 1, s, t]).

    `num_extra` keys in front (the learned key) are always attended to.
    """
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if mask.dim() == 2:
        mask = mask[:, None, :].expand(-1, num_queries, -1)
    if mask.dim() == 4:
        mask = mask[:, 0]
    return nn.functional.pad(mask, (num_extra, 0), value=True).unsqueeze(1)


ATTENTION = {"eager": attend_eager, "sdpa": attend_sdpa, "flex": attend_flex}
