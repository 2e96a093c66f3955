"""Rotary position embedding, half-split ("neox") over the whole head width, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_width: int, base: float) -> Tensor:
    """Angles [s, 1, d / 2] in float32 of `positions` [s], or [s, b, d / 2] of [b, s].

    angle = p base^(-2i / d) with d the head width.
    """
    exponent = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / base ** (exponent / head_width)
    by_position = positions.unsqueeze(0) if positions.dim() == 1 else positions
    return by_position.t().unsqueeze(-1).float() * frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [s, b, a, d] by angles whose cosines and sines are [s, 1 or b, d / 2], float32.

    The result has the dtype of `x`.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(exact).unsqueeze(2) for part in (cos, sin))
    first, second = x.to(exact).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
