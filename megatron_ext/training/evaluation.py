"""The validation bound: fixed noise, several noise levels per sequence, a standard error.

Sequence i at draw d meets the same noise at every evaluation of every layout. The bound of a
sequence is the mean over its draws, which are stratified in time; the standard error is that of
the mean over sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ext.config import Config
from megatron_ext.data.batches import BatchSource
from megatron_ext.training.step import LossSums, reduced_sums, run_micro_batches

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


@dataclass(frozen=True)
class ValidationResult:
    """The bound on the negative log-likelihood."""

    elbo: float
    """Nats per token."""
    standard_error: float
    """Of `elbo`, over sequences, nats per token."""
    sums: LossSums
    num_sequences: int


@torch.no_grad()
def evaluate(
    model: list[torch.nn.Module],
    source: BatchSource,
    num_sequences: int,
    config: Config,
    groups: ProcessGroupCollection,
    device: torch.device,
    progress: Callable[[], None] | None = None,
) -> ValidationResult:
    """Evaluate the first `num_sequences` of the source's data. Every rank calls this together.

    `progress` is called for every micro-batch of sequences.
    """
    draws = 1 if config.diffusion.objective == "ar" else config.training.eval_draws
    size, position = config.training.micro_batch_size, source.position
    # Interleaved schedules want a multiple of the pipeline size; draws of -1 fill it up.
    passes = -(-draws // groups.pp.size()) * groups.pp.size()
    for chunk in model:
        chunk.eval()
    reports = []
    moments = torch.zeros(3, dtype=torch.float64, device=device)
    for start in range(0, num_sequences, size * position.dp_size):
        if progress is not None:
            progress()
        first = start + position.dp_rank * size
        rows = [i if i < num_sequences else -1 for i in range(first, first + size)]
        absent = [-1] * size
        batches = [
            source.validation(rows if draw < draws else absent, min(draw, draws - 1), draws)
            for draw in range(passes)
        ]
        new = run_micro_batches(model, batches, config, groups, device, forward_only=True)
        reports += new
        if new:
            moments += _moments(new, groups)
    for chunk in model:
        chunk.train()
    sums = reduced_sums(reports, groups, device)
    torch.distributed.all_reduce(moments, group=groups.dp)
    if groups.pp.size() > 1:
        last = torch.distributed.get_process_group_ranks(groups.pp)[-1]
        torch.distributed.broadcast(moments, src=last, group=groups.pp)
    count, total, squares = moments.tolist()
    variance = max(squares / count - (total / count) ** 2, 0.0) * count / max(count - 1, 1)
    elbo = (sums.elbo / sums.count).item()
    return ValidationResult(elbo, math.sqrt(variance / count), sums, int(count))


def _moments(reports: list[dict], groups: ProcessGroupCollection) -> torch.Tensor:
    """(sequences, sum, sum of squares) of the per-token bound of this rank's sequences."""
    elbo = torch.stack([report["elbo_by_sequence"] for report in reports]).sum(0)
    count = torch.stack([report["count_by_sequence"] for report in reports]).sum(0).double()
    both = torch.stack([elbo, count])
    if groups.cp.size() > 1:
        torch.distributed.all_reduce(both, group=groups.cp)
    present = both[1] > 0
    mean = both[0][present] / both[1][present]
    return torch.stack([present.sum().double(), mean.sum(), mean.square().sum()])
