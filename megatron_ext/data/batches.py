"""From sample indices to micro-batches: tokens, noise and masks, cut for this rank's cp piece.

Which sequences a rank sees follows from arithmetic: step k of a run with global batch size B
consumes samples kB ... kB + B - 1; micro-batch m of data-parallel rank r takes the `b` of them
that start at m b dp + r b. The noise of a sample depends on its index alone, so no layout, batch
split or restart changes it. tp and pp ranks build the same micro-batch; nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.diffusion.noising import NoisedSequence, noise_for_validation, noise_sequence
from megatron_ext.diffusion.schedule import MixingSchedule


class PackedSample(Protocol):
    """What a dataset returns: `tokens` and `documents`, both [s] (plus extra tokens)."""

    tokens: np.ndarray
    documents: np.ndarray


class Dataset(Protocol):
    """Packed sequences by index."""

    def sample(self, index: int) -> PackedSample: ...


class MicroBatch(NamedTuple):
    """One forward pass of one rank; `s_local = s/cp`."""

    input_ids: Tensor
    """[b, s_local] int64, noised tokens."""
    visibility: Tensor
    """[b, 2, s] int32, level and document of every position of the whole sequence."""
    x0: Tensor
    """[b, s_local] int64, clean tokens; for ar the token to predict."""
    log_snr: Tensor
    """[b, s_local] float32."""
    loss_mask: Tensor
    """[b, s_local] bool, positions in the loss."""
    projected: Tensor
    """[k] int64, positions whose loss may be other than zero, as indices of [s_local, b]."""

    def to(self, device: torch.device) -> MicroBatch:
        """On `device`, but for `visibility`: attention plans with its integers on the host."""
        moved = (tensor.to(device, non_blocking=True) for tensor in self)
        return MicroBatch(*moved)._replace(visibility=self.visibility)


@dataclass(frozen=True)
class RankPosition:
    """Where a rank stands among those that share the data."""

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int


@dataclass(frozen=True)
class BatchSource:
    """Micro-batches of a run for one rank."""

    dataset: Dataset
    schedule: MixingSchedule
    config: Config
    position: RankPosition
    empty_token_id: int | None

    def sample_indices(self, step: int) -> list[range]:
        """Global sample indices of each of this rank's micro-batches at a step."""
        training, position = self.config.training, self.position
        size = training.micro_batch_size
        stride = size * position.dp_size
        first = step * training.global_batch_size + position.dp_rank * size
        starts = range(first, first + training.global_batch_size, stride)
        return [range(start, start + size) for start in starts]

    def step(self, step: int) -> list[MicroBatch]:
        """All micro-batches of an optimizer step, in order."""
        return [
            self._collate([self._training_sequence(index) for index in indices])
            for indices in self.sample_indices(step)
        ]

    def validation(self, indices: Sequence[int], draw: int, num_draws: int) -> MicroBatch:
        """Sequences `indices` with the fixed noise of validation draw `draw` of `num_draws`.

        An index of -1 fills up a micro-batch: its positions are not in the loss.
        """
        rows = []
        for index in indices:
            row = self._validation_sequence(max(index, 0), draw, num_draws)
            rows.append(row if index >= 0 else row._replace(noise_mask=row.noise_mask & False))
        return self._collate(rows)

    @property
    def _is_causal(self) -> bool:
        return self.config.diffusion.objective == "ar"

    def _training_sequence(self, index: int) -> NoisedSequence:
        sample = self.dataset.sample(index)
        documents = sample.documents if self.config.data.reset_attention_mask else None
        if self._is_causal:
            return next_token_sequence(sample.tokens, documents)
        return noise_sequence(
            sample.tokens, self.schedule, self.config.noise, seed=self.config.training.seed,
            index=index, documents=documents, empty_token_id=self.empty_token_id,
        )  # fmt: skip

    def _validation_sequence(self, index: int, draw: int, num_draws: int) -> NoisedSequence:
        sample = self.dataset.sample(index)
        documents = sample.documents if self.config.data.reset_attention_mask else None
        if self._is_causal:
            return next_token_sequence(sample.tokens, documents)
        return noise_for_validation(
            sample.tokens, self.schedule, seed=self.config.training.seed, index=index, draw=draw,
            num_draws=num_draws, documents=documents,
        )  # fmt: skip

    def _collate(self, rows: list[NoisedSequence]) -> MicroBatch:
        x0, xt, log_snr, noise_mask, visibility = (
            torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)
        )
        local = x0.shape[1] // self.position.cp_size
        piece = slice(self.position.cp_rank * local, (self.position.cp_rank + 1) * local)
        input_ids, loss_mask = xt[:, piece].contiguous(), noise_mask[:, piece].contiguous()
        may_cost = loss_mask
        if self.schedule.is_mask_only and not self._is_causal:
            # Masked noise gives a token that was left as it is no weight.
            may_cost = loss_mask & (input_ids == self.schedule.mask_token_id)
        return MicroBatch(
            input_ids=input_ids,
            visibility=visibility,
            x0=x0[:, piece].contiguous(),
            log_snr=log_snr[:, piece].contiguous(),
            loss_mask=loss_mask,
            # Made here, where it costs a GPU no synchronisation.
            projected=may_cost.t().reshape(-1).nonzero().squeeze(-1),
        )


def next_token_sequence(tokens: np.ndarray, documents: np.ndarray | None) -> NoisedSequence:
    """The autoregressive baseline as data: inputs are tokens [0, s), targets tokens [1, s]."""
    inputs, targets = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    visibility = np.zeros((2, len(inputs)), dtype=np.int32)
    in_loss = np.ones(len(inputs), dtype=bool)
    if documents is not None:
        visibility[1] = documents[:-1]
        in_loss = documents[1:] == documents[:-1]
    return NoisedSequence(
        x0=targets,
        xt=inputs,
        log_snr=np.zeros(len(inputs), dtype=np.float32),
        noise_mask=in_loss,
        visibility=visibility,
    )


def prefetched(
    source: BatchSource, first_step: int, last_step: int, workers: int
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of steps first_step ... last_step - 1, prepared ahead by threads."""
    if workers == 0:
        yield from (source.step(step) for step in range(first_step, last_step))
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="batch") as pool:
        ahead = [
            pool.submit(source.step, step)
            for step in range(first_step, min(first_step + 2 * workers, last_step))
        ]
        for step in range(first_step, last_step):
            ready = ahead.pop(0).result()
            if step + 2 * workers < last_step:
                ahead.append(pool.submit(source.step, step + 2 * workers))
            yield ready
