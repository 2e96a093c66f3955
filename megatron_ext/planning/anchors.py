"""Published runs that plans are held against, as facts: shape, layout and speed.

`tflops` are model FLOP/s per GPU over 10^12 with attention counted in full (no causal discount),
the convention of both sources; `tokens_per_second` are per GPU. Where a source leaves out a
shape, it follows from its parameter count and pipeline (marked "derived"). Micro-batch sizes that
Megatron-LM's table leaves out are taken as 1.

Sources: llm-foundry, scripts/train/benchmarking (H100 BF16 table); Megatron-LM README of core r0.8
(weak scaling, H100); Megatron-Bridge's performance summaries (25.09 to 26.06); torchtitan's reports
(compiled rows); MegaDLMs' report.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_ext.planning.hardware import GPUS
from megatron_ext.planning.shapes import Shape, Spread

Group = Literal[
    "llm-foundry", "Megatron-LM", "Bridge FP8, 2025", "Bridge FP8, 2026 and B200", "torchtitan",
    "MegaDLMs",
]  # fmt: skip


@dataclass(frozen=True)
class Anchor:
    """A run that somebody measured."""

    group: Group
    name: str
    gpu: str
    shape: Shape
    spread: Spread
    seconds: float
    """Of a step."""


def _mpt(hidden: int, layers: int, sequence: int = 2048) -> Shape:
    return Shape(layers, hidden, hidden, hidden, 4 * hidden, False, 50368, sequence, True)


def _gpt(hidden: int, layers: int) -> Shape:
    return Shape(layers, hidden, hidden, hidden, 4 * hidden, False, 131072, 4096, True)


def _llama(layers: int, hidden: int, heads: int, groups: int, ffn: int) -> Shape:
    width = hidden // heads * groups
    return Shape(layers, hidden, hidden, width, ffn, True, 128256, 8192, True)


_LLAMA = {
    "8B": _llama(32, 4096, 32, 8, 14336),
    "70B": _llama(80, 8192, 64, 8, 28672),
    "405B": _llama(126, 16384, 128, 8, 53248),
}


def _by_tflops(group: Group, name: str, shape: Shape, spread: Spread, tflops: float) -> Anchor:
    flops = shape.flops_per_token * spread.global_batch * shape.sequence / spread.gpus
    return Anchor(group, name, "H100", shape, spread, flops / (tflops * 1e12))


def _foundry() -> list[Anchor]:
    rows = [
        # name, shape, GPUs, micro-batch, batch, TFLOP/s, recomputation
        ("2.65B", _mpt(2560, 32), 16, 10, 480, 432, False),
        ("2.65B", _mpt(2560, 32), 64, 6, 1152, 403, False),
        ("2.65B", _mpt(2560, 32), 128, 8, 1024, 419, False),
        ("2.65B", _mpt(2560, 32), 512, 8, 4096, 388, False),
        ("2.65B s4096", _mpt(2560, 32, 4096), 8, 5, 240, 418, False),
        ("6.66B", _mpt(4096, 32), 8, 6, 48, 459, False),
        ("6.66B", _mpt(4096, 32), 128, 6, 768, 452, False),
        ("6.66B", _mpt(4096, 32), 512, 6, 3072, 417, False),
        ("12.85B", _mpt(5120, 40), 8, 2, 16, 393, False),
        ("12.85B", _mpt(5120, 40), 128, 16, 2048, 417, True),
        ("12.85B", _mpt(5120, 40), 512, 16, 8192, 406, True),
    ]
    return [
        _by_tflops(
            "llm-foundry", f"{name}, {gpus} GPUs", shape,
            Spread(gpus, micro, batch, recompute="full" if again else "none", shards_weights=True),
            tflops,
        )
        for name, shape, gpus, micro, batch, tflops, again in rows
    ]  # fmt: skip


def _megatron() -> list[Anchor]:
    rows = [
        # name, shape, GPUs, tp, pp, batch, TFLOP/s; from 119B on shapes are derived
        ("1.7B", _gpt(2048, 24), 48, 1, 1, 192, 408.8),
        ("7.1B", _gpt(4096, 30), 96, 2, 1, 192, 465.9),
        ("16B", _gpt(6144, 32), 192, 4, 1, 192, 489.1),
        ("32B", _gpt(7168, 48), 384, 8, 1, 192, 459.6),
        ("70B", _gpt(8192, 84), 768, 8, 2, 384, 419.7),
        ("119B", _gpt(12288, 64), 1536, 8, 4, 768, 420.5),
        ("177B", _gpt(12288, 96), 2304, 8, 6, 1152, 432.8),
        ("314B", _gpt(16384, 96), 3072, 8, 8, 1536, 474.4),
        ("462B", _gpt(18432, 112), 6144, 8, 16, 3072, 459.9),
    ]
    return [
        _by_tflops(
            "Megatron-LM", f"{name}, {gpus} GPUs", shape,
            Spread(gpus, 1, batch, tensor=tp, pipeline=pp, overlaps_tensor=True), tflops,
        )
        for name, shape, gpus, tp, pp, batch, tflops in rows
    ]  # fmt: skip


def _bridge() -> list[Anchor]:
    first: Group = "Bridge FP8, 2025"
    second: Group = "Bridge FP8, 2026 and B200"
    rows = [
        # group, model, GPU, GPUs, batch, micro-batch, FSDP, tp, pp, cp, vp, tokens/s per GPU
        (first, "8B", "H100", 8, 128, 1, True, 1, 1, 1, 1, 14451),
        (first, "8B", "H100", 8, 128, 1, True, 1, 1, 1, 1, 14079),
        (first, "70B", "H100", 64, 128, 1, False, 4, 8, 1, 5, 1602),
        (first, "405B", "H100", 1024, 512, 1, False, 8, 8, 2, 8, 292),
        (second, "70B", "H100", 64, 256, 1, False, 4, 8, 1, 5, 1664),
        (second, "405B", "H100", 1024, 1536, 1, False, 8, 8, 2, 8, 326),
        (second, "8B", "B200", 8, 128, 2, False, 1, 1, 1, 1, 30624),
        (second, "8B", "GB200", 8, 128, 2, False, 1, 1, 1, 1, 31508),
        (second, "70B", "GB200", 64, 256, 2, True, 1, 1, 1, 1, 4312),
        (second, "405B", "B200", 128, 64, 1, False, 4, 8, 2, 8, 661),
        (second, "405B", "GB200", 256, 1536, 1, False, 4, 16, 1, 4, 813),
    ]
    anchors = []
    for group, model, gpu, gpus, batch, micro, fsdp, tp, pp, cp, virtual, speed in rows:
        shape = _LLAMA[model]
        spread = Spread(
            gpus, micro, batch, tp, pp, virtual, cp, precision="fp8", shards_weights=fsdp,
            overlaps_tensor=True,
        )  # fmt: skip
        seconds = batch * shape.sequence / gpus / speed
        anchors.append(Anchor(group, f"{model}, {gpus} {gpu}", gpu, shape, spread, seconds))
    return anchors


def _torchtitan() -> list[Anchor]:
    rows = [
        # model, GPUs, local batch, tp, precision, recomputation, overlap, tokens/s per GPU
        ("8B", 8, 2, 1, "bf16", "selective", False, 6667),
        ("8B", 8, 2, 1, "fp8", "selective", False, 8532),
        ("8B", 128, 2, 1, "bf16", "selective", False, 6514),
        ("8B", 128, 2, 1, "fp8", "selective", False, 8380),
        ("8B", 64, 12, 8, "bf16", "selective", True, 4809),
        ("70B", 256, 16, 8, "bf16", "full", True, 652),
        ("70B", 256, 16, 8, "fp8", "full", True, 876),
    ]
    anchors = []
    for model, gpus, local, tp, precision, recompute, overlaps, speed in rows:
        shape, batch = _LLAMA[model], local * gpus // tp
        spread = Spread(
            gpus, local, batch, tensor=tp, recompute=recompute, precision=precision,
            shards_weights=True, overlaps_tensor=overlaps,
        )  # fmt: skip
        name = f"{model}, {gpus} GPUs, tp {tp}, {precision}"
        seconds = batch * shape.sequence / gpus / speed
        anchors.append(Anchor("torchtitan", name, SLOW_H100.name, shape, spread, seconds))
    return anchors


def _diffusion() -> list[Anchor]:
    """Qwen3-1.7B's architecture, masked diffusion; the batch is MegaDLMs' example's, assumed."""
    shape = Shape(28, 2048, 2048, 1024, 6144, True, 151936, 2048, False)
    return [Anchor("MegaDLMs", "1.7B, 32 GPUs", "H100", shape, Spread(32, 8, 256), 0.58)]


SLOW_H100 = replace(GPUS["H100"], name="H100 96 GB, 500 W", memory_bandwidth=2.4e12)
"""torchtitan's: HBM2e; its lower clock under the power limit is not known."""
ANCHOR_GPUS = GPUS | {SLOW_H100.name: SLOW_H100}
ANCHORS = (*_foundry(), *_megatron(), *_bridge(), *_torchtitan(), *_diffusion())


def anchors_of(group: Group) -> list[Anchor]:
    return [anchor for anchor in ANCHORS if anchor.group == group]
