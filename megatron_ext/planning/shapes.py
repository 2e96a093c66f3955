"""What a plan is about: a transformer's dimensions and a way to spread it over GPUs.

They describe models and runs of other codebases as well, so that published numbers can be planned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config import Config, ModelConfig

Precision = Literal["bf16", "fp8"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Shape:
    """A transformer; widths are whole, before any split."""

    num_layers: int
    hidden: int
    attention: int
    """Width of the queries of all heads."""
    key_value: int
    """Width of the keys of all heads; less than `attention` with grouped queries."""
    ffn: int
    is_gated: bool
    vocabulary: int
    sequence: int
    is_causal: bool

    @classmethod
    def of(cls, model: ModelConfig, vocabulary: int, *, is_causal: bool = False) -> Shape:
        width = model.head_width * model.num_attention_heads
        return cls(
            model.num_layers, model.hidden_size, width, width, model.ffn_width,
            model.activation == "swiglu", vocabulary, model.seq_length, is_causal,
        )  # fmt: skip

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's four matrices."""
        fused = self.attention + 2 * self.key_value
        gate = 2 if self.is_gated else 1
        return (
            (self.hidden, fused), (self.attention, self.hidden),
            (self.hidden, gate * self.ffn), (self.ffn, self.hidden),
        )  # fmt: skip

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer."""
        return sum(rows * columns for rows, columns in self.products)

    @property
    def table_parameters(self) -> int:
        """Of the embedding, and of the head again."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of all matrices, embedding and head."""
        return self.num_layers * self.layer_parameters + 2 * self.table_parameters

    @property
    def flops_per_token(self) -> float:
        """6 per parameter in a product, 12 L w N for attention without a causal discount."""
        attention = 12 * self.num_layers * self.attention * self.sequence
        return 6.0 * (self.parameters - self.table_parameters) + attention


@dataclass(frozen=True)
class Spread:
    """A run's layout; dp is what is left of the GPUs."""

    gpus: int
    micro_batch: int
    global_batch: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    shards_weights: bool = False
    """Weights are gathered and gradients scattered for every micro-batch (FSDP)."""
    overlaps_tensor: bool = False
    """Tensor-parallel messages run beside matrix products (Transformer Engine can)."""

    @property
    def data(self) -> int:
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def num_microbatches(self) -> int:
        return self.global_batch // (self.micro_batch * self.data)

    @classmethod
    def of(cls, config: Config, gpus: int) -> Spread:
        """The layout of a run of ours in bfloat16."""
        parallel = config.parallel
        return cls(
            gpus=gpus,
            micro_batch=config.training.micro_batch_size,
            global_batch=config.training.global_batch_size,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            virtual=parallel.num_virtual_stages_per_pipeline_rank,
            context=parallel.context_parallel_size,
            recompute=parallel.recompute_granularity or "none",
        )
