"""The passes for fake tensors: what the GPU kernels return and allocate, and no numbers.

For dry runs of GPU runs on machines without one (`megatron_ext.planning`).
"""

from __future__ import annotations

from torch import Tensor

from megatron_ext.kernels.attention.described import require_fake


def statistics(rows: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    del scale
    require_fake(rows)
    return tuple(bias.new_empty((2, len(rows))))


def tail_sums(
    rows: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    del shift, skip
    return statistics(rows, bias, scale)


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
    del out, bias, scale, lse, weight_p, r, weight_v
    require_fake(rows)
