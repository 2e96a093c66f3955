"""From a model, a batch, a kind of GPU and a number of them to layouts, fastest first.

`plan` enumerates tensor, pipeline, virtual, context and data parallelism, recomputation,
micro-batch and precision; drops what the configuration refuses and what does not fit; and ranks the
rest by planned step time. Memory is `footprint`'s, which dry runs check; time is `step_time`'s,
which published runs check (docs/planning.md). Everything here is planned, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from typing import Any

from megatron_ext.config import Config, ModelConfig, flag, require
from megatron_ext.planning.calibration import rates
from megatron_ext.planning.footprint import Footprint, footprint
from megatron_ext.planning.hardware import Gpu, gpu_named
from megatron_ext.planning.shapes import Precision, Recompute, Shape, Spread
from megatron_ext.planning.step_time import StepTime, layer_traffic, step_time
from megatron_ext.presets import MODEL_PRESETS
from megatron_ext.scaling.flops import model_flops_per_token

PLANNED = "planned, not measured"
MEMORY_BAND = 0.10
"""Planned tensors against dry runs, and dry runs against measured processes: the worst errors
together stay below this (docs/planning.md)."""
TIME_BAND = 0.25
"""The worst error on published runs that the fit had not seen, rounded up (docs/planning.md)."""
RESERVED_BYTES = 4 * 2**30
"""CUDA's context, NCCL's buffers, workspaces of libraries."""
DEFAULT_VOCABULARY = 131072
FP8_RECIPE = "tensorwise"
"""Current scaling, which the FP8 runs that rates are fitted on use."""
WITHOUT_FP8: dict[str, Any] = {
    "fp8_format": None, "fp8_emulate": False, "fp8_param_gather": False,
    "first_last_layers_bf16": False,
}  # fmt: skip
_SIZES = (1, 2, 4, 8)
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_LONGEST_PIPELINE = 16
_MOST_CHUNKS = 8
_SAME_TIME = 1.02
"""Plans closer than this are alike; the simpler one comes first."""


@dataclass(frozen=True)
class Plan:
    """A layout that should fit, what it needs and how fast it should be."""

    config: Config
    base: Config
    """What the plan started from: all of `config` that is not planned."""
    gpu: Gpu
    spread: Spread
    vocabulary: int
    memory: Footprint
    time: StepTime

    @property
    def memory_bytes(self) -> float:
        """Of tensors at the peak of the rank that needs most."""
        return self.memory.total

    @property
    def step_time_s(self) -> float:
        return self.time.total

    @property
    def tokens_per_s(self) -> float:
        return self.spread.global_batch * self.config.model.seq_length / self.step_time_s

    @property
    def mfu(self) -> float:
        """Of the BF16 peak, in any precision."""
        flops = model_flops_per_token(self.config.model, self.vocabulary) * self.tokens_per_s
        return flops / (self.gpu.bf16_flops * self.spread.gpus)

    @cached_property
    def flags(self) -> list[str]:
        """Of pretrain_diffusion.py, for what differs from `base`."""
        values = []
        for section in fields(self.config):
            planned, given = getattr(self.config, section.name), getattr(self.base, section.name)
            for field in fields(planned):
                value = getattr(planned, field.name)
                if value != getattr(given, field.name):
                    values += _spelled(field.name, value)
        return values

    def command(self, *others: str) -> str:
        """What starts it; `others` are the flags that `base` comes from, data and folders."""
        gpus, node = self.spread.gpus, min(self.gpu.gpus_per_node, 8)
        start = ["torchrun", "--nproc-per-node", str(min(gpus, node))]
        if gpus > node:
            start += ["--nnodes", str(gpus // node), "--rdzv-backend", "c10d",
                      "--rdzv-endpoint", "$MASTER_ADDR:29500"]  # fmt: skip
        return " ".join([*start, "pretrain_diffusion.py", *others, *self.flags])

    def summary(self) -> dict[str, Any]:
        """Figures with their bands, ready for JSON or YAML."""
        spread, per_gpu = self.spread, self.tokens_per_s / self.spread.gpus
        return {
            "note": PLANNED,
            "gpu": self.gpu.name,
            "gpus": spread.gpus,
            "layout": {
                "tp": spread.tensor, "pp": spread.pipeline, "vpp": spread.virtual,
                "cp": spread.context, "dp": spread.data, "micro_batch": spread.micro_batch,
                "recompute": spread.recompute, "precision": spread.precision,
            },
            "memory_gib": round(self.memory_bytes / 2**30, 1),
            "memory_band": f"+-{MEMORY_BAND:.0%}",
            "step_time_s": float(f"{self.step_time_s:.3g}"),
            "tokens_per_s": float(f"{self.tokens_per_s:.3g}"),
            "tokens_per_s_per_gpu": float(f"{per_gpu:.3g}"),
            "mfu": round(self.mfu, 3),
            "time_band": f"+-{TIME_BAND:.0%}",
        }  # fmt: skip


def plan(
    model: ModelConfig | str,
    batch: int,
    hardware: str | Gpu,
    count: int,
    *,
    vocabulary: int | None = None,
    precisions: Sequence[Precision] = ("bf16",),
    base: Config | None = None,
    limit: int | None = None,
) -> list[Plan]:
    """Layouts of `batch` sequences per step on `count` GPUs, fastest first; `[]` where none fits.

    `model` is a section or a preset's name, `hardware` a name of `hardware.GPUS`. `base` is the
    configuration whose other sections are kept. Raises `ValueError` for unknown names and for FP8
    on a GPU without it.
    """
    gpu = gpu_named(hardware) if isinstance(hardware, str) else hardware
    if isinstance(model, str):
        require(
            model in MODEL_PRESETS, "model_preset", model,
            f"choose one of {', '.join(MODEL_PRESETS)}.",
        )  # fmt: skip
        model = ModelConfig(**MODEL_PRESETS[model])
    vocabulary = vocabulary or model.vocab_size or DEFAULT_VOCABULARY
    for precision in precisions:
        if precision == "fp8" and gpu.fp8_flops is None:
            raise ValueError(f"--precision is 'fp8': {gpu.name} has no FP8; use bf16.")
    base = base or Config()
    plans = []
    for spread in _spreads(model, batch, gpu, count, precisions):
        config = _config(base, model, spread)
        if config is None:
            continue
        memory = footprint(model, vocabulary, spread, base.precision.loss_impl)
        if memory.total * (1 + MEMORY_BAND) + RESERVED_BYTES > gpu.memory_bytes:
            continue
        shape = Shape.of(model, vocabulary, is_causal=base.diffusion.objective == "ar")
        time = step_time(shape, spread, gpu, rates(), layer_traffic(model))
        plans.append(Plan(config, base, gpu, spread, vocabulary, memory, time))
    plans.sort(key=_rank)
    return plans[:limit]


def _rank(plan: Plan) -> tuple[float, ...]:
    spread = plan.spread
    simplicity = (spread.pipeline, spread.virtual, spread.context, spread.tensor)
    close = math.floor(math.log(plan.step_time_s) / math.log(_SAME_TIME))
    return (close, *simplicity, spread.recompute != "none", plan.memory_bytes)


def _spreads(
    model: ModelConfig, batch: int, gpu: Gpu, count: int, precisions: Sequence[Precision]
) -> Iterator[Spread]:
    pipelines = [p for p in range(1, _LONGEST_PIPELINE + 1) if model.num_layers % p == 0]
    chunks = range(1, _MOST_CHUNKS + 1)
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    for tensor, pipeline, virtual, context in product(_SIZES, pipelines, chunks, _SIZES):
        size = tensor * pipeline * context
        if count % size or (model.num_layers // pipeline) % virtual or tensor * context > 8:
            continue
        if virtual > 1 and pipeline == 1:
            continue
        for micro, recompute, precision in product(_MICRO_BATCHES, recomputes, precisions):
            if batch % (micro * (count // size)) == 0:
                yield Spread(
                    count, micro, batch, tensor, pipeline, virtual, context, recompute, precision
                )


def _config(base: Config, model: ModelConfig, spread: Spread) -> Config | None:
    """The run's configuration, `None` where it refuses the layout."""
    parallel = {
        "tensor_model_parallel_size": spread.tensor,
        "pipeline_model_parallel_size": spread.pipeline,
        "num_virtual_stages_per_pipeline_rank": spread.virtual,
        "context_parallel_size": spread.context,
        "sequence_parallel": spread.tensor > 1,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "recompute_granularity": None if spread.recompute == "none" else spread.recompute,
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    training = {"micro_batch_size": spread.micro_batch, "global_batch_size": spread.global_batch}
    precision: dict[str, Any] = {"bf16": True, "master_weights": True, "compile_layers": True}
    fp8 = WITHOUT_FP8
    if spread.precision == "fp8":
        precision["transformer_impl"] = "transformer_engine"
        fp8 = fp8 | {"fp8_format": "hybrid", "fp8_recipe": FP8_RECIPE}
    try:
        config = base.with_sections(
            model=vars(model), parallel=parallel, training=training, precision=precision, fp8=fp8
        )
        config.num_microbatches(spread.gpus)
    except ValueError:
        return None
    return config


def _spelled(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name)] if value else [flag(f"no_{name}")]
    return [flag(name), str(value)]
