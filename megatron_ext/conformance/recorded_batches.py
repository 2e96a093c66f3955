"""Recorded sequences as the training code's micro-batches, at any dp, cp and micro-batch size.

The index arithmetic and the cp cut are `BatchSource`'s; only noise and tokens are the recorded
ones. What a layout needs and the recording lacks is filled up so that no number changes: sequences
up to a multiple of micro-batch x dp (x pp with virtual stages) that are not in the loss, and
positions up to a multiple of the pieces of a sequence that are a document of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_ext.config import Config
from megatron_ext.conformance.golden import Arrays
from megatron_ext.conformance.session import Session
from megatron_ext.data.batches import BatchSource, RankPosition
from megatron_ext.diffusion.noising import NoisedSequence
from megatron_ext.diffusion.schedule import MixingSchedule


def padded_length(length: int, config: Config) -> int:
    """Smallest multiple of the number of pieces of a sequence."""
    parallel = config.parallel
    pieces = parallel.context_parallel_size
    if parallel.sequence_parallel:
        pieces *= parallel.tensor_model_parallel_size
    return -(-length // pieces) * pieces


def padded_batch(size: int, session: Session) -> int:
    """Smallest number of sequences that the layout can share out."""
    parallel = session.config.parallel
    multiple = session.config.training.micro_batch_size * session.groups.dp.size()
    if parallel.num_virtual_stages_per_pipeline_rank > 1:
        multiple *= parallel.pipeline_model_parallel_size
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Steps:
    """Noised sequences of consecutive steps, each [steps, b, s]."""

    input_ids: np.ndarray
    labels: np.ndarray
    log_snr: np.ndarray
    noise_mask: np.ndarray

    @classmethod
    def of(cls, recorded: Arrays, *, first_dim_is_step: bool) -> Steps:
        """The entries of a file, [steps, b, s] or [b, s]."""
        names = ("input_ids", "labels", "log_snr", "noise_mask")
        return cls(*(recorded[key] if first_dim_is_step else recorded[key][None] for key in names))

    def sequence(self, step: int, row: int, length: int) -> NoisedSequence:
        """One sequence filled up to `length`; an absent row has no position in the loss.

        What was clean was the prompt, which does not see the noised positions.
        """
        exists = row < self.labels.shape[1]
        fill = length - self.labels.shape[2]
        row = row if exists else 0
        noised = self.noise_mask[step, row]
        visibility = np.zeros((2, length), dtype=np.int32)
        visibility[0, : len(noised)] = noised
        visibility[1, self.labels.shape[2] :] = 1
        return NoisedSequence(
            x0=np.pad(self.labels[step, row].astype(np.int64), (0, fill)),
            xt=np.pad(self.input_ids[step, row].astype(np.int64), (0, fill)),
            log_snr=np.pad(self.log_snr[step, row].astype(np.float32), (0, fill)),
            noise_mask=np.pad(noised & exists, (0, fill)),
            visibility=visibility,
        )


@dataclass(frozen=True)
class RecordedSource(BatchSource):
    """`BatchSource` over recorded noise; its dataset and schedule are not used."""

    steps: Steps

    def _training_sequence(self, index: int) -> NoisedSequence:
        step, row = divmod(index, self.config.training.global_batch_size)
        return self.steps.sequence(step, row, self.config.model.seq_length)


def recorded_source(
    steps: Steps, config: Config, schedule: MixingSchedule, session: Session
) -> RecordedSource:
    """`config` has the padded sequence length and global batch size."""
    groups = session.groups
    position = RankPosition(groups.dp.rank(), groups.dp.size(), groups.cp.rank(), groups.cp.size())
    return RecordedSource(
        dataset=None,  # type: ignore[arg-type]
        schedule=schedule,
        config=config,
        position=position,
        empty_token_id=None,
        steps=steps,
    )


def piece_of_rank(length: int, session: Session, *, of_hidden: bool = False) -> slice:
    """Positions of a padded sequence on this rank: a cp piece, for hidden states also split on tp
    under sequence parallelism."""
    groups = session.groups
    size, rank = groups.cp.size(), groups.cp.rank()
    if of_hidden and session.config.parallel.sequence_parallel:
        size, rank = size * groups.tp.size(), rank * groups.tp.size() + groups.tp.rank()
    local = length // size
    return slice(rank * local, (rank + 1) * local)


def pad_positions(values: torch.Tensor, dim: int, length: int, value: float = 0) -> torch.Tensor:
    """Append `value` along `dim` up to `length`."""
    shape = list(values.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([values, values.new_full(shape, value)], dim)
