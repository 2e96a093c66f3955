"""The passes fused by torch.compile: nothing is written but results.

Each is compiled once per dtype, for all sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.vocabulary import passes
from megatron_ext.kernels.vocabulary.passes import minus_log1p_series

PARTS = 8
"""Of a row, summed up together, then over the columns of a part: work to overlap in a processor,
and one logarithm for two columns, log u + log w = log(u w)."""
SMALL = 0.1
"""Below, v - log(1 + v) is its series."""


def _logits(rows: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return rows.to(bias.dtype) * scale + bias


def _pieces(rows: Tensor, bias: Tensor, scale: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First columns and logits of `PARTS` pieces of all rows."""
    width = rows.shape[1] // PARTS
    for first in (i * width for i in range(PARTS)):
        part = slice(first, first + width)
        yield first, _logits(rows[:, part], bias[part], scale)


def _statistics(rows: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    pieces = [logits for _, logits in _pieces(rows, bias, scale)]
    peak = reduce(torch.maximum, pieces).amax(-1).clamp_min(torch.finfo(bias.dtype).min)
    return peak, sum((logits - peak.unsqueeze(-1)).exp() for logits in pieces).sum(-1)  # type: ignore[union-attr]


def _tail_sums(
    rows: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    # int32 fills the vector registers that float32 does.
    column = torch.arange(rows.shape[1] // PARTS, dtype=torch.int32, device=rows.device)
    place, shift = skip.int().unsqueeze(-1), shift.unsqueeze(-1)
    f, tau, product = bias.new_zeros(()), bias.new_zeros(()), None
    for first, logits in _pieces(rows, bias, scale):
        v = torch.where(column + first == place, 0.0, (logits + shift).exp())
        u, is_small = 1 + v, v < SMALL
        inverse = 1 / u
        tau = tau + v * inverse
        # log(1 + v) = log u - ((u - 1) - v) / u to the last digit of u.
        f = f + torch.where(is_small, minus_log1p_series(v), v + ((u - 1) - v) * inverse)
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
    # By default the compiler writes values of many operations to memory before it sums them up.
    options = {"realize_opcount_threshold": 1000, "realize_reads_threshold": 1000}
    return torch.compile(function, dynamic=True, fullgraph=True, options=options)


def _whole(rows: Tensor) -> int:
    """Columns that make up whole parts; 0 where compiling for them is not worth it."""
    whole = rows.shape[1] // PARTS * PARTS
    return whole if len(rows) and whole > PARTS else 0


def statistics(rows: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    whole = _whole(rows)
    if 0 < whole == rows.shape[1]:
        return _compiled(_statistics)(rows, bias, scale)
    rest = passes.statistics(rows[:, whole:], bias[whole:], scale)
    if not whole:
        return rest
    most = _compiled(_statistics)(rows, bias, scale)
    peak = torch.maximum(most[0], rest[0])
    return peak, most[1] * (most[0] - peak).exp() + rest[1] * (rest[0] - peak).exp()


def tail_sums(
    rows: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    whole = _whole(rows)
    if 0 < whole == rows.shape[1]:
        return _compiled(_tail_sums)(rows, bias, scale, shift, skip)
    rest = passes.tail_sums(rows[:, whole:], bias[whole:], scale, shift, skip - whole)
    if not whole:
        return rest
    most = _compiled(_tail_sums)(rows, bias, scale, shift, skip)
    return most[0] + rest[0], most[1] + rest[1]


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
