"""FP8 products are products of what the recipe's rounding leaves of the operands.

The oracle rounds with Python's numbers: every code of a format is listed, and a value goes to the
nearest, ties to the even code. Scales follow from the recipes' formulas, computed one by one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import pytest
import torch

from megatron_ext.config import FP8_ALIGNMENT, Float8Format, Float8Recipe
from megatron_ext.kernels.float8 import (
    OPERANDS,
    CurrentScaling,
    DelayedScaling,
    Operand,
    dtype_of,
    float8_linear,
    quantize,
    quantize_blocks,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
FORMATS: tuple[Float8Format, ...] = ("e4m3", "hybrid")
CURRENT: tuple[Float8Recipe, ...] = ("tensorwise", "blockwise", "mxfp8")


def codes(dtype: torch.dtype) -> list[float]:
    """Non-negative finite numbers of a format by their code, from the bits."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if dtype == E4M3 else (5, 2, 15)
    steps = 2**mantissa_bits
    numbers = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, steps)
        if exponent == 0:
            numbers.append(mantissa / steps * 2.0 ** (1 - bias))
        else:
            numbers.append((1 + mantissa / steps) * 2.0 ** (exponent - bias))
    return [number for number in numbers if number <= LARGEST[dtype]]


CODES = {dtype: codes(dtype) for dtype in (E4M3, E5M2)}


def rounded(value: float, dtype: torch.dtype) -> float:
    """The nearest number of the format, ties to the even code, overflow to the largest."""
    numbers, size = CODES[dtype], abs(value)
    if size >= numbers[-1]:
        return math.copysign(numbers[-1], value)
    above = bisect_left(numbers, size)
    if above > 0:
        low, high = size - numbers[above - 1], numbers[above] - size
        if low < high or (low == high and above % 2 == 1):
            above -= 1
    return math.copysign(numbers[above], value)


def in_format(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """`x` as the recipe sees it with one scale for all of it, float64."""
    scaled = (x.float() * torch.tensor(scale)).double()
    return torch.tensor([rounded(v, dtype) for v in scaled.flatten().tolist()]).reshape(
        x.shape
    ).double() / float(torch.tensor(scale))


def current(
    x: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """`x` with a scale of its own, per tensor, or a power of two per block."""
    if block is None:
        return in_format(x, dtype, float(torch.tensor(LARGEST[dtype]) / x.float().abs().max()))
    result = torch.empty_like(x, dtype=torch.float64)
    for row in range(0, x.shape[0], block[0]):
        for column in range(0, x.shape[1], block[1]):
            part = x[row : row + block[0], column : column + block[1]]
            ratio = LARGEST[dtype] / float(part.float().abs().max())
            result[row : row + block[0], column : column + block[1]] = in_format(
                part, dtype, 2.0 ** math.floor(math.log2(ratio))
            )
    return result


def operands(size: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Input [2 size, size], weight [size, size] and gradient of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2 * size, size), (size, size), (2 * size, size))
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.mul(3).to(dtype), weight.mul(0.02).to(dtype), (grad**3).mul(1e-4).to(dtype)]


def results(x: Any, weight: Any, grad: Any, quantizer: Any) -> list[torch.Tensor]:
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    y = float8_linear(x, weight, quantizer)
    y.backward(grad)
    return [y.detach(), x.grad, weight.grad]


