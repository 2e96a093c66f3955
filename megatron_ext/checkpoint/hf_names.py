"""Names and shapes of the published Hugging Face checkpoints against this model's parameters.

One table. Every parameter of ours corresponds to one published tensor of the same shape, except
the fused `linear_qkv.weight` [3h, h], which interleaves the published q, k and v projections head
by head: rows q_0 k_0 v_0 q_1 k_1 v_1 ... with d rows each (megatron-core's layout).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_GLOBAL = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_layernorm.weight",
    "self_attention.q_norm.weight": "self_attn.q_norm.weight",
    "self_attention.k_norm.weight": "self_attn.k_norm.weight",
    "self_attention.core_attention.k_bias": "self_attn.k_bias",
    "self_attention.core_attention.v_bias": "self_attn.v_bias",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "mlp_layernorm.weight",
    "mlp.linear_fc1.weight": "mlp.up_proj.weight",
    "mlp.linear_fc1.bias": "mlp.up_proj.bias",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
}
_FUSED = "self_attention.linear_qkv.weight"
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def published_names(name: str) -> tuple[str, ...]:
    """The published tensor (three for the fused projection) behind a parameter's global name."""
    if name in _GLOBAL:
        return (_GLOBAL[name],)
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in (*_LAYER, _FUSED):
        raise KeyError(f"{name}: no tensor of the published format corresponds to this parameter")
    prefix = f"model.layers.{match[1]}."
    if match[2] == _FUSED:
        return tuple(f"{prefix}self_attn.{x}_proj.weight" for x in "qkv")
    return (prefix + _LAYER[match[2]],)


def from_published(name: str, published: Mapping[str, Tensor], num_heads: int) -> Tensor:
    """The whole parameter `name` from published tensors."""
    parts = [published[key] for key in published_names(name)]
    if len(parts) == 1:
        return parts[0]
    by_head = [part.unflatten(0, (num_heads, -1)) for part in parts]
    return torch.cat(by_head, dim=1).flatten(0, 1)


def to_published(name: str, whole: Tensor, num_heads: int) -> dict[str, Tensor]:
    """The published tensors that a whole parameter holds."""
    keys = published_names(name)
    if len(keys) == 1:
        return {keys[0]: whole}
    parts = whole.unflatten(0, (num_heads, -1)).chunk(3, dim=1)
    return {key: part.flatten(0, 1) for key, part in zip(keys, parts, strict=True)}
