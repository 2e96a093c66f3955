"""A model ready for sampling: from a training run at any layout, or from a Hugging Face folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_ext.checkpoint.training import find_checkpoint, load_checkpoint
from megatron_ext.cli import load_config
from megatron_ext.config import Config, ParallelConfig, require
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.hf.generation_gidd import CachedDenoiser
from megatron_ext.hf.sampling_gidd import Denoiser
from megatron_ext.inference.denoiser import TrainingDenoiser
from megatron_ext.model.diffusion_model import DiffusionModel
from megatron_ext.parallel.groups import (
    device_of_rank,
    initialize_distributed,
    initialize_parallel,
)
from megatron_ext.training.build import build_schedule, open_tokenizer, resolve_vocabulary

if TYPE_CHECKING:
    from megatron_ext.hf import GiddForDiffusionLM


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with what it was trained with."""

    denoiser: Denoiser
    schedule: MixingSchedule
    tokenizer: Tokenizer
    context: int
    """Positions of the model."""
    name: str
    device: torch.device


def load_model(
    path: str | Path,
    step: int | None = None,
    tokenizer: str | None = None,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008
    *,
    replicas: bool = False,
) -> LoadedModel:
    """A run's `--save` folder, or a folder in the published Hugging Face format.

    `step` and `parallel` are for runs. `tokenizer` replaces the one that the folder names. With
    `replicas`, ranks beyond tp x pp hold copies of the model. Raises `ValueError` for anything
    else.
    """
    if (Path(path) / "config.json").is_file():
        require(step is None, "ckpt_step", step, f"{path} is a Hugging Face folder.")
        require(
            parallel.model_parallel_size == 1, "tensor_model_parallel_size",
            parallel.tensor_model_parallel_size, f"{path} is a Hugging Face folder; leave it out.",
        )  # fmt: skip
        if replicas:
            initialize_distributed(parallel)
        require(
            replicas or int(os.environ.get("WORLD_SIZE", "1")) == 1, "load", str(path),
            "a Hugging Face model samples on one process; start it without torchrun.",
        )  # fmt: skip
        return _load_hugging_face(Path(path), tokenizer)
    return _load_run(Path(path), step, tokenizer, parallel, replicas)


def _load_hugging_face(path: Path, tokenizer: str | None) -> LoadedModel:
    device = device_of_rank()
    model = _open_hugging_face(path).to(device).eval()
    loaded = load_tokenizer(tokenizer or str(path))
    schedule = model.mixing_schedule(loaded.special_id("mask"))
    context = model.config.max_position_embeddings
    return LoadedModel(CachedDenoiser(model), schedule, loaded, context, str(path), device)


def _open_hugging_face(path: Path) -> GiddForDiffusionLM:
    """All weights from the folder: transformers would draw missing ones and go on."""
    from megatron_ext.hf import GiddForDiffusionLM

    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    require(kind == "gidd", "load", str(path), f"its model type is {kind!r}; give one of gidd.")
    try:
        model, found = GiddForDiffusionLM.from_pretrained(path, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--load is {str(path)!r}: {error}") from error
    for state in ("missing", "unexpected"):
        keys = sorted(found[f"{state}_keys"])
        require(not keys, "load", str(path), f"its weights do not fit; {state}: {', '.join(keys)}.")
    return model


def _load_run(
    root: Path, step: int | None, tokenizer: str | None, parallel: ParallelConfig, replicas: bool
) -> LoadedModel:
    """Open the checkpoint `step` (latest when absent) of the run that was saved to `root`.

    The layout it was trained at does not matter. `tokenizer` replaces the run's own path. Raises
    `ValueError` where there is no run, no tokenizer, the model is causal, or the layout is not
    one of tensor and pipeline parallelism alone.
    """
    path = root / "config.yaml"
    if not path.is_file():
        raise ValueError(f"--load is {str(root)!r}: there is no config.yaml of a run in it.")
    saved = load_config(path)
    path_of_tokenizer = tokenizer or saved.data.tokenizer_model
    # The weights serve every implementation; compiled layers would compile for every length.
    precision = replace(
        saved.precision, attention_impl="auto", transformer_impl="local", compile_layers=False
    )
    config = Config(
        model=saved.model,
        diffusion=saved.diffusion,
        precision=precision,
        noise=saved.noise,
        data=saved.with_sections(data={"tokenizer_model": path_of_tokenizer}).data,
        parallel=parallel,
    )
    require(
        config.diffusion.objective != "ar", "load", str(root),
        "it is an autoregressive run; this samples diffusion models.",
    )  # fmt: skip
    opened = open_tokenizer(config.data)
    if opened is None:
        raise ValueError("--tokenizer-model is None: the run has none; give one.")
    folder = find_checkpoint(root, step)
    groups = initialize_parallel(config.parallel)
    world_size = torch.distributed.get_world_size()
    require(
        parallel.context_parallel_size == 1
        and (replicas or world_size == parallel.model_parallel_size),
        "tensor_model_parallel_size", parallel.tensor_model_parallel_size,
        f"tp x pp must be the number of ranks ({world_size}), and cp 1.",
    )  # fmt: skip
    require(
        parallel.num_virtual_stages_per_pipeline_rank == 1 and not parallel.sequence_parallel,
        "num_virtual_stages_per_pipeline_rank", parallel.num_virtual_stages_per_pipeline_rank,
        "here a pipeline rank holds one chunk, and there is no sequence parallelism.",
    )  # fmt: skip
    vocabulary = resolve_vocabulary(config, opened)
    schedule = build_schedule(config, vocabulary)
    model = DiffusionModel(
        config,
        vocabulary.size,
        schedule,
        groups,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
    )
    model = model.to(device_of_rank()).eval()
    position = load_checkpoint(folder, [model], None)
    return LoadedModel(
        TrainingDenoiser(model),
        schedule,
        opened,
        config.model.seq_length,
        f"{root} at step {position.step}",
        device_of_rank(),
    )
