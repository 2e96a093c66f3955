"""A training run's model, ready to be asked for logits, on one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.training import find_checkpoint, load_checkpoint
from megatron_ext.cli import load_config
from megatron_ext.config import Config, ParallelConfig, require
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.model.diffusion_model import DiffusionModel
from megatron_ext.parallel.groups import device_of_rank, initialize_parallel
from megatron_ext.training.build import build_schedule, resolve_vocabulary


@dataclass(frozen=True)
class LoadedRun:
    """Weights of a checkpoint with what they were trained with."""

    config: Config
    schedule: MixingSchedule
    tokenizer: Tokenizer
    model: DiffusionModel
    step: int

    def denoise(self, ids: Tensor, visibility: Tensor) -> Tensor:
        """Logits [b, s, v] float32 on the CPU."""
        device = device_of_rank()
        return self.model(ids.to(device), visibility.to(device)).cpu()


def load_run(root: str | Path, step: int | None = None, tokenizer: str | None = None) -> LoadedRun:
    """Open the checkpoint `step` (latest when absent) of the run that was saved to `root`.

    The layout it was trained at does not matter. `tokenizer` replaces the run's own path. Raises
    `ValueError` where there is no run, no tokenizer, or the model is causal.
    """
    path = Path(root) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"--load is {str(root)!r}: there is no config.yaml of a run in it.")
    saved = load_config(path)
    tokenizer = tokenizer or saved.data.tokenizer_model
    require(tokenizer is not None, "tokenizer_model", tokenizer, "the run has none; give one.")
    config = Config(
        model=saved.model,
        diffusion=saved.diffusion,
        precision=saved.precision,
        noise=saved.noise,
        data=saved.with_sections(data={"tokenizer_model": tokenizer}).data,
        parallel=ParallelConfig(distributed_backend=saved.parallel.distributed_backend),
    )
    require(
        config.diffusion.objective != "ar", "load", str(root),
        "it is an autoregressive run; this samples diffusion models.",
    )  # fmt: skip
    folder = find_checkpoint(root, step)
    groups = initialize_parallel(config.parallel)
    require(
        torch.distributed.get_world_size() == 1, "load", str(root),
        "sampling runs on one process; start it without torchrun.",
    )  # fmt: skip
    vocabulary = resolve_vocabulary(config)
    schedule = build_schedule(config, vocabulary)
    model = DiffusionModel(config, vocabulary.size, schedule, groups).to(device_of_rank()).eval()
    position = load_checkpoint(folder, [model], None)
    return LoadedRun(config, schedule, load_tokenizer(str(tokenizer)), model, position.step)
