"""The real training step of any rank of any run, without its memory, its time or its machines.

Model, optimizer and step are those of training, on fake tensors (`fakes`): wrong shapes and sizes
that do not divide are found where a cluster would find them. `watch` counts while it runs.

Data is the most there can be: every position is in the loss and sees every other. On behalf of a
GPU (`device` "gpu") attention is flash-attn's and the loss Triton's, described by what they
allocate and multiply (`--attention-impl` and `--loss-impl` other than `auto` are left as they are);
for "cpu" both are what a CPU would run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_ext.config import Config
from megatron_ext.data.batches import MicroBatch
from megatron_ext.data.dataset import Datasets
from megatron_ext.data.mock import MockDataset
from megatron_ext.optim.laprop import GPU_TILE_ELEMENTS
from megatron_ext.parallel.groups import initialize_parallel
from megatron_ext.planning.collectives import CollectiveCounts
from megatron_ext.planning.fakes import fake_tensors, pretended_rank
from megatron_ext.planning.memory import MemoryTrace, Segment
from megatron_ext.planning.planner import WITHOUT_FP8
from megatron_ext.planning.products import ProductCounts, TrafficCounts
from megatron_ext.planning.watch import Watch
from megatron_ext.training.build import Vocabulary, open_tokenizer, resolve_vocabulary
from megatron_ext.training.loop import Trainer

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip

Device = Literal["gpu", "cpu"]
DEFAULT_VOCABULARY = 131072
"""The paper's."""


