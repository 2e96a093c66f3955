"""From a configuration to the parts of a run: tokenizer facts, data, model, optimizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.config import Config, DataConfig, require
from megatron_ext.data.dataset import Datasets, build_datasets
from megatron_ext.data.mock import MockDataset
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.model.diffusion_model import DiffusionModel
from megatron_ext.model.float8 import require_transformer_engine
from megatron_ext.model.init import initialize_weights
from megatron_ext.training.step import gradient_finalizer

from megatron.core.distributed import (  # isort: skip
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


@dataclass(frozen=True)
class Vocabulary:
    """What training needs to know about the tokenizer."""

    size: int
    mask_token_id: int
    pad_token_id: int | None
    eos_token_id: int | None
    fingerprint: str | None


def open_tokenizer(data: DataConfig) -> Tokenizer | None:
    """The run's tokenizer with the special ids that flags replace, if it has one."""
    if data.tokenizer_model is None:
        return None
    return load_tokenizer(
        data.tokenizer_model, mask_token_id=data.mask_token_id, pad_token_id=data.pad_token_id
    )


def resolve_vocabulary(config: Config, tokenizer: Tokenizer | None) -> Vocabulary:
    """Vocabulary size and special ids from flags, else from `open_tokenizer`'s tokenizer.

    Raises `ValueError` where neither says, or where they contradict each other.
    """
    data = config.data
    size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    require(size is not None, "vocab_size", size, "give it, or --tokenizer-model to take it from.")
    assert size is not None
    if tokenizer is None:
        mask, pad, eos, fingerprint = data.mask_token_id, data.pad_token_id, None, None
        advice = "without --tokenizer-model, give the id of a token that never occurs in text."
        require(mask is not None, "mask_token_id", mask, advice)
    else:
        require(
            size >= tokenizer.vocab_size, "vocab_size", size,
            f"the tokenizer {data.tokenizer_model} has {tokenizer.vocab_size} ids; leave the flag "
            "out.",
        )  # fmt: skip
        mask, pad, eos = tokenizer.special_id("mask"), tokenizer.pad_id, tokenizer.eos_id
        fingerprint = tokenizer.fingerprint
    assert mask is not None
    for name, value in (("mask_token_id", mask), ("pad_token_id", pad)):
        require(value is None or 0 <= value < size, name, value, f"the vocabulary has {size} ids.")
    require(
        pad is not None or config.noise.max_empty_fraction == 0
        or config.diffusion.objective == "ar",
        "max_empty_fraction", config.noise.max_empty_fraction,
        "there is no padding token to insert; give --pad-token-id, or 0.",
    )  # fmt: skip
    return Vocabulary(size, mask, pad, eos, fingerprint)


def build_schedule(config: Config, vocabulary: Vocabulary) -> MixingSchedule:
    diffusion = config.diffusion
    return MixingSchedule(
        vocab_size=vocabulary.size,
        mask_token_id=vocabulary.mask_token_id,
        shift=diffusion.shift,
        scale=diffusion.mixing_scale,
        min_log_snr=diffusion.min_log_snr,
        max_log_snr=diffusion.max_log_snr,
    )


def build_data(config: Config, vocabulary: Vocabulary) -> Datasets:
    """Training, validation and test data; every file is checked before the first step.

    One rank of each node opens (and scans) the files before the others.
    """
    data = config.data
    extra = 1 if config.diffusion.objective == "ar" else 0
    if data.mock_data:
        length = config.model.seq_length + extra
        return Datasets(MockDataset(vocabulary.size, length, config.training.seed), None, None)
    require(
        bool(data.data_path), "data_path", data.data_path,
        "give the prefix of .bin/.idx files, or --mock-data.",
    )  # fmt: skip
    if data.drop_aligned_eos:
        require(
            vocabulary.eos_token_id is not None, "drop_aligned_eos", True,
            "the end-of-document token is unknown; give a --tokenizer-model that names it.",
        )  # fmt: skip
    waits = int(os.environ.get("LOCAL_RANK", "0")) != 0
    if waits:
        torch.distributed.barrier()
    try:
        return build_datasets(
            data.data_path,
            data.valid_data_path,
            data.test_data_path,
            split=data.split,
            seq_length=config.model.seq_length,
            seed=config.training.seed,
            vocab_size=vocabulary.size,
            tokenizer_fingerprint=vocabulary.fingerprint,
            extra_tokens=extra,
            aligned_eos_id=vocabulary.eos_token_id if data.drop_aligned_eos else None,
        )
    finally:
        if not waits:
            torch.distributed.barrier()


def build_model(
    config: Config,
    vocab_size: int,
    schedule: MixingSchedule,
    groups: ProcessGroupCollection,
    initialize: Callable[[DiffusionModel, int, int], None] = initialize_weights,
) -> list[DistributedDataParallel]:
    """This rank's model chunks, initialised by name and wrapped for gradient reduction.

    `initialize(chunk, vocab_size, seed)` gives weights their first values.
    """
    require_transformer_engine(config.precision)
    virtual = config.parallel.num_virtual_stages_per_pipeline_rank
    pp_rank, pp_size = groups.pp.rank(), groups.pp.size()
    chunks = []
    for stage in range(virtual):
        model = DiffusionModel(
            config,
            vocab_size,
            schedule,
            groups,
            pre_process=pp_rank == 0 and stage == 0,
            post_process=pp_rank == pp_size - 1 and stage == virtual - 1,
            vp_stage=stage if virtual > 1 else None,
        )
        initialize(model, vocab_size, config.training.seed)
        chunks.append(model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.accumulate_allreduce_grads_in_fp32
        and config.precision.master_weights,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,
        fp8_param_gather=config.fp8.fp8_param_gather,
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config, ddp, chunk, disable_bucketing=i > 0, pg_collection=groups
        )
        for i, chunk in enumerate(chunks)
    ]
    _connect(wrapped, config)
    return wrapped


def _connect(chunks: list[DistributedDataParallel], config: Config) -> None:
    """Tell megatron-core's schedule how to finish gradients; it reads these from its config."""

    def one_or_list(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    engine = chunks[0].config
    engine.finalize_model_grads_func = gradient_finalizer(config.diffusion.loss_normalization)
    if config.parallel.overlap_grad_reduce:
        engine.no_sync_func = one_or_list([chunk.no_sync for chunk in chunks])
        engine.grad_sync_func = one_or_list([chunk.start_grad_sync for chunk in chunks])
    if config.parallel.overlap_param_gather:
        engine.param_sync_func = one_or_list([chunk.start_param_sync for chunk in chunks])
