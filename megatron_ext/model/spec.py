"""The transformer block as megatron-core specs: which module stands in which place of a layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.model.attention import (
    AttentionCore,
    AttentionSettings,
    DiffusionSelfAttention,
)
from megatron_ext.model.norms import RMSNorm

from megatron.core.tensor_parallel.layers import (  # isort: skip
    ColumnParallelLinear,
    RowParallelLinear,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules  # isort: skip
from megatron.core.transformer.enums import AttnMaskType  # isort: skip
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # isort: skip
from megatron.core.transformer.spec_utils import ModuleSpec  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # isort: skip
from megatron.core.transformer.transformer_layer import (  # isort: skip
    TransformerLayer,
    TransformerLayerSubmodules,
)


def residual_add(multiplier: float) -> Callable:
    """megatron-core's bias-dropout-add slot as `residual + multiplier (x + bias)`."""

    def select(training: bool, fused: bool) -> Callable:
        del training, fused

        def add(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            assert dropout == 0.0, "the model has no dropout"
            x, bias = output
            x = x if bias is None else x + bias
            return residual.add(x, alpha=multiplier)

        return add

    return select


def _core_attention(settings: AttentionSettings) -> Callable:
    def build(**kwargs: object) -> AttentionCore:
        return AttentionCore(settings=settings, **kwargs)

    return build


def layer_spec(model: ModelConfig, attention_settings: AttentionSettings) -> ModuleSpec:
    """One pre-norm transformer layer."""
    attention = ModuleSpec(
        module=DiffusionSelfAttention,
        params={
            "attn_mask_type": AttnMaskType.arbitrary,
            "full_width_norm": model.qk_norm == "full",
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=_core_attention(attention_settings),
            linear_proj=RowParallelLinear,
        ),
    )
    add = residual_add(model.residual_multiplier)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=add,
        ),
    )


def block_spec(
    model: ModelConfig, attention_settings: AttentionSettings, num_layers: int
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(model, attention_settings)] * num_layers, layer_norm=RMSNorm
    )
