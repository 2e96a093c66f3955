"""RMSNorm with a float32 gain, and its variant over a width that is split on tp.

    y = g x / sqrt(mean(x^2) + eps),  g = 1 + weight when the gain is zero-centred

Statistics and gain are float32 (float64 for float64 inputs); the result has the input's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.model.fusion import fused
from megatron_ext.parallel.collectives import all_reduce_sum

from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # isort: skip


def rms_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """`x` [..., h] normalised over its last dimension, times offset + weight [h]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    gain = weight.to(exact) + offset
    return torch.nn.functional.rms_norm(x.to(exact), gain.shape, gain, eps).to(x.dtype)


def sums_of_squares(query: Tensor, key: Tensor) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    return torch.stack([x.to(exact).square().sum((-2, -1)) for x in (query, key)])


def scale(x: Tensor, mean_square: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    exact = mean_square.dtype
    return (x.to(exact) * torch.rsqrt(mean_square + eps) * (weight.to(exact) + offset)).to(x.dtype)


class RMSNorm(torch.nn.Module):
    """Norm over the last dimension of [s, b, h]; built by megatron-core's specs.

    `weight` [h] float32, same on tp. Under sequence parallelism its gradient is partial on tp and
    marked so that megatron-core reduces it.
    """

    is_compiled = False

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm = fused(rms_norm, self.is_compiled, kept=(0, 1))
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.offset, self.eps)


class CompiledRMSNorm(RMSNorm):
    """A class of its own, for specs."""

    is_compiled = True


class SplitRMSNorm(torch.nn.Module):
    """RMSNorm of queries and keys over the full width while each tp rank holds its heads.

    `weight` [width/tp] float32, split on tp. One all-reduce of two numbers per token serves
    queries and keys together (`normalize_pair`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        width: int,
        eps: float,
        tp_group: torch.distributed.ProcessGroup,
        is_compiled: bool,
    ) -> None:
        super().__init__()
        self.width, self.eps, self.tp_group = width, eps, tp_group
        self.scale = fused(scale, is_compiled, kept=(0, 1, 2))
        self.sums_of_squares = fused(sums_of_squares, is_compiled, kept=(0, 1))
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.weight = torch.nn.Parameter(torch.zeros(width // tp_group.size(), device=device))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        del metadata
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )

    def forward(self, x: Tensor, sum_of_squares: Tensor) -> Tensor:
        """`x` [s, b, a/tp, d] by its token's sum of squares [s, b, 1, 1] over all ranks."""
        weight = self.weight.view(x.shape[2:])
        return self.scale(x, sum_of_squares / self.width, weight, self.offset, self.eps)


def normalize_pair(
    query: Tensor, key: Tensor, query_norm: SplitRMSNorm, key_norm: SplitRMSNorm
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys [s, b, a/tp, d] over the full width with one all-reduce."""
    squares = query_norm.sums_of_squares(query, key)
    query_squares, key_squares = all_reduce_sum(squares, query_norm.tp_group)[..., None, None]
    # Called as modules: megatron-core waits for a module's overlapped weights when it is called.
    return query_norm(query, query_squares), key_norm(key, key_squares)
