"""Seconds of a training step from its dimensions, a layout and a GPU.

    products      FLOPs / (peak x rate), longer by (1 + narrow (1 / inputs + 1 / outputs)) where a
                  matrix is narrow
    attention     FLOPs / (peak x ATTENTION_RATE): two products forward, five backward
    elementwise   bytes that everything else in a layer reads and writes / HBM
    head          its products, its passes over the logits and what chunks add to the weight's
                  gradient / HBM, on the last stage
    tensor        8 (s b h) (t - 1) / t per layer over NVLink; a quarter more per recomputation
    context       keys and values gathered, their gradients scattered, over NVLink
    pipeline      (p - 1) / (m v) of a stage's work, idle
    data          gradients scattered in FP32 and weights gathered in BF16 (FSDP: weights twice,
                  gradients once, per micro-batch), beside the step's work and mostly hidden by it
    optimizer     bytes of an update / HBM

`rate` and `narrow` are fitted on published runs (`calibration`), in BF16 and in FP8; all else is
taken from data sheets and counted. Bytes of elementwise work are the stack's: `FUSED_LAYER` is that
of kernels that megatron-core fuses, `OUR_LAYER` what dry runs count in this project's layers with
`--compile-layers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_ext.config import ModelConfig
from megatron_ext.kernels.vocabulary.projection import tokens_per_chunk
from megatron_ext.planning.footprint import LayerBytes
from megatron_ext.planning.hardware import Gpu
from megatron_ext.planning.shapes import Shape, Spread

ATTENTION_RATE = 0.5
"""Of the peak that fused attention reaches, forward and backward together."""
HBM_RATE = 0.85
LINK_RATE, NETWORK_RATE = 0.7, 0.8
EXPOSED_TENSOR = 0.35
"""Of tensor-parallel messages where they overlap products."""
HIDING = 4.0
"""Exponent of the norm that adds the step's work and data-parallel messages: they overlap, the
less completely the more alike they are."""
LOGIT_PASSES, LOGIT_BYTES = 6, 2
"""Reads and writes of BF16 logits in training."""
STATE_TRAFFIC, WEIGHT_TRAFFIC = 30, 4
"""Bytes per parameter of an update: of a rank's share, and of all its gradients (zeroed)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes per token that a layer's elementwise work reads and writes."""

    forward: LayerBytes
    backward: LayerBytes
    per_parameter: float = 0.0
    """Of the layer's matrices per micro-batch: their gradients are added up."""
    per_head_parameter: float = 0.0
    """Of the head per chunk of tokens, for the same reason."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.forward + other.forward,
            self.backward + other.backward,
            self.per_parameter + other.per_parameter,
            self.per_head_parameter + other.per_head_parameter,
        )


FUSED_LAYER = Traffic(LayerBytes(40, 20, 8), LayerBytes(80, 40, 18))
OUR_LAYER = Traffic(LayerBytes(20, 60, 8), LayerBytes(36, 88, 8), 10.0, 12.0)
OUR_QK_NORM = Traffic(LayerBytes(0, 12, 0), LayerBytes(0, 32, 0))
OUR_GATE = Traffic(LayerBytes(0, 0, 14), LayerBytes(0, 0, 22))


def layer_traffic(model: ModelConfig) -> Traffic:
    """Of this project's layers with `--compile-layers`."""
    total = OUR_LAYER
    if model.qk_norm == "full":
        total += OUR_QK_NORM
    if model.activation == "swiglu":
        total += OUR_GATE
    return total


