"""Visibility as a list of rectangles: which keys a run of queries needs, and whether all of them.

    visibility  [b, 2, s_k] int32   level and document of every key position
                                    (`diffusion.visibility`, the definition), or
                [b, s_q, s_k] bool  any pattern
                absent              everything sees everything

Positions between two changes of level or document see the same keys, so a sequence with a prompt
is two rectangles without a mask, and packed documents are a few small ones. Kernels work through
them one by one; the mask of [s, s] is never built from integers. Computed with numpy on the host,
where batches come from: visibility on another device is copied, which waits for that device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_REMEMBERED = 32
"""Batches whose backward pass may be outstanding under pipeline parallelism, and more."""


class Rules(NamedTuple):
    """How visibility is read by one call."""

    first_query: int = 0
    """Position of the first query among the keys (context parallelism)."""
    causal: bool = False
    """No query sees a later key."""
    causal_prompt: bool = False
    """No query of the prompt sees a later key."""


class Piece(NamedTuple):
    """Queries `queries` of sequence `row` see keys of the range `keys` and no others."""

    row: int
    queries: slice
    keys: slice
    is_causal: bool
    """The last query sees all keys of the range, the one before it all but one, and so on."""
    mask: Tensor | None
    """bool [queries, keys] where they see only some of the range in another pattern."""

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start

    def hidden(self, device: torch.device) -> Tensor | None:
        """bool [queries, keys], True where a query must not look; absent for nowhere."""
        if self.mask is not None:
            return ~self.mask.to(device)
        if not self.is_causal:
            return None
        shape = self.num_queries, self.num_keys
        later = self.num_keys - self.num_queries + 1
        return torch.ones(shape, dtype=torch.bool, device=device).triu(later)


def make_pieces(
    visibility: Tensor | None,
    shape: tuple[int, int, int],
    rules: Rules,
    max_queries: int | None = None,
) -> list[Piece]:
    """Pieces of `shape` = (sequences, queries, keys), none longer than `max_queries`, in order.

    Every query is in exactly one piece.
    """
    num_rows, num_queries, num_keys = shape
    longest = max_queries or num_queries
    if visibility is None or visibility.dtype == torch.bool:
        blocks = _cut(0, num_queries, longest)
        return [
            Piece(row, slice(first, last), slice(0, num_keys), False,
                  None if visibility is None else visibility[row, first:last])
            for row in range(num_rows)
            for first, last in blocks
        ]  # fmt: skip
    host = visibility.cpu().numpy()
    return [
        piece
        for row in range(num_rows)
        for piece in _row_pieces(row, host[row], num_queries, rules, longest)
    ]


def _cut(first: int, last: int, longest: int) -> list[tuple[int, int]]:
    return [(start, min(start + longest, last)) for start in range(first, last, longest)]


def _row_pieces(
    row: int, visibility: np.ndarray, num_queries: int, rules: Rules, longest: int
) -> Iterator[Piece]:
    level, document = visibility
    offset = rules.first_query
    changes = np.flatnonzero((np.diff(level) != 0) | (np.diff(document) != 0)) + 1
    inside = changes[(changes > offset) & (changes < offset + num_queries)]
    bounds = [offset, *inside.tolist(), offset + num_queries]
    for first, last in zip(bounds, bounds[1:], strict=False):
        visible = (document == document[first]) & (level <= level[first])
        seen = np.flatnonzero(visible)
        is_causal = rules.causal or (rules.causal_prompt and level[first] <= 0)
        for start, stop in _cut(first, last, longest):
            # A run sees itself, so the last position before `stop` is the last causal key.
            low, high = int(seen[0]), stop if is_causal else int(seen[-1]) + 1
            mask = None
            if not visible[low:high].all():
                allowed = np.broadcast_to(visible[low:high], (stop - start, high - low))
                if is_causal:
                    allowed = allowed & (np.arange(start, stop)[:, None] >= np.arange(low, high))
                mask = torch.from_numpy(allowed.copy())
            yield Piece(
                row, slice(start - offset, stop - offset), slice(low, high),
                is_causal and mask is None, mask,
            )  # fmt: skip


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the latest results of a function of (visibility, further hashable arguments).

    The layers of a model share a batch's visibility. It is known by its memory, which the entry
    keeps alive, and by the version of its contents, not by the object: recomputation hands the
    same tensor on as a new one.
    """
    results: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()

    @wraps(function)
    def call(visibility: Tensor | None, *others: Any) -> Any:
        key = None
        if visibility is not None:
            if visibility.is_inference():
                return function(visibility, *others)
            key = (
                visibility.data_ptr(), visibility.shape, visibility.stride(), visibility.dtype,
                visibility.device, visibility._version,
            )  # fmt: skip
        if (key, others) not in results:
            results[key, others] = (visibility, function(visibility, *others))
            while len(results) > _REMEMBERED:
                results.popitem(last=False)
        return results[key, others][1]

    return call
