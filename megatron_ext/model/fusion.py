"""Work between a layer's matrix products, fused by torch.compile on request.

Uncompiled, norms, rotary embedding, squared ReLU and residual sum write every intermediate result
to memory, and keep it for the backward pass. They hold no collective and no other module's weights,
so that they compile in every layout, whichever module does the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_ext.config import PrecisionConfig, require
from megatron_ext.kernels.vocabulary.passes import has_compiler


def require_compiler(precision: PrecisionConfig) -> None:
    """Raise `ValueError` where --compile-layers asks for what this machine does not have."""
    is_met = find_spec("triton") is not None if torch.cuda.is_available() else has_compiler()
    require(
        is_met or not precision.compile_layers, "compile_layers", True,
        "torch.compile needs triton on GPUs and a C++ compiler on CPUs; install it, or give "
        "--no-compile-layers.",
    )  # fmt: skip


def fused(function: Callable, is_compiled: bool, *, kept: tuple[int, ...]) -> Callable:
    """`function`, or its compiled form, one for all layers.

    `kept` are the positions of the arguments that the compiled backward pass reads. Fake tensors,
    which torch.compile does not take, go by it: dry runs see what the compiled function allocates,
    reads, writes and keeps.
    """
    return _compiled(function, kept) if is_compiled else function


@cache
def _compiled(function: Callable, kept: tuple[int, ...]) -> Callable:
    # Whole, or an error: one that quietly ran uncompiled would need more memory than planned.
    compiled = torch.compile(function, fullgraph=True)

    def run(first: Tensor, *others: Any) -> Tensor:
        if isinstance(first, FakeTensor):
            return _Described.apply(function, kept, first, *others)
        return compiled(first, *others)

    return run


@torch.library.custom_op("megatron_ext::described_fusion", mutates_args=())
def described_fusion(read: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """New tensors of the shapes of `like`, written by one kernel that reads `read`."""
    raise AssertionError("fake tensors never get here")


@described_fusion.register_fake
def _(read: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    del read
    return [torch.empty_like(x) for x in like]


class _Described(torch.autograd.Function):
    """A compiled function that computes nothing; its backward pass writes every gradient."""

    @staticmethod
    def forward(ctx: Any, function: Callable, kept: tuple[int, ...], *arguments: Any) -> Tensor:
        with _disable_current_modes():
            result = function(*arguments)
        ctx.save_for_backward(*(arguments[i] for i in kept))
        ctx.shapes = [
            (x.shape, x.dtype) if isinstance(x, Tensor) and x.requires_grad else None
            for x in arguments
        ]
        return described_fusion([x for x in arguments if isinstance(x, Tensor)], [result])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with _disable_current_modes():
            like = [grad.new_empty(s[0], dtype=s[1]) for s in ctx.shapes if s is not None]
        gradients = iter(described_fusion([grad, *ctx.saved_tensors], like))
        return None, None, *(next(gradients) if s is not None else None for s in ctx.shapes)
