"""Matrix products alone: the floor under everything that is made of them.

A linear layer of n tokens from width i to width o is three products, the output [n, o], the
gradient of the input [n, i] and that of the weight [o, i], of 2 n i o operations each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixProduct:
    """`left` [m, k] times `right` [k, n], either stored transposed; `times` of them in a run."""

    m: int
    n: int
    k: int
    left_transposed: bool = False
    right_transposed: bool = False
    times: int = 1

    @property
    def flops(self) -> int:
        """Multiplications and additions of all of them."""
        return 2 * self.m * self.n * self.k * self.times

    @property
    def stored_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the operands, as they lie in memory."""
        left = (self.k, self.m) if self.left_transposed else (self.m, self.k)
        right = (self.n, self.k) if self.right_transposed else (self.k, self.n)
        return left, right

    def operands(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """[m, k] and [k, n], views of tensors of the stored shapes."""
        return (
            left.t() if self.left_transposed else left,
            right.t() if self.right_transposed else right,
        )


def linear_products(
    num_tokens: int, width_in: int, width_out: int, times: int = 1
) -> list[MatrixProduct]:
    """The three products of a linear layer's forward and backward pass, as torch lays them out."""
    return [
        MatrixProduct(num_tokens, width_out, width_in, right_transposed=True, times=times),
        MatrixProduct(num_tokens, width_in, width_out, times=times),
        MatrixProduct(width_out, width_in, num_tokens, left_transposed=True, times=times),
    ]


def multiply(products: Sequence[MatrixProduct], dtype: torch.dtype) -> Callable[[], None]:
    """A call that does all of the products into memory that exists already; for `alternate`.

    Operands of one stored shape are one tensor, as are results: less memory, and less to read.
    """
    stored: dict[tuple[int, int], Tensor] = {}
    results: dict[tuple[int, int], Tensor] = {}
    work = []
    for product in products:
        for shape in product.stored_shapes:
            if shape not in stored:
                stored[shape] = torch.randn(shape).to(dtype)
        left, right = product.operands(*(stored[shape] for shape in product.stored_shapes))
        shape = (product.m, product.n)
        out = results.setdefault(shape, torch.empty(shape, dtype=dtype))
        work.append((left, right, out, product.times))

    def run() -> None:
        for left, right, out, times in work:
            for _ in range(times):
                torch.mm(left, right, out=out)

    return run


def multiply_flops(products: Sequence[MatrixProduct]) -> int:
    """Operations of one call of `multiply`."""
    return sum(product.flops for product in products)


def multiply_elements(products: Sequence[MatrixProduct]) -> int:
    """Numbers that `multiply` holds."""
    stored = {shape for product in products for shape in product.stored_shapes}
    results = {(product.m, product.n) for product in products}
    return sum(rows * columns for shapes in (stored, results) for rows, columns in shapes)
