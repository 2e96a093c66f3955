"""torch's scaled-dot-product attention, for models without a soft cap, which it does not have.

On CPUs torch's fused kernel returns the log-sum-exp, so the key/value token is folded in and
hidden keys are left out piece by piece. Elsewhere the public function chooses the kernel: it gets
the token as an additional key and value, which copies K and V, and a mask [b, 1, s_q, s_k] unless
everything is visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.kernels.attention.pieces import Piece, Rules, make_pieces


@dataclass(frozen=True)
class FusedCpuKernel:
    """torch's fused attention for CPUs over the keys alone (see `fold.Kernel`)."""

    visibility: Tensor | None
    rules: Rules

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output [s_q, b, a, d] and log-sum-exp [b, a, s_q]."""
        exact = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.permute(1, 2, 0, 3).shape[:3], dtype=exact)
        for piece, rows in self._pieces(query, key):
            out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_inputs(piece, rows, query, key, value),
                is_causal=_is_square(piece),
                attn_mask=_additive(piece, query.dtype),
            )
            output[piece.queries, rows] = out.permute(2, 0, 1, 3)
            lse[rows, :, piece.queries] = sums
        return output, lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        query_grad = torch.empty_like(query, memory_format=torch.contiguous_format)
        key_grad, value_grad = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (key, value)
        )
        for piece, rows in self._pieces(query, key):
            out, of_out = (x[piece.queries, rows].permute(1, 2, 0, 3) for x in (output, grad))
            q, k, v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                of_out,
                *_inputs(piece, rows, query, key, value),
                out,
                lse[rows, :, piece.queries],
                0.0,
                _is_square(piece),
                attn_mask=_additive(piece, query.dtype),
            )
            query_grad[piece.queries, rows] = q.permute(2, 0, 1, 3)
            key_grad[piece.keys, rows] += k.permute(2, 0, 1, 3)
            value_grad[piece.keys, rows] += v.permute(2, 0, 1, 3)
        return query_grad, key_grad, value_grad

    def _pieces(self, query: Tensor, key: Tensor) -> list[tuple[Piece, slice]]:
        """Pieces and the sequences that share them."""
        shape = (query.shape[1], len(query), len(key))
        if self.visibility is None:
            (piece,) = make_pieces(None, (1, *shape[1:]), self.rules)
            return [(piece, slice(0, shape[0]))]
        pieces = make_pieces(self.visibility, shape, self.rules)
        return [(piece, slice(piece.row, piece.row + 1)) for piece in pieces]


def _inputs(piece: Piece, rows: slice, query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """[b, a, s, d] of a piece."""
    parts = (query[piece.queries, rows], *(x[piece.keys, rows] for x in others))
    return tuple(x.permute(1, 2, 0, 3) for x in parts)


def _is_square(piece: Piece) -> bool:
    return piece.is_causal and piece.num_queries == piece.num_keys


def _additive(piece: Piece, dtype: torch.dtype) -> Tensor | None:
    """[1, 1, queries, keys], minus infinity where a key is hidden; absent for nowhere."""
    if _is_square(piece):
        return None
    hidden = piece.hidden(torch.device("cpu"))
    if hidden is None:
        return None
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[None, None]


def attention_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
) -> Tensor:
    """The public function on a mask bool [b, s_q, s_k]; the token is concatenated."""
    if k_bias is not None and v_bias is not None:
        batch = (1, key.shape[1], -1, -1)
        key = torch.cat([k_bias.to(key.dtype).expand(batch), key])
        value = torch.cat([v_bias.to(value.dtype).expand(batch), value])
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (1, 0), value=True)
    output = torch.nn.functional.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
        attn_mask=None if mask is None else mask.unsqueeze(1),
    )
    return output.permute(2, 0, 1, 3)
