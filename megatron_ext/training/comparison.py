"""Other ways to train a model of the same size, for the bench: plain torch and transformers.

`dense` is the exported GIDD model with the loss written as its definition reads, on whole logits;
`modernbert` and `llama` are transformers' own models, from their configuration with random
weights, with plain cross-entropy on whole logits: another objective and other layers, for
orientation. All train with torch's fused AdamW. BF16 is autocast over float32 weights, which is
what transformers' trainer does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.data.batches import MicroBatch
from megatron_ext.diffusion.objective import dense_gidd_loss
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.diffusion.visibility import attention_mask_from_visibility
from megatron_ext.hf import GiddConfig, GiddForDiffusionLM

Rival = Literal["dense", "dense, compiled loss", "modernbert", "llama"]


class RivalStep:
    """A model, its optimizer and one training step on a micro-batch."""

    def __init__(
        self, kind: Rival, model: ModelConfig, schedule: MixingSchedule, *, bf16: bool
    ) -> None:
        self.schedule, self.bf16 = schedule, bf16
        self.dense_loss = dense_gidd_loss
        if kind == "dense, compiled loss":
            self.dense_loss = torch.compile(dense_gidd_loss)
        builders: dict[str, Callable[[ModelConfig, int], torch.nn.Module]] = {
            "modernbert": build_modernbert,
            "llama": build_llama,
        }
        self.is_dense = kind not in builders
        self.model = builders.get(kind, build_gidd)(model, schedule.vocab_size).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def __call__(self, batch: MicroBatch) -> float:
        """Forward, backward, update; gradients do not outlive the step."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            loss = self._dense(batch) if self.is_dense else self._cross_entropy(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _dense(self, batch: MicroBatch) -> Tensor:
        mask = attention_mask_from_visibility(batch.visibility)
        logits = self.model(batch.input_ids, attention_mask=mask).logits
        losses = self.dense_loss(logits, batch.input_ids, batch.x0, batch.log_snr, self.schedule)
        return torch.where(batch.loss_mask, losses.loss, 0.0).sum() / batch.loss_mask.sum()

    def _cross_entropy(self, batch: MicroBatch) -> Tensor:
        logits = self.model(input_ids=batch.input_ids).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.x0.flatten())


def build_gidd(model: ModelConfig, vocab_size: int) -> torch.nn.Module:
    """The exported model with the shape of `model`."""
    config = GiddConfig(
        vocab_size=vocab_size, hidden_size=model.hidden_size, intermediate_size=model.ffn_width,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
        max_position_embeddings=model.seq_length, weight_scaling=1.0, init_scale=0.02,
        head_init_scale=0.02, attention_bias=model.kv_bias_token, mlp_bias=model.mlp_bias,
        head_scaling=model.logit_scale, attn_soft_cap=model.attention_softcap,
    )  # fmt: skip
    return GiddForDiffusionLM(config)


def gated_width(model: ModelConfig) -> int:
    """Width at which a gated feed-forward layer's three matrices weigh what our two do."""
    return max(round(model.ffn_width * 2 / 3 / 64), 1) * 64


def build_modernbert(model: ModelConfig, vocab_size: int) -> torch.nn.Module:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=vocab_size, hidden_size=model.hidden_size,
        intermediate_size=gated_width(model), num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads, max_position_embeddings=model.seq_length,
        bos_token_id=0, cls_token_id=0, eos_token_id=1, sep_token_id=1, pad_token_id=2,
        tie_word_embeddings=False, reference_compile=False, attn_implementation="sdpa",
    )  # fmt: skip
    return ModernBertForMaskedLM(config)


def build_llama(model: ModelConfig, vocab_size: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=model.hidden_size,
        intermediate_size=gated_width(model), num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads, max_position_embeddings=model.seq_length,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)
