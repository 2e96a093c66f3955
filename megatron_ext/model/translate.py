"""From this project's configuration to megatron-core's `TransformerConfig`, in one function."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_ext.config import Config, Float8Config
from megatron_ext.model.fusion import fused
from megatron_ext.parallel.cpu import enable_cpu

enable_cpu()

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


def _activation(config: Config) -> Callable[[torch.Tensor], torch.Tensor]:
    # megatron-core's squared ReLU is compiled at its first call, asked for or not.
    squared_relu = fused(relu_squared, config.precision.compile_layers, kept=(0,))
    return {
        "squared_relu": squared_relu,
        "gelu": torch.nn.functional.gelu,
        "swiglu": torch.nn.functional.silu,
    }[config.model.activation]


def _leave_uninitialized(weight: torch.Tensor) -> None:
    """Initial weights are drawn afterwards, whole and by name (`megatron_ext.model.init`)."""
    del weight


def padded_vocab_size(vocab_size: int, divisible_by: int, tp_size: int) -> int:
    """Smallest size >= vocab_size that `divisible_by` and the tp size divide."""
    multiple = math.lcm(divisible_by, tp_size)
    return -(-vocab_size // multiple) * multiple


def transformer_config(config: Config) -> TransformerConfig:
    """The engine's view of a run. Dropout is zero and biases exist only where `mlp_bias` says."""
    model, parallel, precision = config.model, config.parallel, config.precision
    # The engine's own FP8 is Transformer Engine's; without it these would be ignored silently.
    fp8 = Float8Config() if config.fp8.fp8_emulate else config.fp8
    dtype = torch.bfloat16 if precision.bf16 else torch.float32
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    full_recompute = parallel.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn_width,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.apply_layernorm_1p,
        activation_func=_activation(config),
        gated_linear_unit=model.activation == "swiglu",
        add_bias_linear=model.mlp_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        init_method=_leave_uninitialized,
        output_layer_init_method=_leave_uninitialized,
        embedding_init_method=_leave_uninitialized,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.bf16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Batched point-to-point with two neighbours on the same rank gives wrong numbers silently.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        calculate_per_token_loss=True,
        deterministic_mode=config.resilience.deterministic,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method if full_recompute else None,
        recompute_num_layers=parallel.recompute_num_layers if full_recompute else None,
        recompute_modules=["core_attn"],
        fp8=fp8.fp8_format,
        fp8_recipe=fp8.fp8_recipe,
        fp8_param=fp8.fp8_param_gather,
        fp8_margin=fp8.fp8_margin,
        fp8_amax_history_len=fp8.fp8_amax_history_len,
        fp8_amax_compute_algo=fp8.fp8_amax_compute_algo,
        first_last_layers_bf16=fp8.first_last_layers_bf16,
        num_layers_at_start_in_bf16=fp8.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=fp8.num_layers_at_end_in_bf16,
    )
