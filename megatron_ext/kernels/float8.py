"""Matrix products of a linear layer with operands rounded to FP8, in plain torch on any device.

    x [n, i], weight [o, i], dy [n, o]      the three operands
    y  = x weight^T      dx = dy weight      dW = dy^T x

Every operand becomes 8-bit floating point numbers times a scale before it enters a product; the
product itself is taken in float32 and rounded once to the dtype of `x`. That is what a tensor core
does with exact accumulation. Scales, by recipe:

    tensorwise   one per tensor from its own largest magnitude: 448 / amax
    delayed      one per tensor from the largest magnitudes of earlier calls (`DelayedScaling`)
    blockwise    one per 1 x 128 (input, gradient) or 128 x 128 (weight), a power of two
    mxfp8        one per 1 x 32, a power of two

A block lies along the dimension that its product sums over, so an operand of two products is
rounded twice, once along each. Inputs and weights are E4M3; gradients are E5M2 under `hybrid`, E4M3
under `e4m3`. Conversions saturate. Rules after Transformer Engine 2.20 (`common/recipe`,
`pytorch/quantization.py`, `pytorch/custom_recipes`), its three hidden inputs left out: the
accumulator's width, the order of summation, and environment variables that change recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_ext.config import FP8_ALIGNMENT, Float8Format, Float8Recipe

Operand = Literal["input", "weight", "gradient"]
OPERANDS: tuple[Operand, ...] = ("input", "weight", "gradient")


def dtype_of(operand: Operand, form: Float8Format) -> torch.dtype:
    is_wide = form == "hybrid" and operand == "gradient"
    return torch.float8_e5m2 if is_wide else torch.float8_e4m3fn


class Float8(NamedTuple):
    """A matrix as FP8 numbers: `values` [r, c] divided by `scale`, one number per block."""

    values: Tensor
    scale: Tensor
    """float32 [r / block rows, c / block columns]; [1, 1] for the whole tensor."""

    def dequantized(self) -> Tensor:
        """The numbers that enter the product, in float32."""
        (rows, columns), (tall, wide) = self.values.shape, self.scale.shape
        blocks = self.values.float().view(tall, rows // tall, wide, columns // wide)
        return (blocks / self.scale[:, None, :, None]).view(rows, columns)


def scale_for(
    amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False, margin: int = 0
) -> Tensor:
    """Factor that brings `amax` `margin` doublings below the largest number of `dtype`, or 1."""
    # A Python number in front would become a product with the reciprocal, one rounding more.
    scale = torch.full_like(amax, torch.finfo(dtype).max / 2**margin) / amax
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, 1.0)


def _round(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return (x * scale).clamp(-largest, largest).to(dtype)


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Float8:
    """`x` [r, c] with one scale for all of it, its own unless one is given."""
    x = x.float()
    if scale is None:
        scale = scale_for(x.abs().amax(), dtype)
    return Float8(_round(x, scale, dtype), scale.reshape(1, 1))


def quantize_blocks(x: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Float8:
    """`x` [r, c] with a power of two per block; the block divides the shape."""
    (rows, columns), (tall, wide) = x.shape, block
    blocks = x.float().view(rows // tall, tall, columns // wide, wide)
    scale = scale_for(blocks.abs().amax(dim=(1, 3)), dtype, power_of_two=True)
    values = _round(blocks, scale[:, None, :, None], dtype)
    return Float8(values.view(rows, columns), scale)


class Pair(NamedTuple):
    """An operand for a product that sums over its columns, and for one that sums over its rows."""

    by_columns: Float8
    by_rows: Float8


class Quantizer(Protocol):
    """Rounds the operands of one linear layer."""

    def __call__(self, operand: Operand, x: Tensor, *, records: bool) -> Pair:
        """`records`: whether the call belongs to training and may change later scales."""
        ...


class CurrentScaling:
    """Scales from the tensor at hand: `tensorwise`, `blockwise` or `mxfp8`."""

    def __init__(self, recipe: Float8Recipe, form: Float8Format) -> None:
        assert recipe != "delayed", "it has a state"
        self.recipe, self.form = recipe, form

    def __call__(self, operand: Operand, x: Tensor, *, records: bool) -> Pair:
        del records
        dtype = dtype_of(operand, self.form)
        if self.recipe == "tensorwise":
            whole = quantize(x, dtype)
            return Pair(whole, whole)
        size = FP8_ALIGNMENT[self.recipe]
        if self.recipe == "blockwise" and operand == "weight":
            square = quantize_blocks(x, dtype, (size, size))
            return Pair(square, square)
        return Pair(quantize_blocks(x, dtype, (1, size)), quantize_blocks(x, dtype, (size, 1)))


class DelayedScaling:
    """One scale per tensor from the largest magnitudes of its last `length` calls.

    scale   [3]          float32   input, weight, gradient; the same on every rank of `reduce`
    history [length, 3]  float32   row 0 is the current call's; the newest of the others is last

    A call rounds with the scale that earlier calls left, so the first one has scale 1. `reduce`
    takes the maximum of a tensor over the ranks that share scales, in place. The weight keeps its
    scale from `begin_step` to the next and counts once, as Transformer Engine, which rounds it at
    a step's first micro-batch only: at the others its history moves on with a zero.
    """

    def __init__(
        self,
        form: Float8Format,
        *,
        length: int,
        uses_maximum: bool,
        margin: int,
        reduce: Callable[[Tensor], object],
        device: torch.device | str | int | None = None,
    ) -> None:
        self.form, self.length, self.uses_maximum, self.margin = form, length, uses_maximum, margin
        self.reduce = reduce
        self.scale = torch.ones(len(OPERANDS), device=device)
        self.history = torch.zeros(length, len(OPERANDS), device=device)
        self._weight_scale: Tensor | None = None

    def begin_step(self) -> None:
        """The weight has changed."""
        self._weight_scale = None

    def __call__(self, operand: Operand, x: Tensor, *, records: bool) -> Pair:
        index, dtype = OPERANDS.index(operand), dtype_of(operand, self.form)
        scale = self.scale[index].clone()
        if records:
            amax = x.float().abs().amax()
            if operand == "weight":
                if self._weight_scale is None:
                    self._weight_scale = scale
                else:
                    scale, amax = self._weight_scale, torch.zeros_like(amax)
            self._record(index, amax, dtype)
        whole = quantize(x, dtype, scale)
        return Pair(whole, whole)

    def _record(self, index: int, amax: Tensor, dtype: torch.dtype) -> None:
        self.reduce(amax)
        column = self.history[:, index]
        column[0] = amax
        amax = column.max() if self.uses_maximum else amax
        column.copy_(column.roll(-1))
        column[0] = 0.0
        is_usable = (amax > 0) & torch.isfinite(amax)
        scale = scale_for(amax, dtype, margin=self.margin)
        self.scale[index] = torch.where(is_usable, scale, self.scale[index])

    def state(self) -> Tensor:
        """[length + 1, 3] float32: the scales, then the history."""
        return torch.cat([self.scale.unsqueeze(0), self.history]).cpu()

    def load(self, state: Tensor) -> None:
        """Take a `state` over; of a history of another length the newest rows that fit."""
        scale, history = state[0], state[1:]
        rows = min(self.length, len(history)) - 1
        self.scale.copy_(scale)
        self.history.zero_()
        if rows:
            self.history[-rows:] = history[-rows:].to(self.history)
        self._weight_scale = None


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quantizer: Quantizer, records: bool) -> Tensor:
        inputs = quantizer("input", x, records=records)
        weights = quantizer("weight", weight, records=records)
        ctx.quantizer, ctx.dtypes = quantizer, (x.dtype, weight.dtype)
        ctx.save_for_backward(*inputs.by_rows, *weights.by_rows)
        y = inputs.by_columns.dequantized() @ weights.by_columns.dequantized().t()
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        saved = ctx.saved_tensors
        inputs, weights = Float8(*saved[:2]), Float8(*saved[2:])
        grads = ctx.quantizer("gradient", grad, records=True)
        grad_x = grads.by_columns.dequantized() @ weights.dequantized()
        grad_weight = grads.by_rows.dequantized().t() @ inputs.dequantized()
        return grad_x.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None, None


def float8_linear(x: Tensor, weight: Tensor, quantizer: Quantizer) -> Tensor:
    """`x` [..., i] times `weight` [o, i] transposed, both rounded, as are gradients on their way.

    Every dimension, and the number of rows of `x`, is a multiple of the recipe's `FP8_ALIGNMENT`.
    """
    rows = x.reshape(-1, x.shape[-1])
    # Inside an autograd function gradients are always off.
    y = _Float8Linear.apply(rows, weight, quantizer, torch.is_grad_enabled())
    return y.unflatten(0, x.shape[:-1])
