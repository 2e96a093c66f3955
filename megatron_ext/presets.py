"""Model shapes of the paper, section "Models and runs": sweep sizes, 3B and 10B.

`l20-d1536` has 12 heads of 128, unlike the rest of the sweep. `transformer_parameters` counts what
the paper's P means: everything but embedding and head.
"""

from __future__ import annotations

from typing import Any

from megatron_ext.config import ModelConfig


def _shape(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "seq_length": 2048,
    }


MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "gidd-25m": _shape(8, 512, 8),
    "gidd-49m": _shape(10, 640, 10),
    "gidd-85m": _shape(12, 768, 12),
    "gidd-202m": _shape(16, 1024, 16),
    "gidd-567m": _shape(20, 1536, 12),
    "gidd-mask-3b": _shape(18, 3072, 24),
    "gidd-unif-3b": _shape(19, 3072, 24),
    "gidd-unif-10b": _shape(34, 4608, 36),
}
"""Model sections by name; the vocabulary is the tokenizer's (131,072 in the paper)."""


def transformer_parameters(model: ModelConfig) -> int:
    """Parameters without embedding and head: L (12 d^2 + 11 d) + d for the published shapes."""
    h, f, width = model.hidden_size, model.ffn_width, model.head_width * model.num_attention_heads
    matrices = 4 * h * width + (3 if model.activation == "swiglu" else 2) * h * f
    norms = 2 * h + (2 * width if model.qk_norm == "full" else 0)
    biases = (2 * width if model.kv_bias_token else 0) + ((f + h) if model.mlp_bias else 0)
    if model.mlp_bias and model.activation == "swiglu":
        biases += f
    return model.num_layers * (matrices + norms + biases) + h


def total_parameters(model: ModelConfig, vocab_size: int) -> int:
    """All parameters at the true (unpadded) vocabulary."""
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    return transformer_parameters(model) + tables * vocab_size * model.hidden_size
