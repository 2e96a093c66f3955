"""The transformer block as megatron-core specs: which module stands in which place of a layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.model.attention import (
    AttentionCore,
    AttentionSettings,
    DiffusionSelfAttention,
)
from megatron_ext.model.float8 import LayerModules, layer_modules
from megatron_ext.model.fusion import fused

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.transformer.attention import SelfAttentionSubmodules  # isort: skip
from megatron.core.transformer.enums import AttnMaskType  # isort: skip
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # isort: skip
from megatron.core.transformer.spec_utils import ModuleSpec  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # isort: skip
from megatron.core.transformer.transformer_layer import (  # isort: skip
    TransformerLayer,
    TransformerLayerSubmodules,
)


def add_residual(residual: Tensor, x: Tensor, bias: Tensor | None, multiplier: float) -> Tensor:
    return residual.add(x if bias is None else x + bias, alpha=multiplier)


def residual_add(multiplier: float, is_compiled: bool) -> Callable:
    """megatron-core's bias-dropout-add slot as `residual + multiplier (x + bias)`."""
    function = fused(add_residual, is_compiled, kept=())

    def select(training: bool, is_fused: bool) -> Callable:
        del training, is_fused

        def add(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            assert dropout == 0.0, "the model has no dropout"
            return function(residual, *output, multiplier)

        return add

    return select


def _core_attention(settings: AttentionSettings) -> Callable:
    def build(**kwargs: object) -> AttentionCore:
        return AttentionCore(settings=settings, **kwargs)

    return build


def layer_spec(
    config: Config, attention_settings: AttentionSettings, modules: LayerModules
) -> ModuleSpec:
    """One pre-norm transformer layer."""
    is_compiled = config.precision.compile_layers
    attention = ModuleSpec(
        module=DiffusionSelfAttention,
        params={
            "attn_mask_type": AttnMaskType.arbitrary,
            "full_width_norm": config.model.qk_norm == "full",
            "is_compiled": is_compiled,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules.column,
            core_attention=_core_attention(attention_settings),
            linear_proj=modules.row,
        ),
    )
    add = residual_add(config.model.residual_multiplier, is_compiled)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=modules.norm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=modules.norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=modules.column, linear_fc2=modules.row),
            ),
            mlp_bda=add,
        ),
    )


def block_spec(
    config: Config,
    attention_settings: AttentionSettings,
    groups: ProcessGroupCollection,
    layers: range,
) -> TransformerBlockSubmodules:
    """One pipeline stage's layers, counted from 0 over the whole model, and the final norm."""
    modules = [layer_modules(config, groups, layer) for layer in layers]
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, attention_settings, each) for each in modules],
        layer_norm=modules[0].norm,
    )
