"""flash-attn's variable-length functions in plain torch, called as the released ones can be called.

Their parameters are those of the released source (`flash_attn_signatures.json`): a call that a
version would refuse is a `TypeError` here. What they compute follows its CUDA source: segments
without keys give zero output and an infinite log-sum-exp, a causal mask ends with the last key,
and the backward pass takes output and log-sum-exp as they are given. float64 is allowed here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_RECORD = json.loads(Path(__file__).with_name("flash_attn_signatures.json").read_text())
VERSIONS: list[str] = list(_RECORD["versions"])


class FlashAttnStandIn:
    """The module `flash_attn.flash_attn_interface` of one version; `num_calls` counts forwards."""

    def __init__(self, version: str) -> None:
        self._functions = _RECORD["versions"][version]
        self.num_calls = 0

    def _flash_attn_varlen_forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        given = self._bind("_flash_attn_varlen_forward", args, kwargs)
        self.num_calls += 1
        query, value = given["q"], given["v"]
        output = torch.full_like(query, torch.nan)
        lse = query.new_full(query.shape[1::-1], torch.nan)
        for queries, keys in _segments(given):
            if queries.start == queries.stop:
                continue
            if keys.start == keys.stop:
                output[queries], lse[:, queries] = 0, torch.inf
                continue
            scores = _scores(given, queries, keys)[0]
            lse[:, queries] = scores.logsumexp(-1)
            output[queries] = torch.einsum("aqk,kad->qad", scores.softmax(-1), value[keys])
        assert self._functions["_flash_attn_varlen_forward"]["returns"] == (
            "(out, softmax_lse, S_dmask, rng_state)"
        )
        return output, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_varlen_backward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = self._bind("_flash_attn_varlen_backward", args, kwargs)
        query, key, value, grad = (given[name] for name in ("q", "k", "v", "dout"))
        for name in ("dq", "dk", "dv"):
            given[name].fill_(torch.nan)
        delta = (grad * given["out"]).sum(-1).t()
        for queries, keys in _segments(given):
            given["dq"][queries], given["dk"][keys], given["dv"][keys] = 0, 0, 0
            if queries.start == queries.stop or keys.start == keys.stop:
                continue
            scores, slope = _scores(given, queries, keys)
            weights = torch.exp(scores - given["softmax_lse"][:, queries, None])
            change = torch.einsum("qad,kad->aqk", grad[queries], value[keys])
            change = weights * (change - delta[:, queries, None]) * slope
            given["dq"][queries] = torch.einsum("aqk,kad->qad", change, key[keys])
            given["dk"][keys] = torch.einsum("aqk,qad->kad", change, query[queries])
            given["dv"][keys] = torch.einsum("aqk,qad->kad", weights, grad[queries])
        return delta

    def _bind(self, name: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        parameters = [
            Parameter(x[0], Parameter.POSITIONAL_OR_KEYWORD, default=[*x[1:], Parameter.empty][0])
            for x in self._functions[name]["parameters"]
        ]
        bound = Signature(parameters).bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        for side in "qk":
            bounds, longest = given[f"cu_seqlens_{side}"], given[f"max_seqlen_{side}"]
            assert bounds.dtype == torch.int32 and bounds.is_contiguous()
            assert bounds[0] == 0 and bounds[-1] == len(given[side])
            assert bounds.diff().min() >= 0 and bounds.diff().max() == longest
        for side in "qkv":
            assert given[side].dim() == 3 and given[side].is_contiguous()
        assert given["dropout_p"] == 0 and given["alibi_slopes"] is None
        assert (given["window_size_left"], given["window_size_right"]) == (-1, -1)
        return given


def _segments(given: dict[str, Any]) -> Iterator[tuple[slice, slice]]:
    bounds = [given[f"cu_seqlens_{side}"].tolist() for side in "qk"]
    assert len(bounds[0]) == len(bounds[1])
    for index in range(len(bounds[0]) - 1):
        yield tuple(slice(x[index], x[index + 1]) for x in bounds)  # type: ignore[misc]


def _scores(given: dict[str, Any], queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
    """Capped and masked scores [a, q, k], and their derivative by the product of query and key."""
    product = torch.einsum("qad,kad->aqk", given["q"][queries], given["k"][keys])
    scale, cap = given["softmax_scale"], given["softcap"]
    assert math.isclose(scale, given["q"].shape[-1] ** -0.5)
    scores, slope = scale * product, torch.full_like(product, scale)
    if cap:
        scores = cap * torch.tanh(scores / cap)
        slope = slope * (1 - (scores / cap).square())
    if given["causal"]:
        num_queries, num_keys = product.shape[1:]
        later = torch.ones(num_queries, num_keys, dtype=torch.bool)
        scores = scores.masked_fill(later.triu(num_keys - num_queries + 1), -torch.inf)
    return scores, slope