def assert_rounds_to(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """`actual` is `exact` up to one rounding to bfloat16 and a sum in float32."""
    for mine, theirs in zip(actual, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        bound = theirs.abs() * 2.0**-8 + theirs.abs().max() * 1e-6
        assert ((mine.double() - theirs).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounding_is_to_the_nearest_code_and_saturates(dtype: torch.dtype) -> None:
    numbers = torch.tensor(CODES[dtype])
    halves = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, halves, halves * 1.001, halves * 0.999, numbers[-1:] * 1.2])
    values = torch.cat([values, -values])
    values = torch.cat([values, torch.zeros(-len(values) % 16)]).reshape(-1, 16)
    found = quantize(values, dtype, torch.tensor(1.0)).dequantized()
    expected = [rounded(v, dtype) for v in values.double().flatten().tolist()]
    assert found.flatten().tolist() == expected


def test_gradients_are_wide_under_hybrid_and_everything_else_is_narrow() -> None:
    assert [dtype_of(x, "hybrid") for x in OPERANDS] == [E4M3, E4M3, E5M2]
    assert [dtype_of(x, "e4m3") for x in OPERANDS] == [E4M3, E4M3, E4M3]


@pytest.mark.parametrize("form", FORMATS)
def test_tensorwise_product_equals_the_hand_computation(form: Float8Format) -> None:
    x, weight, grad = operands(16)
    xs, ws = current(x, E4M3), current(weight, E4M3)
    gs = current(grad, dtype_of("gradient", form))
    exact = [xs @ ws.t(), gs @ ws, gs.t() @ xs]
    assert_rounds_to(results(x, weight, grad, CurrentScaling("tensorwise", form)), exact)


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_blocks_lie_along_the_sum_of_each_product(recipe: Float8Recipe) -> None:
    size = FP8_ALIGNMENT[recipe]
    x, weight, grad = operands(size)
    x[:, 1] *= 1000
    weight[1] *= 1000
    grad[3] *= 1000
    row, column = (1, size), (size, 1)
    of_weight = [(size, size)] * 2 if recipe == "blockwise" else [row, column]
    wide = dtype_of("gradient", "hybrid")
    exact = [
        current(x, E4M3, row) @ current(weight, E4M3, of_weight[0]).t(),
        current(grad, wide, row) @ current(weight, E4M3, of_weight[1]),
        current(grad, wide, column).t() @ current(x, E4M3, column),
    ]
    assert_rounds_to(results(x, weight, grad, CurrentScaling(recipe, "hybrid")), exact)


def test_a_block_scale_is_the_largest_power_of_two_without_overflow() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 64, generator=generator) * torch.logspace(-12, 12, 64)
    scale = quantize_blocks(x, E4M3, (1, 32)).scale
    largest = x.abs().view(64, 2, 32).amax(2)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (largest * scale <= 448).all()
    assert (largest * scale * 2 > 448).all()


@pytest.mark.parametrize("recipe", CURRENT)
def test_nothing_but_zeros_stays_zero(recipe: Float8Recipe) -> None:
    x, weight, grad = operands(FP8_ALIGNMENT[recipe])
    y, dx, dw = results(
        torch.zeros_like(x), weight, torch.zeros_like(grad), CurrentScaling(recipe, "e4m3")
    )
    assert not y.any() and not dx.any() and not dw.any()


@pytest.mark.parametrize("recipe", CURRENT)
def test_a_number_that_is_none_is_not_hidden(recipe: Float8Recipe) -> None:
    x, weight, grad = operands(FP8_ALIGNMENT[recipe])
    x[3, 5] = math.nan
    assert results(x, weight, grad, CurrentScaling(recipe, "hybrid"))[0][3].isnan().all()


