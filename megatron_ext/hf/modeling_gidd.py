"""GIDD diffusion language model in PyTorch and transformers alone; names of the published weights.

    input_ids       [b, s] int64   noised tokens
    attention_mask  [b, s]         keys that may be attended to, or
                    [b, s, t]      which of t keys each query may attend to (t counts cached keys)
    logits          [b, s, v]      of the clean token; the mask token's logit means nothing

Attention is bidirectional unless `config.is_causal`; there is no conditioning on the noise level
(arXiv 2512.10858). A learned key and value (`config.attention_bias`) stands at key 0, is seen by
every query and has no position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from .attention_gidd import ATTENTION, attention_probs, key_mask, rotary_angles, rotate
from .configuration_gidd import GiddConfig
from .generation_gidd import GiddGenerationMixin, special_id

# transformers 4 copies only the files that this one imports itself, so it imports all of them.
from .random_gidd import Purpose  # noqa: F401
from .sampling_gidd import sample  # noqa: F401
from .schedule_gidd import MixingSchedule
from .steps_gidd import SamplingConfig  # noqa: F401

KeyValues = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [b, a, t, d] of every layer, the learned ones included."""


@dataclass
class GiddModelOutput(ModelOutput):
    """What the model returns without its head."""

    last_hidden_state: Tensor | None = None
    """[b, s, h], normalised."""
    hidden_states: tuple[Tensor, ...] | None = None
    """The residual stream before the first and after every layer."""
    attentions: tuple[Tensor, ...] | None = None
    """Probabilities [b, a, s, t] of every layer, of the learned key first."""
    key_values: tuple[tuple[Tensor, Tensor], ...] | None = None


class GiddRMSNorm(nn.Module):
    """y = (1 + weight) x / sqrt(mean(x^2) + eps) with statistics and gain in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return ((1 + self.weight.to(exact.dtype)) * exact).to(x.dtype)


class GiddAttention(nn.Module):
    """Full-width norm of queries and keys, rotary positions, soft cap, learned key and value."""

    def __init__(self, config: GiddConfig) -> None:
        super().__init__()
        heads, head_dim = config.num_attention_heads, config.head_dim
        width = heads * head_dim
        self.heads_shape = (heads, head_dim)
        self.soft_cap = config.attn_soft_cap
        self.attend = ATTENTION[config.attn_performer]
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = nn.Identity()
        if config.use_qk_norm:
            self.q_norm = GiddRMSNorm(width, config.rms_norm_eps)
            self.k_norm = GiddRMSNorm(width, config.rms_norm_eps)
        self.k_bias = self.v_bias = None
        if config.attention_bias:
            self.k_bias = nn.Parameter(torch.zeros(heads, head_dim))
            self.v_bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        *,
        with_probs: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Output [b, s, h]; keys and values [b, a, t, d] that were attended to; probabilities."""

        def split(flat: Tensor) -> Tensor:
            return flat.unflatten(-1, self.heads_shape).transpose(1, 2)

        query = rotate(split(self.q_norm(self.q_proj(x))), angles)
        key = rotate(split(self.k_norm(self.k_proj(x))), angles)
        value = split(self.v_proj(x))
        if past is not None:
            before = past
        elif self.k_bias is not None and self.v_bias is not None:
            before = tuple(
                bias.to(x.dtype).unsqueeze(1).expand(len(x), -1, -1, -1)
                for bias in (self.k_bias, self.v_bias)
            )
        else:
            before = None
        if before is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        probs = None
        if with_probs:
            probs = attention_probs(query, key, mask, self.soft_cap)
            output = probs.to(value.dtype) @ value
        else:
            output = self.attend(query, key, value, mask, self.soft_cap)
        return self.o_proj(output.transpose(1, 2).flatten(2)), (key, value), probs


class GiddMLP(nn.Module):
    """Squared ReLU between two linear layers."""

    def __init__(self, config: GiddConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.relu(self.up_proj(x)).square())


class GiddLayer(nn.Module):
    """Pre-norm attention and MLP, each added with the residual multiplier."""

    def __init__(self, config: GiddConfig) -> None:
        super().__init__()
        self.multiplier = config.resid_scale / config.num_hidden_layers
        self.self_attn = GiddAttention(config)
        self.mlp = GiddMLP(config)
        self.attn_layernorm = GiddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_layernorm = GiddRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        *,
        with_probs: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        attended, key_values, probs = self.self_attn(
            self.attn_layernorm(x), angles, mask, past, with_probs=with_probs
        )
        x = x + self.multiplier * attended
        return x + self.multiplier * self.mlp(self.mlp_layernorm(x)), key_values, probs


