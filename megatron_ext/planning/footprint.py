"""Memory of a rank of our training step in closed form, for plans; dry runs check it.

BF16 weights and activations, FP32 gradients, master weights and averages; flash attention; the
fused loss. With t = tp, b tokens of a micro-batch on a rank, h, w (attention), f widths:

    weights 2, gradients 4 bytes per parameter, optimizer 12 / (dp cp)
    saved by a layer per token: (U h + W w + F f) / t with sequence parallelism

The coefficients count what autograd keeps in this model's layers with `--compile-layers`;
`LayerBytes` says how much is due to what. A pipeline stage holds the micro-batches that
have gone forward and not yet back. The peak is the largest of: the end of a forward pass, the
loss (last stage), the embedding's gradient (first stage), the optimizer's temporaries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ext.config import ModelConfig
from megatron_ext.kernels.vocabulary.projection import tokens_per_chunk
from megatron_ext.planning.shapes import Shape, Spread

OPTIMIZER_TILE = 1 << 26
"""`optim.laprop.GPU_TILE_ELEMENTS`, which this module cannot import without megatron-core."""


@dataclass(frozen=True)
class LayerBytes:
    """Bytes per token of something in a layer: per hidden, attention and feed-forward width."""

    hidden: float
    attention: float
    ffn: float

    def of(self, shape: Shape, tensor: int) -> float:
        split = self.attention * shape.attention + self.ffn * shape.ffn
        return (self.hidden * shape.hidden + split) / tensor

    def __add__(self, other: LayerBytes) -> LayerBytes:
        return LayerBytes(
            self.hidden + other.hidden, self.attention + other.attention, self.ffn + other.ffn
        )


SAVED = LayerBytes(8.1, 14.2, 4.0)
SAVED_BY_GATE = LayerBytes(0.0, 0.0, 6.0)
INPUT = LayerBytes(2.0, 0.0, 0.0)
"""Of a layer that is recomputed."""
BACKWARD = (LayerBytes(4.0, 0.0, 2.0), LayerBytes(-1.6, 22.0, -4.0))
"""Gradients of activations that exist at once, at most: in the feed-forward layer, or in attention,
when what the former had saved is free."""
RECOMPUTED = LayerBytes(2.0, 0.0, 0.0)
"""Beside that where a layer's activations have just been made again."""
MESSAGES = LayerBytes(8.0, 0.0, 0.0)
"""What a pipeline stage has received and not yet used, or is still sending."""
HEAD_HIDDEN = 4.3
"""Bytes per token and hidden width between the last layer and the loss."""
WHOLE_LOGITS = {"reference": 12.25}
"""What a loss that holds whole logits needs, over those in float32; measured (docs/performance.md:
11 to 12 beyond its inputs). The others hold a chunk."""
WEIGHT, GRADIENT, STATE, FP8_COPIES = 2, 4, 12, 2
"""Bytes per parameter; FP8 copies of a matrix and its transpose, beside the BF16 weight."""


def saved_by_layer(model: ModelConfig) -> LayerBytes:
    return SAVED + SAVED_BY_GATE if model.activation == "swiglu" else SAVED


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of the rank that needs most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    stage: int

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def footprint(
    model: ModelConfig, vocabulary: int, spread: Spread, loss_impl: str = "auto"
) -> Footprint:
    """Of the first or the last pipeline stage, whichever needs more."""
    shape = Shape.of(model, vocabulary)
    ends = (_of_stage(model, shape, spread, i, loss_impl) for i in {0, spread.pipeline - 1})
    return max(ends, key=lambda x: x.total)


def layers_in_flight(spread: Spread, num_layers: int, stage: int) -> float:
    """Layers whose activations a stage keeps at most, counted once per micro-batch."""
    own = num_layers / spread.pipeline
    if spread.virtual == 1:
        return own * min(spread.pipeline - stage, spread.num_microbatches)
    ahead = 2 * (spread.pipeline - stage - 1) + (spread.virtual - 1) * spread.pipeline + 1
    chunks = min(ahead, spread.num_microbatches * spread.virtual)
    return own / spread.virtual * chunks


def _of_stage(
    model: ModelConfig, shape: Shape, spread: Spread, stage: int, loss_impl: str
) -> Footprint:
    t, is_first, is_last = spread.tensor, stage == 0, stage == spread.pipeline - 1
    tokens = spread.micro_batch * shape.sequence // spread.context
    own_layers = shape.num_layers / spread.pipeline
    multiple = math.lcm(model.make_vocab_size_divisible_by, t)
    table = -(-shape.vocabulary // multiple) * multiple * shape.hidden / t
    matrices = own_layers * shape.layer_parameters / t
    parameters = matrices + table * (is_first + is_last)
    shards = spread.data * spread.context
    saved, in_flight = saved_by_layer(model), layers_in_flight(spread, shape.num_layers, stage)
    if spread.recompute == "full":
        kept = in_flight * INPUT.of(shape, t) * tokens
        working = (saved + RECOMPUTED).of(shape, t) * tokens
    else:
        if spread.recompute == "selective":
            saved += LayerBytes(0.0, -2.0, 0.0)
        kept = in_flight * saved.of(shape, t) * tokens
        working = 0.0
    working += max(gradients.of(shape, t) for gradients in BACKWARD) * tokens
    if spread.pipeline > 1:
        working += MESSAGES.of(shape, t) * tokens
    loss = _loss_bytes(shape, table, t, tokens, loss_impl) if is_last else 0.0
    # Of one group of parameters at a time: matrices, or tables.
    group = max(matrices, parameters - matrices)
    tile = 12 * min(parameters / shards, group, OPTIMIZER_TILE)
    head = HEAD_HIDDEN * shape.hidden * tokens if is_last else 0.0
    own = own_layers / spread.virtual * saved.of(shape, t) * tokens
    candidates = {
        "forward": (kept + working, 0.0, 0.0),
        "loss": (kept + head, loss, 0.0),
        "embedding": (max(kept - own, 0.0) + WEIGHT * table * is_first, 0.0, 0.0),
        "optimizer": (0.0, 0.0, tile),
    }
    activations, in_loss, temporary = max(candidates.values(), key=sum)
    copies = FP8_COPIES * matrices if spread.precision == "fp8" else 0.0
    return Footprint(
        weights=WEIGHT * parameters + copies,
        gradients=GRADIENT * parameters,
        optimizer=STATE * parameters / shards + temporary,
        activations=activations,
        loss=in_loss,
        stage=stage,
    )


def _loss_bytes(shape: Shape, table: float, tensor: int, tokens: int, loss_impl: str) -> float:
    """Of a fused loss: a chunk of logits, its share of the head's gradient, the hidden states in
    the loss, and their gradient."""
    width = shape.vocabulary // tensor
    if loss_impl in WHOLE_LOGITS:
        return WHOLE_LOGITS[loss_impl] * 4 * tokens * width
    chunk = min(tokens_per_chunk(width, None, on_gpu=True), tokens)
    return 2 * chunk * width + 2 * table + 4 * shape.hidden * tokens