@pytest.mark.parametrize("form", FORMATS)
def test_scaled_product_of_torch_agrees(form: Float8Format) -> None:
    """`torch._scaled_mm`, which takes FP8 operands and their scales, on the same numbers."""
    x, weight, grad = operands(32)
    found = results(x.float(), weight.float(), grad.float(), CurrentScaling("tensorwise", form))
    for mine, (left, right, first, second) in zip(
        found,
        [
            (x, weight.t(), "input", "weight"),
            (grad, weight, "gradient", "weight"),
            (grad.t(), x, "gradient", "input"),
        ],
        strict=True,
    ):
        a = quantize(left, dtype_of(first, form))
        b = quantize(right, dtype_of(second, form))
        theirs = torch._scaled_mm(
            a.values.contiguous(),
            b.values.t().contiguous().t(),
            scale_a=1 / a.scale.squeeze(),
            scale_b=1 / b.scale.squeeze(),
            out_dtype=torch.float32,
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def delayed(form: Float8Format = "hybrid", **options: Any) -> DelayedScaling:
    settings = {"length": 3, "uses_maximum": True, "margin": 0, "reduce": lambda amax: None}
    return DelayedScaling(form, **{**settings, **options})


class ByHand:
    """Delayed scaling of one operand, in Python's numbers."""

    def __init__(self, dtype: torch.dtype, length: int, uses_maximum: bool, margin: int) -> None:
        self.dtype, self.length, self.uses_maximum, self.margin = (
            dtype,
            length,
            uses_maximum,
            margin,
        )
        self.seen: list[float] = []
        self.scale = 1.0

    def record(self, amax: float) -> None:
        self.seen.append(amax)
        amax = max(self.seen[-self.length :]) if self.uses_maximum else amax
        if amax > 0:
            ratio = torch.tensor(LARGEST[self.dtype]) / torch.tensor(amax)
            self.scale = float(ratio) / 2**self.margin


@pytest.mark.parametrize(
    ("form", "length", "uses_maximum", "margin"),
    [
        ("hybrid", 3, True, 0),
        ("e4m3", 1, False, 1),
        ("hybrid", 1, True, 0),
        ("hybrid", 4, False, 0),
    ],
)
def test_delayed_scales_follow_earlier_calls(
    form: Float8Format, length: int, uses_maximum: bool, margin: int
) -> None:
    quantizer = delayed(form, length=length, uses_maximum=uses_maximum, margin=margin)
    hands = {x: ByHand(dtype_of(x, form), length, uses_maximum, margin) for x in OPERANDS}
    for step, size in enumerate((1.0, 8.0, 0.25, 0.5, 0.125, 0.0, 2.0)):
        values = [t * size for t in operands(16, seed=step)]
        quantizer.begin_step()
        xs, ws, gs = (
            in_format(t, hands[name].dtype, hands[name].scale)
            for name, t in zip(OPERANDS, values, strict=True)
        )
        assert_rounds_to(results(*values, quantizer), [xs @ ws.t(), gs @ ws, gs.t() @ xs])
        for name, t in zip(OPERANDS, values, strict=True):
            hands[name].record(float(t.float().abs().max()))
        assert quantizer.scale.tolist() == [hands[n].scale for n in OPERANDS]


def test_a_weight_is_rounded_alike_at_every_micro_batch_of_a_step() -> None:
    quantizer = delayed(length=1)
    x, weight, grad = operands(16)
    seen = []
    for step in range(2):
        quantizer.begin_step()
        for _ in range(3):
            results(x * (step + 1), weight * (step + 1), grad, quantizer)
            seen.append(quantizer("weight", weight, records=False).by_rows.scale.item())
    first = LARGEST[E4M3] / float(weight.float().abs().max())
    assert seen == pytest.approx([first] * 3 + [first / 2] * 3)
    again = quantizer("weight", weight, records=True).by_rows.scale.item()
    assert again == pytest.approx(first), "a step keeps the scale it began with"


def test_evaluation_leaves_delayed_scales_alone() -> None:
    quantizer = delayed()
    results(*operands(16), quantizer)
    before = quantizer.state()
    with torch.no_grad():
        x, weight, _ = operands(16, seed=7)
        float8_linear(x * 50, weight, quantizer)
    assert torch.equal(quantizer.state(), before)


@pytest.mark.parametrize("length", [2, 3, 8])
def test_a_saved_history_goes_on_in_a_window_of_another_length(length: int) -> None:
    whole, resumed = delayed(length=length), delayed(length=length)
    first = delayed(length=3)
    inputs = [operands(16, seed=seed)[0] * 10.0**-seed for seed in range(6)]
    for x in inputs[:4]:
        first("input", x, records=True)
    for x in inputs[4 - min(length, 3) + 1 : 4]:
        whole("input", x, records=True)
    resumed.load(first.state())
    assert resumed.scale[0] == first.scale[0]
    for x in inputs[4:]:
        for quantizer in (whole, resumed):
            quantizer("input", x, records=True)
        assert resumed.scale[0] == whole.scale[0]
    assert torch.equal(resumed.history[:, 0], whole.history[:, 0])


def test_ranks_share_the_largest_magnitude() -> None:
    quantizer = delayed(reduce=lambda amax: amax.fill_(100.0), uses_maximum=False)
    operand: Operand = "input"
    quantizer(operand, torch.ones(16, 16), records=True)
    assert quantizer.scale[0] == pytest.approx(4.48)
