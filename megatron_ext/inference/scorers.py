"""What a likelihood asks of a model, and how the two models answer.

    xt, x0      [b, s] int64      noised and clean ids; the loss reads columns `scored` alone
    log_snr     [b, s] float32    noise level that the loss assumes
    visibility  [b, 2, s] int32   level and document of every position (`diffusion.visibility`)
    elbo        [b, k] float32    nats per token of the k scored columns

The loss is `kernels.gidd_loss` fused with the output head, which works through the positions in
chunks: logits of a batch never exist as a whole, at any vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.diffusion.visibility import attention_mask_from_visibility
from megatron_ext.hf.generation_gidd import CachedDenoiser
from megatron_ext.inference.denoiser import TrainingDenoiser, run_stages
from megatron_ext.inference.load import LoadedModel
from megatron_ext.kernels.gidd_loss import linear_gidd_loss
from megatron_ext.model.diffusion_model import DiffusionModel, Targets


class Scorer(Protocol):
    """A model as the estimators of `likelihood` see it.

    The ranks of a model-parallel group call `elbo` together with equal arguments and get equal
    results; `replicas` are the ranks that hold copies of the model and share the sequences.
    """

    schedule: MixingSchedule
    context: int
    """Positions of the model."""
    device: torch.device
    replicas: torch.distributed.ProcessGroup | None

    def elbo(
        self, xt: Tensor, x0: Tensor, log_snr: Tensor, visibility: Tensor, scored: slice
    ) -> Tensor: ...


class HuggingFaceScorer:
    """A `GiddForDiffusionLM` in evaluation mode; every rank has a copy."""

    def __init__(self, model: Any, schedule: MixingSchedule) -> None:
        self.model, self.schedule = model, schedule
        self.context = model.config.max_position_embeddings
        self.device = model.device
        is_distributed = torch.distributed.is_initialized()
        self.replicas = torch.distributed.group.WORLD if is_distributed else None

    def elbo(
        self, xt: Tensor, x0: Tensor, log_snr: Tensor, visibility: Tensor, scored: slice
    ) -> Tensor:
        mask = attention_mask_from_visibility(visibility)
        hidden = self.model.model(xt, mask).last_hidden_state[:, scored]
        xt, x0, log_snr = (x[:, scored] for x in (xt, x0, log_snr))
        losses = linear_gidd_loss(
            hidden.flatten(0, 1), self.model.lm_head.weight, xt.reshape(-1), x0.reshape(-1),
            log_snr.reshape(-1), self.schedule, logit_scale=self.model.config.head_scaling,
        )  # fmt: skip
        return losses.elbo.view(xt.shape)


class TrainingScorer:
    """A `DiffusionModel` in evaluation mode at any tp and pp; cp 1, one chunk per stage."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model, self.schedule = model, model.schedule
        self.context = model.settings.model.seq_length
        self.device = next(model.parameters()).device
        self.replicas = model.groups.dp

    def elbo(
        self, xt: Tensor, x0: Tensor, log_snr: Tensor, visibility: Tensor, scored: slice
    ) -> Tensor:
        targets = Targets(*(x[:, scored] for x in (x0, xt, log_snr)))

        def forward(stage: DiffusionModel) -> Tensor:
            hidden = stage.hidden_states(xt, visibility)
            return (
                stage.output_layer(hidden[scored], targets).elbo if stage.post_process else hidden
            )

        return run_stages(self.model, xt, forward, tuple(targets.x0.shape))


def scorer_of(loaded: LoadedModel) -> Scorer:
    """The scorer of an opened checkpoint or folder."""
    match loaded.denoiser:
        case TrainingDenoiser(model=model):
            return TrainingScorer(model)
        case CachedDenoiser(model=model):
            return HuggingFaceScorer(model, loaded.schedule)
    raise AssertionError(f"no scorer for {type(loaded.denoiser).__name__}")
