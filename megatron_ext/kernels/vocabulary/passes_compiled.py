"""The passes fused by torch.compile: nothing is written but results.

Each is compiled once per dtype, for all sizes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.vocabulary import passes
from megatron_ext.kernels.vocabulary.passes import minus_log1p_series

PARTS = 4
"""Of a row, walked through together in the sums: half as many logarithms, and more to overlap."""
SMALL = 0.1
"""Below, v - log(1 + v) is its series."""


def _logits(rows: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return rows.to(bias.dtype) * scale + bias


def _statistics(rows: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    logits = _logits(rows, bias, scale)
    peak = logits.amax(-1).clamp_min(torch.finfo(logits.dtype).min)
    return peak, (logits - peak.unsqueeze(-1)).exp().sum(-1)


def _tail_sums(
    rows: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """Of columns `PARTS` at a time, a part of the row apart, in pairs: log u + log w = log(u w)."""
    width = rows.shape[1] // PARTS
    # int32 fills the vector registers that float32 does.
    column = torch.arange(width, dtype=torch.int32, device=rows.device)
    place, shift = skip.int().unsqueeze(-1), shift.unsqueeze(-1)
    f, tau, product = bias.new_zeros(()), bias.new_zeros(()), None
    for i in range(PARTS):
        part = slice(i * width, (i + 1) * width)
        v = (_logits(rows[:, part], bias[part], scale) + shift).exp()
        v = torch.where(column + i * width == place, 0.0, v)
        u, is_small = 1 + v, v < SMALL
        tau = tau + v / u
        # log(1 + v) = log u - ((u - 1) - v) / u to the last digit of u.
        f = f + torch.where(is_small, minus_log1p_series(v), v + ((u - 1) - v) / u)
        u = torch.where(is_small, 1.0, u)
        if product is None:
            product = u
        else:
            f, product = f - (product * u).log(), None
    return f.sum(-1), tau.sum(-1)


def _gradient_p(
    rows: Tensor, out: Tensor, bias: Tensor, scale: Tensor, lse: Tensor, weight_p: Tensor
) -> None:
    log_p = _logits(rows, bias, scale) - lse.unsqueeze(-1)
    out.copy_(log_p.exp() * weight_p.unsqueeze(-1))


def _gradient(
    rows: Tensor,
    out: Tensor,
    bias: Tensor,
    scale: Tensor,
    lse: Tensor,
    weight_p: Tensor,
    r: Tensor,
    weight_v: Tensor,
) -> None:
    p = (_logits(rows, bias, scale) - lse.unsqueeze(-1)).exp()
    weight = weight_p.unsqueeze(-1) - weight_v.unsqueeze(-1) / (1 + r.unsqueeze(-1) * p)
    out.copy_(p * weight)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True, fullgraph=True)


def statistics(rows: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if rows.numel() == 0:
        return passes.statistics(rows, bias, scale)
    return _compiled(_statistics)(rows, bias, scale)


def tail_sums(
    rows: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    whole = rows.shape[1] // PARTS * PARTS
    if len(rows) == 0 or whole == PARTS:
        whole = 0
    if whole:
        f, tau = _compiled(_tail_sums)(rows, bias, scale, shift, skip)
    if whole == rows.shape[1]:
        return f, tau
    rest = passes.tail_sums(rows[:, whole:], bias[whole:], scale, shift, skip - whole)
    return (f + rest[0], tau + rest[1]) if whole else rest


def gradient(
    rows: Tensor,
    out: Tensor,
    bias: Tensor,
    scale: Tensor,
    lse: Tensor,
    weight_p: Tensor,
    r: Tensor | None,
    weight_v: Tensor | None,
) -> None:
    if rows.numel() == 0:
        return
    if r is None or weight_v is None:
        _compiled(_gradient_p)(rows, out, bias, scale, lse, weight_p)
    else:
        _compiled(_gradient)(rows, out, bias, scale, lse, weight_p, r, weight_v)