class GiddPreTrainedModel(PreTrainedModel):
    """Initial weights and loading."""

    config_class = GiddConfig
    base_model_prefix = "model"
    _no_split_modules = ["GiddLayer"]
    _keep_in_fp32_modules = ["norm", "attn_layernorm", "mlp_layernorm", "q_norm", "k_norm"]
    _keep_in_fp32_modules_strict = _keep_in_fp32_modules

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what no checkpoint filled; biases and gains start from zero."""
        config = self.config
        if isinstance(module, nn.Embedding):
            self._draw(module.weight, config.emb_init_scale)
        elif module is self.get_output_embeddings():
            self._draw(module.weight, config.head_init_scale)
        elif isinstance(module, nn.Linear):
            self._draw(module.weight, config.init_scale)
            if module.bias is not None:
                self._draw(module.bias, 0.0)
        elif isinstance(module, GiddRMSNorm):
            self._draw(module.weight, 0.0)
        elif isinstance(module, GiddAttention) and module.k_bias is not None:
            self._draw(module.k_bias, 0.0)
            self._draw(module.v_bias, 0.0)

    @staticmethod
    def _draw(parameter: Tensor, std: float) -> None:
        if getattr(parameter, "_is_hf_initialized", False):
            return
        if std:
            parameter.normal_(0.0, std)
        else:
            parameter.zero_()


class GiddModel(GiddPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: GiddConfig) -> None:
        super().__init__(config)
        if config.weight_scaling != 1.0:
            raise ValueError(
                f"weight_scaling is {config.weight_scaling!r}: the published weights have 1.0, and "
                "no other is supported; set it in config.json."
            )
        if config.attn_performer not in ATTENTION:
            raise ValueError(
                f"attn_performer is {config.attn_performer!r}: choose from {', '.join(ATTENTION)}."
            )
        rotary = config.rope_scaling or {}
        kind = rotary.get("rope_type", rotary.get("type", "default"))
        if kind != "default" or rotary.get("rope_theta", config.rope_theta) != config.rope_theta:
            raise ValueError(
                f"rope_scaling is {rotary} and rope_theta {config.rope_theta}: positions are "
                "rotated by rope_theta alone."
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GiddLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = GiddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prefix: KeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> GiddModelOutput | tuple:
        """`prefix` are the `key_values` of an earlier call, which come before these positions."""
        del kwargs
        output_hidden_states, output_attentions = (
            getattr(self.config, name, False) if given is None else given
            for name, given in (
                ("output_hidden_states", output_hidden_states),
                ("output_attentions", output_attentions),
            )
        )
        if output_attentions and self.config.attn_performer != "eager":
            raise ValueError(
                f"output_attentions: attn_performer is {self.config.attn_performer!r}, which does "
                "not compute probabilities; use 'eager'."
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        num_extra = int(self.config.attention_bias)
        num_past = prefix[0][0].shape[2] - num_extra if prefix else 0
        if position_ids is None:
            position_ids = torch.arange(num_past, num_past + x.shape[1], device=x.device)[None]
        mask = key_mask(attention_mask, x.shape[1], num_extra)
        if self.config.is_causal:
            mask = self._causal(mask, x.shape[1], num_past, num_extra, x.device)
        angles = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        all_hidden, key_values, all_probs = [x], [], []
        for index, layer in enumerate(self.layers):
            past = prefix[index] if prefix else None
            x, new, probs = layer(x, angles, mask, past, with_probs=bool(output_attentions))
            all_hidden.append(x)
            key_values.append(new)
            all_probs.append(probs)
        output = GiddModelOutput(
            last_hidden_state=self.norm(x),
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
            attentions=tuple(all_probs) if output_attentions else None,
            key_values=tuple(key_values),
        )
        return output if return_dict is not False else output.to_tuple()

    @staticmethod
    def _causal(
        mask: Tensor | None, num_queries: int, num_past: int, num_extra: int, device: torch.device
    ) -> Tensor:
        query = torch.arange(num_past, num_past + num_queries, device=device)
        allowed = query[:, None] >= torch.arange(num_past + num_queries, device=device)
        allowed = nn.functional.pad(allowed, (num_extra, 0), value=True)[None, None]
        return allowed if mask is None else mask & allowed


class GiddForDiffusionLM(GiddPreTrainedModel, GiddGenerationMixin):
    """The model with its output head; `generate` denoises."""

    _tied_weights_keys: Any = (
        {"lm_head.weight": "model.embed_tokens.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: GiddConfig) -> None:
        super().__init__(config)
        self.model = GiddModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def mixing_schedule(self, mask_token_id: int | None = None) -> MixingSchedule:
        """The noise the model was trained with."""
        config = self.config
        return MixingSchedule(
            config.vocab_size,
            special_id(config, "mask", mask_token_id),
            config.noise_type,
            min_log_snr=config.min_log_snr,
            max_log_snr=config.max_log_snr,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Scaled logits [..., v] of normalised hidden states."""
        return self.lm_head(hidden) * self.config.head_scaling

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
        if kwargs.get("labels") is not None:
            raise ValueError(
                "labels: the loss of a diffusion model needs noise and noise levels; train with "
                "megatron-diffusion, or compute the GIDD loss from the logits."
            )
        outputs = self.model(
            input_ids, attention_mask, position_ids,
            inputs_embeds=inputs_embeds, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )  # fmt: skip
        output = CausalLMOutput(
            logits=self.logits(outputs.last_hidden_state),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict is not False else output.to_tuple()


GiddConfig.register_for_auto_class()
GiddModel.register_for_auto_class("AutoModel")
GiddForDiffusionLM.register_for_auto_class("AutoModelForCausalLM")
