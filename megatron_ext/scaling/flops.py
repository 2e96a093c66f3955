"""FLOPs of training, with the convention in the name of every function.

`N` positions, `P` parameters without embedding and head, `L` layers, `d` attention width,
`h` hidden width, `V` vocabulary. Every query attends to every key: 12 L d N counts the two
products with the [N, N] scores, forward and backward, without a causal discount.
"""

from __future__ import annotations

from megatron_ext.config import ModelConfig
from megatron_ext.presets import transformer_parameters

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense BF16 FLOP/s of one device by a part of its name."""


def paper_flops_per_token(model: ModelConfig) -> float:
    """M = 6 P + 12 L d N, the paper's: no embedding, no head."""
    width = model.head_width * model.num_attention_heads
    attention = 12 * model.num_layers * width * model.seq_length
    return 6.0 * transformer_parameters(model) + attention


def model_flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """What MFU counts: `paper_flops_per_token` plus 6 h V for the output head."""
    return paper_flops_per_token(model) + 6.0 * model.hidden_size * vocab_size


def peak_flops(device_name: str) -> float | None:
    """Peak BF16 FLOP/s of a GPU by its name, `None` where it is not in the table."""
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name), None)
