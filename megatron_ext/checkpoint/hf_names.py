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

from megatron_ext.config import ModelConfig

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


def parameter_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Global names and whole shapes, without padding rows, in the order of the forward pass.

    For a model that the published format can describe; tied embeddings have no output layer.
    """
    h, f, width = model.hidden_size, model.ffn_width, model.head_width * model.num_attention_heads
    by_head = (model.num_attention_heads, model.head_width)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        _FUSED: (3 * width, h),
        "self_attention.linear_proj.weight": (h, width),
        "pre_mlp_layernorm.weight": (h,),
        "mlp.linear_fc1.weight": (f, h),
        "mlp.linear_fc2.weight": (h, f),
    }
    if model.qk_norm == "full":
        layer |= {f"self_attention.{x}_norm.weight": (width,) for x in "qk"}
    if model.kv_bias_token:
        layer |= {f"self_attention.core_attention.{x}_bias": by_head for x in "kv"}
    if model.mlp_bias:
        layer |= {"mlp.linear_fc1.bias": (f,), "mlp.linear_fc2.bias": (h,)}
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab_size, h)}
    for i in range(model.num_layers):
        shapes |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["decoder.final_layernorm.weight"] = (h,)
    if model.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (vocab_size, h)
    return shapes


def published_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors of a model, in the same order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(model, vocab_size).items():
        parts = to_published(name, torch.empty(shape, device="meta"), model.num_attention_heads)
        shapes |= {key: tuple(part.shape) for key, part in parts.items()}
    return shapes


def is_norm_gain(name: str) -> bool:
    """Whether a parameter or published tensor is a norm's gain, which is float32 always."""
    return name.endswith("norm.weight")
