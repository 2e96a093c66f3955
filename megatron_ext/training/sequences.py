"""What a step did sequence by sequence: which samples, at which noise levels, with which losses.

For looking at a step after the fact (a spike, a non-finite loss, a replay): the loop itself needs
sums only. One all-gather of a few numbers per sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from megatron_ext.data.batches import MicroBatch

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


class SequenceReport(NamedTuple):
    """One sequence of a step; losses in nats per noised token."""

    sample: int
    """Global sample index, the key of its noise."""
    loss: float
    elbo: float
    noised: int
    """Tokens in the loss."""
    log_snr: tuple[float, float, float]
    """Lowest, mean and highest log-SNR of those."""

    def __str__(self) -> str:
        low, mean, high = self.log_snr
        return (
            f"sample {self.sample}: loss {self.loss:.4f}, {self.noised} noised tokens at log-SNR "
            f"{mean:.2f} ({low:.2f} to {high:.2f})"
        )

    @property
    def badness(self) -> float:
        """Order by loss; what is not finite comes first."""
        return self.loss if math.isfinite(self.loss) else math.inf


def sequence_reports(
    indices: Sequence[range],
    batches: Sequence[MicroBatch],
    reports: Sequence[dict[str, Any]],
    groups: ProcessGroupCollection,
) -> list[SequenceReport]:
    """Every sequence of the step's global batch, by sample index, on every rank. A collective.

    `indices`, `batches` and `reports` are of this rank's micro-batches in order; `reports` are
    empty on ranks without losses.
    """
    mine = []
    if reports and groups.tp.rank() == 0:
        for samples, batch, report in zip(indices, batches, reports, strict=True):
            for row, sample in enumerate(samples):
                levels = batch.log_snr[row][batch.loss_mask[row]].double()
                mine.append(
                    (
                        sample,
                        report["loss_by_sequence"][row].item(),
                        report["elbo_by_sequence"][row].item(),
                        len(levels),
                        levels.sum().item(),
                        levels.min().item() if len(levels) else math.inf,
                        levels.max().item() if len(levels) else -math.inf,
                    )
                )
    shares: list[list[tuple]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(shares, mine)
    pieces: dict[int, list[tuple]] = {}
    for share in shares:
        for sample, *piece in share:
            pieces.setdefault(sample, []).append(tuple(piece))
    return [_joined(sample, pieces[sample]) for sample in sorted(pieces)]


def _joined(sample: int, pieces: list[tuple]) -> SequenceReport:
    """A sequence from the pieces that context-parallel ranks have of it."""
    loss, elbo, noised, total, low, high = zip(*pieces, strict=True)
    count = sum(noised)
    mean = 1 / count if count else math.nan
    levels = (min(low), sum(total) * mean, max(high)) if count else (math.nan,) * 3
    return SequenceReport(sample, sum(loss) * mean, sum(elbo) * mean, count, levels)
