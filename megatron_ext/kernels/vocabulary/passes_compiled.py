"""The passes fused by torch.compile: nothing is written but results.

Each is compiled once per dtype, for all sizes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.vocabulary import passes
from megatron_ext.kernels.vocabulary.passes import minus_log1p


def _logits(rows: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return rows.to(bias.dtype) * scale + bias


def _statistics(rows: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    logits = _logits(rows, bias, scale)
    peak = logits.amax(-1).clamp_min(torch.finfo(logits.dtype).min)
    return peak, (logits - peak.unsqueeze(-1)).exp().sum(-1)


def _tail_sums(
    rows: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    v = (_logits(rows, bias, scale) + shift.unsqueeze(-1)).exp()
    # int32 fills the vector registers that float32 does.
    column = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    v = torch.where(column == skip.int().unsqueeze(-1), 0.0, v)
    return minus_log1p(v).sum(-1), (v / (1 + v)).sum(-1)


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
    log_r: Tensor,
    weight_tau: Tensor,
) -> None:
    log_p = _logits(rows, bias, scale) - lse.unsqueeze(-1)
    tau = torch.sigmoid(log_p + log_r.unsqueeze(-1))
    out.copy_(log_p.exp() * weight_p.unsqueeze(-1) - tau * weight_tau.unsqueeze(-1))


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
    if rows.numel() == 0:
        return passes.tail_sums(rows, bias, scale, shift, skip)
    return _compiled(_tail_sums)(rows, bias, scale, shift, skip)


def gradient(
    rows: Tensor,
    out: Tensor,
    bias: Tensor,
    scale: Tensor,
    lse: Tensor,
    weight_p: Tensor,
    log_r: Tensor | None,
    weight_tau: Tensor | None,
) -> None:
    if rows.numel() == 0:
        return
    if log_r is None or weight_tau is None:
        _compiled(_gradient_p)(rows, out, bias, scale, lse, weight_p)
    else:
        _compiled(_gradient)(rows, out, bias, scale, lse, weight_p, log_r, weight_tau)
