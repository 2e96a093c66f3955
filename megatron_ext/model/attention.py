"""Self-attention on megatron-core's fused QKV and output projections.

    hidden   [s/cp(/tp), b, h]   split on cp, and on tp under sequence parallelism
    q, k, v  [s/cp, b, a/tp, d]  heads split on tp
    mask     [b, s/cp, s] bool   this rank's queries against all keys; same on tp

Collectives per layer beyond megatron-core's: two numbers per token over tp for the full-width
norm of queries and keys, and one all-gather of K and V over cp (reduce-scatter backward).
Attention is bidirectional, so contiguous pieces of the sequence balance the work over cp.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.kernels.attention import (
    Implementation,
    attention,
    choose_attention,
    for_pattern,
)
from megatron_ext.model.fusion import fused
from megatron_ext.model.norms import SplitRMSNorm, normalize_pair
from megatron_ext.model.rotary import rotate
from megatron_ext.parallel.collectives import gather_sequence

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.transformer.attention import SelfAttention  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # isort: skip


@dataclass(frozen=True)
class AttentionSettings:
    """What a model's attention cores have in common."""

    impl: Implementation
    """Never `auto`."""
    softcap: float | None
    kv_bias_token: bool
    causal: bool
    causal_prompt: bool

    @classmethod
    def of(cls, config: Config, device: torch.device, dtype: torch.dtype) -> AttentionSettings:
        """Raises `ValueError` where `--attention-impl` cannot be had on this device."""
        model, diffusion = config.model, config.diffusion
        impl = choose_attention(
            config.precision.attention_impl, device=device, dtype=dtype,
            head_width=model.head_width, softcap=model.attention_softcap, trains=True,
        )  # fmt: skip
        return cls(
            impl=impl,
            softcap=model.attention_softcap,
            kv_bias_token=model.kv_bias_token,
            causal=diffusion.objective == "ar",
            causal_prompt=diffusion.causal_prompt_attn,
        )


class AttentionCore(torch.nn.Module):
    """Softmax attention of local queries over all keys; holds the key/value token.

    `k_bias`, `v_bias` [a/tp, d] are split on tp by heads, neither normalised nor rotated.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        settings: AttentionSettings,
        **unused: Any,
    ) -> None:
        super().__init__()
        del layer_number, unused
        self.settings = settings
        self.cp_group = pg_collection.cp
        self.k_bias = self.v_bias = None
        if settings.kv_bias_token:
            shape = (config.num_attention_heads // pg_collection.tp.size(), config.kv_channels)
            device = torch.cuda.current_device() if torch.cuda.is_available() else None
            for name in ("k_bias", "v_bias"):
                parameter = torch.nn.Parameter(
                    torch.zeros(shape, dtype=config.params_dtype, device=device)
                )
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                parameter.partition_dim = 0  # type: ignore[attr-defined]
                parameter.partition_stride = 1  # type: ignore[attr-defined]
                setattr(self, name, parameter)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, visibility: Tensor, **unused: Any
    ) -> Tensor:
        """Return [s/cp, b, h/tp].

        A bool mask goes to an implementation that takes any pattern, if the chosen one does not.
        """
        del unused
        settings = self.settings
        is_pattern = visibility.dtype == torch.bool
        if self.cp_group.size() > 1:
            key, value = gather_sequence(torch.stack([key, value], dim=1), self.cp_group).unbind(1)
        output = attention(
            query, key, value, visibility,
            first_query=self.cp_group.rank() * len(query),
            causal=settings.causal, causal_prompt=settings.causal_prompt,
            softcap=settings.softcap, k_bias=self.k_bias, v_bias=self.v_bias,
            impl=for_pattern(settings.impl) if is_pattern else settings.impl,
        )  # fmt: skip
        return output.flatten(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        del metadata
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"k_bias": 0, "v_bias": 0},
            sharded_offsets,
        )


class DiffusionSelfAttention(SelfAttention):
    """megatron-core's projections around normalised, rotated, bidirectional attention."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        full_width_norm: bool,
        is_compiled: bool,
        **kwargs: Any,
    ) -> None:
        without_bias = copy.copy(config)
        without_bias.add_bias_linear = False
        super().__init__(without_bias, *args, **kwargs)
        self.q_norm = self.k_norm = None
        if full_width_norm:
            width, eps = self.query_projection_size, config.layernorm_epsilon
            self.q_norm = SplitRMSNorm(config, width, eps, self.tp_group, is_compiled)
            self.k_norm = SplitRMSNorm(config, width, eps, self.tp_group, is_compiled)
        self.rotate = fused(rotate, is_compiled, kept=(1, 2))

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [s/cp, b, a/tp, d], normalised but not rotated."""
        fused, _ = self.linear_qkv(hidden)
        heads = (self.num_attention_heads_per_partition, 3 * self.hidden_size_per_attention_head)
        query, key, value = fused.unflatten(-1, heads).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = normalize_pair(query, key, self.q_norm, self.k_norm)
        return query, key, value

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, no bias); `rotary_pos_emb` [s/cp, 1 or b, d/2] are this rank's angles."""
        del unused
        query, key, value = self.project(hidden_states)
        if rotary_pos_emb is not None:
            cos, sin = rotary_pos_emb.cos(), rotary_pos_emb.sin()
            query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
        if self.checkpoint_core_attention and self.training:
            output = self._checkpointed_attention_forward(query, key, value, attention_mask)
        else:
            output = self.core_attention(query, key, value, attention_mask)
        return self.linear_proj(output)
