"""From a configuration to the parts of a run: tokenizer facts, data, model, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ext.config import Config, require
from megatron_ext.data.dataset import Datasets, MockDataset, build_datasets
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.model.diffusion_model import DiffusionModel
from megatron_ext.model.init import initialize_weights
from megatron_ext.model.translate import transformer_config
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
    fingerprint: str | None


def resolve_vocabulary(config: Config) -> tuple[Vocabulary, Tokenizer | None]:
    """Vocabulary size and special ids from flags, else from the tokenizer.

    Raises `ValueError` where neither says, or where they contradict each other.
    """
    tokenizer = None
    if config.data.tokenizer_model is not None:
        tokenizer = load_tokenizer(config.data.tokenizer_model)
    size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    require(
        size is not None, "vocab_size", size, "give it, or --tokenizer-model to take it from."
    )
    assert size is not None
    require(
        tokenizer is None or size >= tokenizer.vocab_size, "vocab_size", size,
        f"the tokenizer {config.data.tokenizer_model} has "
        f"{tokenizer.vocab_size if tokenizer else 0} ids; leave the flag out.",
    )  # fmt: skip
    mask, pad = config.data.mask_token_id, config.data.pad_token_id
    if tokenizer is not None:
        mask = tokenizer.mask_token_id if mask is None else mask
        pad = tokenizer.pad_token_id if pad is None else pad
    require(
        mask is not None, "mask_token_id", mask,
        "the tokenizer has no mask token; give the id of a token that never occurs in text.",
    )  # fmt: skip
    assert mask is not None
    for name, value in (("mask_token_id", mask), ("pad_token_id", pad)):
        require(value is None or 0 <= value < size, name, value, f"the vocabulary has {size} ids.")
    return Vocabulary(size, mask, pad, tokenizer.fingerprint if tokenizer else None), tokenizer


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
    """Training, validation and test data; every file is checked before the first step."""
    extra = 1 if config.diffusion.objective == "ar" else 0
    if config.data.mock_data:
        mock = MockDataset(vocabulary.size, config.model.seq_length + extra, config.training.seed)
        return Datasets(train=mock, valid=None, test=None)
    require(
        bool(config.data.data_path), "data_path", config.data.data_path,
        "give the prefix of .bin/.idx files, or --mock-data.",
    )  # fmt: skip
    return build_datasets(
        config.data.data_path,
        config.data.valid_data_path,
        config.data.test_data_path,
        split=config.data.split,
        seq_length=config.model.seq_length,
        seed=config.training.seed,
        vocab_size=vocabulary.size,
        tokenizer_fingerprint=vocabulary.fingerprint,
        extra_tokens=extra,
        drop_aligned_eos=config.data.drop_aligned_eos,
    )


def build_model(
    config: Config, vocab_size: int, schedule: MixingSchedule, groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """This rank's model chunks, initialised by name and wrapped for gradient reduction."""
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
        initialize_weights(model, vocab_size, config.training.seed)
        chunks.append(model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.accumulate_allreduce_grads_in_fp32
        and config.precision.master_weights,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,
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
