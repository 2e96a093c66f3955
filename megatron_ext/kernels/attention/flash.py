"""flash-attn's variable-length kernels (2.7 or newer) behind prompts, documents and the token.

    query [s_q, b, a, d], key and value [s_k, b, a, d]   bfloat16 or float16, CUDA
    packed [b s, a, d], cumulative lengths [segments + 1] int32

flash-attn knows segments of queries that see a segment of keys, nothing else. A prompt's queries
see the prompt and the others all keys, and since a call's key segments cannot overlap, a batch
with prompts takes two calls over the same packed tensors. In each, the positions of the other call
are segments without keys or without queries: the kernels give zero output and gradient for those
(and an infinite log-sum-exp), so results add up and nothing is gathered. Segments are cut on the
host from `pieces`, once per batch; a causal segment ends with its last query's key, as flash-attn
aligns it.

The key/value token is folded in by `fold`, which hands the backward kernel the output and the
log-sum-exp that include it. flash-attn's autograd function ignores the log-sum-exp's gradient,
therefore its forward and backward functions are called directly.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ext.kernels.attention.pieces import Piece, Rules, make_pieces, remembered

OLDEST_VERSION = (2, 7)
"""The signatures called here; 2.6, the first with a soft cap, has others."""


class Segments(NamedTuple):
    """One call: segment i of the queries sees segment i of the keys."""

    query_bounds: list[int]
    key_bounds: list[int]
    is_causal: bool

    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a segment."""
        return tuple(
            max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
            for bounds in (self.query_bounds, self.key_bounds)
        )


def make_segments(pieces: list[Piece], shape: tuple[int, int, int]) -> list[Segments]:
    """The fewest calls that cover `pieces` of `shape` = (sequences, queries, keys), in order."""
    num_rows, num_queries, num_keys = shape
    calls: list[Segments] = []
    for piece in pieces:
        if piece.mask is not None:
            raise ValueError(
                "impl is 'flash': it knows prompts in front, whole documents and causal "
                "sequences, not this visibility; use flex or blocked."
            )
        first_query, first_key = piece.row * num_queries, piece.row * num_keys
        queries = (first_query + piece.queries.start, first_query + piece.queries.stop)
        keys = (first_key + piece.keys.start, first_key + piece.keys.stop)
        for call in calls:
            if call.is_causal == piece.is_causal and keys[0] >= call.key_bounds[-1]:
                break
        else:
            call = Segments([0], [0], piece.is_causal)
            calls.append(call)
        _append(call, queries, keys)
    end = (num_rows * num_queries, num_rows * num_keys)
    for call in calls:
        _append(call, (end[0],) * 2, (end[1],) * 2)
    return calls


def _append(call: Segments, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    """Add a segment, after one without keys and one without queries for what lies between."""
    last_query, last_key = call.query_bounds[-1], call.key_bounds[-1]
    steps = [(queries[0], last_key), (queries[0], keys[0]), (queries[1], keys[1])]
    for step in steps:
        if step != (last_query, last_key):
            call.query_bounds.append(step[0])
            call.key_bounds.append(step[1])
            last_query, last_key = step


@lru_cache(maxsize=1)
def flash_library() -> Any:
    """flash-attn's Python interface."""
    return importlib.import_module("flash_attn.flash_attn_interface")


@dataclass(frozen=True)
class FlashKernel:
    """Attention to the keys alone (see `fold.Kernel`).

    `library` has flash-attn's `_flash_attn_varlen_forward` and `_flash_attn_varlen_backward`.
    """

    visibility: Tensor | None
    rules: Rules
    softcap: float | None
    library: Any

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output [s_q, b, a, d] and log-sum-exp [b, a, s_q] float32."""
        packed = tuple(_pack(x) for x in (query, key, value))
        output = lse = None
        for lengths in self._calls(query, key):
            part, part_lse, *_ = self.library._flash_attn_varlen_forward(
                *packed, **self._arguments(query, lengths)
            )
            if output is None:
                output, lse = part, part_lse
            else:
                output, lse = output.add_(part), torch.minimum(lse, part_lse)
        assert output is not None and lse is not None
        return _unpack(output, query), lse.unflatten(1, query.shape[1::-1]).transpose(0, 1)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        packed = tuple(_pack(x) for x in (query, key, value))
        inputs = (_pack(grad), *packed, _pack(output), lse.transpose(0, 1).flatten(1).contiguous())
        total = None
        for lengths in self._calls(query, key):
            grads = tuple(torch.empty_like(x) for x in packed)
            self.library._flash_attn_varlen_backward(
                *inputs, *grads, **self._arguments(query, lengths), alibi_slopes=None,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )  # fmt: skip
            if total is None:
                total = grads
            else:
                total = tuple(x.add_(y) for x, y in zip(total, grads, strict=True))
        assert total is not None
        return tuple(_unpack(x, like) for x, like in zip(total, (query, key, value), strict=True))

    def _arguments(self, query: Tensor, lengths: _Lengths) -> dict[str, Any]:
        return {
            **lengths._asdict(),
            "dropout_p": 0.0,
            "softmax_scale": 1 / math.sqrt(query.shape[-1]),
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": self.softcap or 0.0,
        }

    def _calls(self, query: Tensor, key: Tensor) -> list[_Lengths]:
        shape = (query.shape[1], len(query), len(key))
        return _lengths(self.visibility, shape, self.rules, query.device)


class _Lengths(NamedTuple):
    """`Segments` as flash-attn takes them."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool


@remembered
def _lengths(
    visibility: Tensor | None, shape: tuple[int, int, int], rules: Rules, device: torch.device
) -> list[_Lengths]:
    return [
        _Lengths(
            *(
                torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
                for bounds in (call.query_bounds, call.key_bounds)
            ),
            *call.longest(),
            call.is_causal,
        )
        for call in make_segments(make_pieces(visibility, shape, rules), shape)
    ]


def _pack(x: Tensor) -> Tensor:
    """[s, b, a, d] as [b s, a, d], sequence after sequence; a copy unless b is 1."""
    return x.transpose(0, 1).flatten(0, 1).contiguous()


def _unpack(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(0, like.shape[1::-1]).transpose(0, 1)