@dataclass(frozen=True)
class Rates:
    """What is fitted."""

    product: float
    """Of the BF16 peak that wide products reach."""
    narrow: float
    """Width at which a product takes twice as long."""
    fp8: float
    """Of the FP8 peak that wide FP8 products reach, quantisation included."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the rank that needs longest, by what they are spent on."""

    products: float
    attention: float
    elementwise: float
    head: float
    tensor: float
    context: float
    pipeline: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def step_time(shape: Shape, spread: Spread, gpu: Gpu, rates: Rates, traffic: Traffic) -> StepTime:
    """Planned, not measured."""
    t, micro = spread.tensor, spread.num_microbatches
    tokens = spread.micro_batch * shape.sequence / spread.context
    layers = shape.num_layers / spread.pipeline
    again = {"none": 0, "selective": 0, "full": 1}[spread.recompute]
    memory = gpu.memory_bandwidth * HBM_RATE
    products = layers * (3 + again) * sum(
        _product(tokens, *_cut(index, rows, columns, t), spread.precision, gpu, rates)
        for index, (rows, columns) in enumerate(shape.products)
    )  # fmt: skip
    pairs = shape.sequence * (0.5 if shape.is_causal else 1.0)
    of_attention = 2 * tokens * pairs * shape.attention / t
    attention_again = 0 if spread.recompute == "none" else 2
    attention = layers * of_attention * (2 + 5 + attention_again)
    attention /= gpu.bf16_flops * ATTENTION_RATE
    moved = tokens * (traffic.forward.of(shape, t) * (1 + again) + traffic.backward.of(shape, t))
    moved += traffic.per_parameter * shape.layer_parameters / t
    head = 3 * _product(tokens, shape.hidden, shape.vocabulary / t, "bf16", gpu, rates)
    head += tokens * shape.vocabulary / t * LOGIT_BYTES * LOGIT_PASSES / memory
    chunks = math.ceil(tokens / tokens_per_chunk(shape.vocabulary // t, None, on_gpu=True))
    head += chunks * traffic.per_head_parameter * shape.vocabulary / t * shape.hidden / memory
    # Stages wait for the last, the more of it the shorter they are themselves.
    head /= spread.pipeline
    link = gpu.link_bandwidth * LINK_RATE
    message = tokens * shape.hidden * 2 * (t - 1) / t
    messages = 8 + 2 * again
    tensor = layers * messages * message / link
    tensor *= EXPOSED_TENSOR if spread.overlaps_tensor else 1.0
    c = spread.context
    key_value = 2 * tokens * c * shape.key_value / t * 2 * (c - 1) / c
    context = layers * key_value * (2 + again) / link
    elementwise = layers * moved / memory
    per_micro = products + attention + elementwise + head + tensor + context
    pipeline = per_micro * (spread.pipeline - 1) / spread.virtual
    work = per_micro * micro + pipeline
    data, optimizer = _data_parallel(shape, spread, gpu, work)
    return StepTime(
        products * micro, attention * micro, elementwise * micro, head * micro, tensor * micro,
        context * micro, pipeline, data, optimizer,
    )  # fmt: skip


def _cut(index: int, rows: int, columns: int, tensor: int) -> tuple[float, float]:
    """Column-parallel (QKV, first of the MLP), then row-parallel."""
    return (rows, columns / tensor) if index % 2 == 0 else (rows / tensor, columns)


def _product(
    tokens: float, rows: float, columns: float, precision: str, gpu: Gpu, rates: Rates
) -> float:
    flops = 2 * tokens * rows * columns
    peak = gpu.bf16_flops * rates.product
    if precision == "fp8":
        assert gpu.fp8_flops is not None, f"{gpu.name} has no FP8"
        peak = gpu.fp8_flops * rates.fp8
    return flops / peak * (1 + rates.narrow * (1 / rows + 1 / columns))


def _data_parallel(shape: Shape, spread: Spread, gpu: Gpu, work: float) -> tuple[float, float]:
    """(time of messages that the work does not hide, time of the update)."""
    model = spread.tensor * spread.pipeline
    shards = spread.data * spread.context
    own = shape.parameters / model
    within = shards * spread.tensor <= gpu.gpus_per_node
    bandwidth = gpu.link_bandwidth * LINK_RATE if within else gpu.network_bandwidth * NETWORK_RATE
    times = spread.num_microbatches if spread.shards_weights else 1
    messages = own * 6 * times * (shards - 1) / shards / bandwidth
    hidden = (work**HIDING + messages**HIDING) ** (1 / HIDING)
    memory = gpu.memory_bandwidth * HBM_RATE
    update = (own / shards * STATE_TRAFFIC + own * WEIGHT_TRAFFIC) / memory
    return hidden - work, update
