"""Real steps on this machine's CPU, to hold dry runs against.

`measure_step` is called in a process of its own (`measure.memory.call_in_child` with the allocator
that returns memory), where it spawns the ranks. A rank reports what its process needed beyond what
it had before it built the model, so that interpreter and libraries do not count.
"""

from __future__ import annotations

import gc
import json
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_ext.measure.memory import call_in_child, peak_memory
from megatron_ext.planning.dry_run import config_for, full_batches
from megatron_ext.training.loop import Trainer

WARM_UP = Config(
    model=ModelConfig(num_layers=1, hidden_size=64, num_attention_heads=1, seq_length=32,
                      vocab_size=128),
    training=TrainingConfig(micro_batch_size=1, global_batch_size=1),
    data=DataConfig(mock_data=True, mask_token_id=0, pad_token_id=1),
)  # fmt: skip
"""Brings in the code that a step needs."""


def config_of(sections: dict[str, dict[str, Any]]) -> Config:
    """Sections' values over the defaults."""
    return Config().with_sections(**sections)


def measured_peaks(sections: dict[str, dict[str, Any]], ranks: int = 1) -> list[int]:
    """Bytes of resident memory that a step of this configuration needs, by rank."""
    arguments = {"sections": sections, "ranks": ranks}
    return call_in_child(f"{__name__}:measure_step", arguments, allocator="returned")


def measure_step(sections: dict[str, dict[str, Any]], ranks: int) -> list[int]:
    """The child's side of `measured_peaks`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, sections)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=ranks, join=True)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, sections: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    config = config_of(sections)
    alike = {"global_batch_size": ranks, "micro_batch_size": 1}
    _take_steps(WARM_UP.with_sections(training=alike))
    gc.collect()
    peak = peak_memory(lambda: _take_steps(config))
    Path(folder, f"{rank}.json").write_text(json.dumps(peak))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _take_steps(config: Config, count: int = 2) -> None:
    config = config_for(config, "cpu")
    trainer = Trainer.build(config)
    num_microbatches = config.num_microbatches(torch.distributed.get_world_size())
    for _ in range(count):
        trainer.train_step(full_batches(config, trainer.vocabulary, num_microbatches))
