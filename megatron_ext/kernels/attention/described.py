"""flash-attn's kernels for fake tensors: what they return, allocate and multiply, and no numbers.

For dry runs of GPU runs on machines without one (`megatron_ext.planning`): everything around the
kernels is the real code of `flash`. The log-sum-exp and the float32 sum of the queries' gradient
are flash-attn's own. Assumes that every query sees every key, the most there can be to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_BLOCK = 128
"""Sequences are padded to this in the backward kernel's float32 buffers."""


def require_fake(tensor: Tensor) -> None:
    """Raise `ValueError` for a tensor with numbers in it."""
    if not isinstance(tensor, FakeTensor):
        raise ValueError("impl is 'described': it computes nothing; it serves dry runs only.")


@torch.library.custom_op("megatron_ext::described_flash_forward", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    require_fake(query)
    raise AssertionError("fake tensors never get here")


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    del key, value, num_keys
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return torch.empty_like(query), lse


@torch.library.custom_op("megatron_ext::described_flash_backward", mutates_args=())
def _backward(grad: Tensor, query: Tensor, num_keys: int) -> list[Tensor]:
    require_fake(query)
    raise AssertionError("fake tensors never get here")


@_backward.register_fake
def _(grad: Tensor, query: Tensor, num_keys: int) -> list[Tensor]:
    del grad, num_keys
    rows, heads, width = query.shape
    padded = rows + _BLOCK
    return [
        query.new_empty(padded, heads, -(-width // 32) * 32, dtype=torch.float32),
        query.new_empty(heads, padded, dtype=torch.float32),
    ]


class DescribedFlash:
    """The part of flash-attn's Python interface that `FlashKernel` calls."""

    @staticmethod
    def _flash_attn_varlen_forward(
        query: Tensor, key: Tensor, value: Tensor, *, max_seqlen_k: int, **unused: Any
    ) -> tuple[Tensor, Tensor]:
        del unused
        return _forward(query, key, value, max_seqlen_k)

    @staticmethod
    def _flash_attn_varlen_backward(
        grad: Tensor, query: Tensor, *tensors: Tensor, max_seqlen_k: int, **unused: Any
    ) -> None:
        del tensors, unused
        _backward(grad, query, max_seqlen_k)


def _products(number: int, query: Tensor, num_keys: int) -> int:
    return number * 2 * query.numel() * num_keys


FLASH_OPERATIONS = {
    torch.ops.megatron_ext.described_flash_forward: lambda q, k, v, n: _products(2, q, n),
    # The scores again, and the gradients of values, weights, queries and keys.
    torch.ops.megatron_ext.described_flash_backward: lambda g, q, n: _products(5, q, n),
}
"""FLOPs of each operation by its arguments."""
