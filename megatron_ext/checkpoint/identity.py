"""What a checkpoint and the run that loads it must have in common, and the refusal where not.

A different vocabulary of the same padded size, another soft cap or another optimizer would load
without an error and train something else. The facts are named like the fields of `Config`, so that
a refusal names the flag.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ext.config import Config, require
from megatron_ext.diffusion.schedule import MixingSchedule

_ALWAYS = (
    "num_layers", "hidden_size", "num_attention_heads", "activation", "mlp_bias", "kv_bias_token",
    "qk_norm", "position_embedding_type", "apply_layernorm_1p",
    "untie_embeddings_and_output_weights",
)  # fmt: skip
"""Fields of the model section that decide what the weights mean."""

_TO_CONTINUE = (
    "seq_length", "attention_softcap", "rotary_base", "norm_epsilon", "residual_scale",
    "head_scale",
)  # fmt: skip
"""Fields of the model section that a run keeps, but that its weights may be tuned to anew."""


def weights_identity(config: Config, schedule: MixingSchedule) -> dict[str, Any]:
    """What a run must share with a checkpoint to use its weights."""
    model = config.model
    return {
        **{name: getattr(model, name) for name in _ALWAYS},
        "kv_channels": model.head_width,
        "ffn_hidden_size": model.ffn_width,
        "vocab_size": schedule.vocab_size,
        "mask_token_id": schedule.mask_token_id,
    }


def run_identity(config: Config) -> dict[str, Any]:
    """What a run must share with a checkpoint beyond that to continue from it."""
    return {
        **{name: getattr(config.model, name) for name in _TO_CONTINUE},
        "optimizer": config.optimizer.optimizer,
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
        "bf16": config.precision.bf16,
        "master_weights": config.precision.master_weights,
    }


def require_same(saved: dict[str, Any], wanted: dict[str, Any], folder: Path, hint: str) -> None:
    """Raise `ValueError` naming the first flag whose value differs from the checkpoint's."""
    for name, value in wanted.items():
        require(saved.get(name) == value, name, value, f"{folder} has {saved.get(name)!r}{hint}.")