@dataclass(frozen=True)
class StepReport:
    """What one rank's step holds, multiplies and sends; bytes and FLOPs are of this rank alone."""

    rank: int
    world_size: int
    device: Device
    num_microbatches: int
    num_parameters: int
    """On this rank, padding of the vocabulary included."""
    peak_bytes: int
    bytes_at_peak: dict[str, int]
    """By category; `peak_bytes` in all."""
    bytes_at_rest: dict[str, int]
    """Between two steps."""
    timeline: list[Segment]
    flops: dict[str, dict[str, int]]
    """Of matrix products, by kind and phase."""
    traffic_bytes: dict[str, int]
    """Read and written by operations other than products, by phase."""
    collectives: list[dict[str, Any]]
    """Rows of group, size, operation, num_bytes (of one message), count; without groups of one."""
    seconds: float
    """That building the model and taking the step took here."""
    host_reads: int = 0
    """Times the host waits for a number of the device in a step; of dry runs."""

    @property
    def total_flops(self) -> int:
        return sum(sum(phases.values()) for phases in self.flops.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, ready for JSON."""
        return asdict(self) | {"timeline": [segment._asdict() for segment in self.timeline]}


def dry_run(
    config: Config, world_size: int, rank: int = 0, *, device: Device = "gpu"
) -> StepReport:
    """The step of `rank` among `world_size`; raises what the run itself would raise there.

    The process must not be part of a distributed run.
    """
    with pretended_rank(rank, world_size):
        # Groups and random-number generators are real.
        groups = initialize_parallel(config.parallel, config.training.seed)
        with fake_tensors() as answers:
            before, report = answers.num_host_reads, observe_step(config, groups, device)
        return replace(report, host_reads=answers.num_host_reads - before)


def observe_step(
    config: Config,
    groups: ProcessGroupCollection,
    device: Device,
    initialize: Callable[[Any, int, int], None] | None = None,
) -> StepReport:
    """Build this rank's model, take one step on full data, and report it.

    Without `initialize` weights get no values, which is for fake tensors.
    """
    started = time.perf_counter()
    config = config_for(config, device)
    world_size = torch.distributed.get_world_size()
    num_microbatches = config.num_microbatches(world_size)
    vocabulary = resolve_vocabulary(config, open_tokenizer(config.data))
    memory, products, traffic, collectives = (
        MemoryTrace(), ProductCounts(), TrafficCounts(), CollectiveCounts(),
    )  # fmt: skip
    watch = Watch(memory, products, traffic, collectives)
    with watch:
        trainer = _build(config, groups, vocabulary, memory, initialize)
        if device == "gpu":
            trainer.optimizer.optimizer.tile_elements = GPU_TILE_ELEMENTS
        watch.follow(_heads(trainer.model))
        batches = full_batches(config, vocabulary, num_microbatches)
        for batch in batches:
            for tensor in batch:
                memory.add(tensor, "buffers")
        products.flops.clear()
        traffic.num_bytes.clear()
        collectives.counts.clear()
        memory.start_step()
        trainer.train_step(batches)
        memory.finish_step()
    return StepReport(
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        device=device,
        num_microbatches=num_microbatches,
        num_parameters=sum(p.numel() for chunk in trainer.model for p in chunk.parameters()),
        peak_bytes=memory.peak,
        bytes_at_peak=dict(memory.at_peak),
        bytes_at_rest=dict(memory.now),
        timeline=memory.timeline,
        flops=_nested(products),
        traffic_bytes=dict(traffic.num_bytes),
        collectives=[
            message._asdict() | {"count": count}
            for message, count in sorted(collectives.counts.items())
        ],
        seconds=time.perf_counter() - started,
    )


def config_for(config: Config, device: Device) -> Config:
    """The same run with implementations that a dry run can walk through, and without its data.

    FP8 is left out: Transformer Engine takes no fake tensors. A tokenizer is opened only where
    there is no --vocab-size; without either, the vocabulary is the paper's.
    """
    changes: dict[str, Any] = {"transformer_impl": "local"}
    for name, on_cpu in (("attention_impl", "blocked"), ("loss_impl", "chunked")):
        if getattr(config.precision, name) in ("auto", "flash", "flex", "triton", "compiled"):
            changes[name] = "described" if device == "gpu" else on_cpu
    data: dict[str, Any] = {"mock_data": True, "data_path": ()}
    model: dict[str, Any] = {}
    if config.model.vocab_size is not None or config.data.tokenizer_model is None:
        model["vocab_size"] = config.model.vocab_size or DEFAULT_VOCABULARY
        data["tokenizer_model"] = None
        for name, position in (("mask_token_id", 0), ("pad_token_id", 1)):
            data[name] = getattr(config.data, name) or position
    return config.with_sections(
        precision=changes, fp8=WITHOUT_FP8, data=data, model=model,
        parallel={"distributed_backend": "auto"},
    )  # fmt: skip


def full_batches(config: Config, vocabulary: Vocabulary, count: int) -> list[MicroBatch]:
    """Micro-batches of one rank in which every position is in the loss and sees every other."""
    model, rows = config.model, config.training.micro_batch_size
    local = model.seq_length // config.parallel.context_parallel_size
    shape = (rows, local)

    def batch() -> MicroBatch:
        ids = torch.full(shape, vocabulary.mask_token_id)
        return MicroBatch(
            input_ids=ids,
            visibility=_on_host(rows, 2, model.seq_length),
            x0=torch.full(shape, (vocabulary.mask_token_id + 1) % vocabulary.size),
            log_snr=torch.zeros(shape),
            loss_mask=torch.ones(shape, dtype=torch.bool),
            projected=torch.arange(rows * local),
        )

    return [batch() for _ in range(count)]


def _on_host(*shape: int) -> torch.Tensor:
    """Zeros with numbers, under fake tensors too."""
    with unset_fake_temporarily():
        return torch.zeros(shape, dtype=torch.int32)


def _build(
    config: Config,
    groups: ProcessGroupCollection,
    vocabulary: Vocabulary,
    memory: MemoryTrace,
    initialize: Callable[[Any, int, int], None] | None,
) -> Trainer:
    memory.default = "weights"
    data = MockDataset(vocabulary.size, config.model.seq_length + 1, config.training.seed)

    def first_values(model: Any, vocab_size: int, seed: int) -> None:
        if initialize is not None:
            initialize(model, vocab_size, seed)
        # What follows are gradients, told apart below, and the optimizer.
        memory.default = "optimizer"

    trainer = Trainer.assemble(
        config, groups, vocabulary, Datasets(data, None, None), initialize=first_values
    )
    for chunk in trainer.model:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            memory.classify(buffer.grad_data, "gradients")
            if buffer.param_data is not None:
                memory.classify(buffer.param_data, "weights")
        for parameter in chunk.parameters():
            memory.classify(parameter, "weights")
    return trainer


def _heads(model: list[Any]) -> list[torch.nn.Module]:
    return [chunk.module.output_layer for chunk in model if chunk.module.post_process]


def _nested(products: ProductCounts) -> dict[str, dict[str, int]]:
    result: dict[str, dict[str, int]] = {}
    for (kind, phase), flops in products.flops.items():
        result.setdefault(kind, {})[phase] = flops
    return result
