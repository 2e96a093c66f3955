"""One optimizer step: micro-batches through megatron-core's pipeline schedule, then the update.

Losses leave the model as per-token values and become sums and counts here. The gradient is the
sum over all noised tokens of the global batch, divided once by their global number (`token`) or
not at all (`sum`): megatron-core adds gradients over dp and cp and divides by the count it
gathered the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_ext.config import Config
from megatron_ext.data.batches import MicroBatch
from megatron_ext.kernels.gidd_loss import GiddLoss
from megatron_ext.model.diffusion_model import Targets
from megatron_ext.model.float8 import begin_step
from megatron_ext.parallel.cpu import enable_cpu

enable_cpu()

from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

NUM_BINS = 9
"""Equal bins of log-SNR in which the bound is reported."""


class LossSums(NamedTuple):
    """Sums over noised tokens, float64; addable over micro-batches and ranks."""

    loss: Tensor
    elbo: Tensor
    kl: Tensor
    is_div: Tensor
    count: Tensor
    elbo_by_bin: Tensor
    """[NUM_BINS]."""
    count_by_bin: Tensor
    """[NUM_BINS]."""

    @classmethod
    def zeros(cls, device: torch.device) -> LossSums:
        return cls.unpack(torch.zeros(5 + 2 * NUM_BINS, dtype=torch.float64, device=device))

    @classmethod
    def unpack(cls, flat: Tensor) -> LossSums:
        return cls(*flat[:5], flat[5 : 5 + NUM_BINS], flat[5 + NUM_BINS :])

    def pack(self) -> Tensor:
        return torch.cat([torch.stack(self[:5]), *self[5:]])


def sum_losses(losses: GiddLoss, batch: MicroBatch, config: Config) -> LossSums:
    """Per-token losses [b, s/cp] into sums over the positions in the loss."""
    mask = batch.loss_mask
    weight = mask.double()
    low, high = config.diffusion.min_log_snr, config.diffusion.max_log_snr
    bins = ((batch.log_snr - low) / (high - low) * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
    elbo = torch.where(mask, losses.elbo.double(), 0.0)

    def by_bin(values: Tensor) -> Tensor:
        empty = torch.zeros(NUM_BINS, dtype=torch.float64, device=values.device)
        return empty.scatter_add_(0, bins.reshape(-1), values.reshape(-1))

    return LossSums(
        *(
            torch.where(mask, x.detach().double(), 0.0).sum()
            for x in (losses.loss, losses.elbo, losses.kl, losses.is_div)
        ),
        weight.sum(),
        by_bin(elbo),
        by_bin(weight),
    )


def _loss_function(
    batch: MicroBatch, config: Config, losses: GiddLoss
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(loss to differentiate, tokens in it, what the loop wants to know), as the schedule asks."""
    loss = torch.where(batch.loss_mask, losses.loss, 0.0).sum()
    report = {
        "sums": sum_losses(losses, batch, config),
        "loss_by_sequence": torch.where(batch.loss_mask, losses.loss.detach().double(), 0.0).sum(1),
        "elbo_by_sequence": torch.where(batch.loss_mask, losses.elbo.double(), 0.0).sum(1),
        "count_by_sequence": batch.loss_mask.sum(1),
    }
    return loss, batch.loss_mask.sum().int(), report


def forward_step(
    iterator: Iterator[MicroBatch], model: torch.nn.Module, *, config: Config, device: torch.device
) -> tuple[Any, Any]:
    """megatron-core's contract: the stage's output and the function that turns it into a loss."""
    batch = next(iterator).to(device)
    targets = Targets(batch.x0, batch.input_ids, batch.log_snr, batch.projected)
    return model(batch.input_ids, batch.visibility, targets), partial(_loss_function, batch, config)


def run_micro_batches(
    model: list[torch.nn.Module],
    batches: list[MicroBatch],
    config: Config,
    groups: ProcessGroupCollection,
    device: torch.device,
    *,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """All micro-batches forward (and backward); reports of each on the last stage, else []."""
    del groups
    if not forward_only:
        begin_step(model)
    iterators = [iter(batches) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, config=config, device=device),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(batches),
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )


def reduced_sums(
    reports: list[dict[str, Any]], groups: ProcessGroupCollection, device: torch.device
) -> LossSums:
    """Global sums on every rank: added over micro-batches, dp and cp, sent down the pipeline."""
    total = LossSums.zeros(device).pack()
    for report in reports:
        total += report["sums"].pack()
    torch.distributed.all_reduce(total, group=groups.dp_cp)
    if groups.pp.size() > 1:
        last = torch.distributed.get_process_group_ranks(groups.pp)[-1]
        torch.distributed.broadcast(total, src=last, group=groups.pp)
    return LossSums.unpack(total)


def gradient_finalizer(normalization: str) -> Any:
    """megatron-core's gradient reduction, divided by the token count (`token`) or not (`sum`)."""

    def finalize(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        with record_function("reduce gradients"):
            finalize_model_grads(model, num_tokens if normalization == "token" else None, **kwargs)

    return finalize


def is_finite(sums: LossSums) -> bool:
    return math.isfinite(sums.loss.item())
