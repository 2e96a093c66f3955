"""Attention with a soft cap and a learned key/value token, as the definition reads.

query  [s_q, b, a, d]   key, value [s_k, b, a, d]   any float dtype
mask   [b, s_q, s_k]    bool, True where a query may attend; absent for everywhere
k_bias, v_bias [a, d]   an extra key and value at index 0 that every query may attend to

score = c tanh(q.k / (c sqrt(d))),  masked scores are the lowest finite number,
softmax in float32 (float64 for float64 inputs), output = weights x values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    softcap: float | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> Tensor:
    """Return [s_q, b, a, d] in the dtype of `query`; differentiable in every float input."""
    if k_bias is not None and v_bias is not None:
        batch = (1, key.shape[1], -1, -1)
        key = torch.cat([k_bias.to(key.dtype).expand(batch), key])
        value = torch.cat([v_bias.to(value.dtype).expand(batch), value])
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (1, 0), value=True)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    scores = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(query.shape[-1]))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min)
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=exact).to(v.dtype)
    return (weights @ v).permute(2, 0, 1, 3)
