"""The passes as Triton kernels, one program per row of logits (and per block of a row's gradient).

A program walks a row in blocks of `BLOCK` columns: 4096 columns on 8 warps are 16 columns per
thread, four 128-bit loads in float32 and two in bfloat16, which leaves the registers for as many
blocks at a time as a multiprocessor can hold and hides the latency of memory behind them. A chunk
of logits has 256 rows and more, a wave of programs on every current GPU. The second and third pass
find a row of 131,072 bfloat16 columns (256 KiB) in the L2 cache, since all the rows in flight
(132 x 256 KiB on an H100) fit there.

Sums are float32: a tree within a block, then over the blocks of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _load(rows, bias, scale, row, column, width, stride):
    inside = column < width
    x = tl.load(rows + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    return x * scale + tl.load(bias + column, mask=inside, other=-float("inf"))


@triton.jit
def statistics_kernel(rows, bias, scale, peak, total, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale)
    # The lowest finite number, so that a row of nothing but minus infinity makes no NaN.
    highest = -3.4028234663852886e38
    added = 0.0
    for first in range(0, width, BLOCK):
        x = _load(rows, bias, factor, row, first + tl.arange(0, BLOCK), width, stride)
        new = tl.maximum(highest, tl.max(x, 0))
        added = added * tl.exp(highest - new) + tl.sum(tl.exp(x - new), 0)
        highest = new
    tl.store(peak + row, highest)
    tl.store(total + row, added)


@triton.jit
def tail_sums_kernel(
    rows, bias, scale, shift, skip, sum_f, sum_tau, width, stride, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale)
    add = tl.load(shift + row)
    skipped = tl.load(skip + row)
    f = 0.0
    tau = 0.0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        v = tl.exp(_load(rows, bias, factor, row, column, width, stride) + add)
        v = tl.where(column == skipped, 0.0, v)
        u = 1.0 + v
        # log(1 + v) with the rounding of 1 + v taken off.
        large = v - (tl.log(u) - ((u - 1.0) - v) / u)
        series = v * v * (0.5 - v * (0.3333333333333333 - v * (0.25 - v * 0.2)))
        f += tl.sum(tl.where(v < 2e-2, series, large), 0)
        tau += tl.sum(v / u, 0)
    tl.store(sum_f + row, f)
    tl.store(sum_tau + row, tau)


@triton.jit
def gradient_kernel(  # noqa: PLR0913
    rows, out, bias, scale, lse, weight_p, r, weight_v,
    width, stride, out_stride, HAS_TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    log_p = _load(rows, bias, tl.load(scale), row, column, width, stride) - tl.load(lse + row)
    p = tl.exp(log_p)
    weight = tl.load(weight_p + row)
    if HAS_TAIL:
        weight -= tl.load(weight_v + row) / (1.0 + tl.load(r + row) * p)
    place = out + row * out_stride + column
    tl.store(place, (weight * p).to(out.dtype.element_ty), mask=column < width)


def statistics(rows: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    peak, total = bias.new_empty((2, len(rows)))
    if len(rows):
        statistics_kernel[(len(rows),)](
            rows, bias, scale, peak, total, rows.shape[1], rows.stride(0),
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return peak, total


def tail_sums(
    rows: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    sum_f, sum_tau = bias.new_empty((2, len(rows)))
    if len(rows):
        tail_sums_kernel[(len(rows),)](
            rows, bias, scale, shift.contiguous(), skip.contiguous(), sum_f, sum_tau,
            rows.shape[1], rows.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return sum_f, sum_tau


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
    if not rows.numel():
        return
    has_tail = r is not None and weight_v is not None
    grid = (len(rows), triton.cdiv(rows.shape[1], BLOCK))
    gradient_kernel[grid](
        rows, out, bias, scale, lse.contiguous(), weight_p.contiguous(),
        r.contiguous() if has_tail else lse, weight_v.contiguous() if has_tail else lse,
        rows.shape[1], rows.stride(0), out.stride(0),
        HAS_TAIL=has_tail, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
