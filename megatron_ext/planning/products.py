"""The work of operations as they happen: FLOPs of matrix products, bytes of everything else.

A product counts two for each multiplication and addition. By kind: `head` are the products with
the vocabulary, `attention` those of queries, keys, weights and values (and of the key/value token),
`layers` all others. What is no product takes time by its bytes: tensors read and tensors written,
each operation by itself, as eager execution does it; what `--compile-layers` compiles is one.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import torch

from megatron_ext.kernels.attention.described import FLASH_OPERATIONS
from megatron_ext.planning.watch import Phase

Kind = Literal["layers", "attention", "head"]

_FACTORS_FIRST = {
    # packet: position of the first of the two factors
    torch.ops.aten.mm: 0,
    torch.ops.aten.bmm: 0,
    torch.ops.aten.addmm: 1,
    torch.ops.aten.addmm_: 1,
    torch.ops.aten.baddbmm: 1,
    torch.ops.aten.baddbmm_: 1,
}
_FREE = {
    torch.ops.aten.detach, torch.ops.aten.empty, torch.ops.aten.empty_like,
    torch.ops.aten.new_empty, torch.ops.aten.empty_strided, torch.ops.aten._unsafe_view,
    torch.ops.aten._local_scalar_dense, torch.ops.aten._assert_async,
}  # fmt: skip
_OVERWRITING = {torch.ops.aten.zero_, torch.ops.aten.fill_, torch.ops.aten.copy_}
"""Do not read the tensor that they write."""
_BATCHED = {torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.baddbmm_}


class ProductCounts:
    """FLOPs by (kind, phase); an observer of `Watch`."""

    def __init__(self) -> None:
        self.flops: Counter[tuple[Kind, Phase]] = Counter()

    def observe(self, function: Any, arguments: tuple[Any, ...], result: Any, phase: Phase) -> None:
        del result
        packet = function.overloadpacket
        position = _FACTORS_FIRST.get(packet)
        if position is not None:
            left, right = arguments[position : position + 2]
            kind: Kind = "attention" if packet in _BATCHED else "layers"
            self.flops["head" if phase == "loss" else kind, phase] += (
                2 * math.prod(left.shape) * right.shape[-1]
            )
        elif packet in FLASH_OPERATIONS:
            self.flops["attention", phase] += FLASH_OPERATIONS[packet](*arguments)


class TrafficCounts:
    """Bytes that operations other than products read and write, by phase; an observer."""

    def __init__(self) -> None:
        self.num_bytes: Counter[Phase] = Counter()

    def observe(self, function: Any, arguments: tuple[Any, ...], result: Any, phase: Phase) -> None:
        packet = function.overloadpacket
        is_free = function.is_view or packet in _FREE or function.namespace != "aten"
        if packet is torch.ops.megatron_ext.described_fusion:
            self.num_bytes[phase] += _bytes_of(arguments[0]) + _bytes_of(result)
        elif not is_free and packet not in _FACTORS_FIRST:
            read = arguments[1:] if packet in _OVERWRITING else arguments
            self.num_bytes[phase] += _bytes_of(read) + _bytes_of(result)


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_bytes_of(part) for part in value)
    return 0
