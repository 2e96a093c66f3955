"""The training model as the sampler's `Denoiser`, at any tensor and pipeline parallel layout.

All ranks call together with the same canvas and receive the same logits, so they draw the same
tokens. The clean prefix runs again in every step: this model keeps no keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ext.model.diffusion_model import DiffusionModel
from megatron_ext.parallel.cpu import enable_cpu

enable_cpu()

from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402


def run_stages(
    model: DiffusionModel,
    ids: Tensor,
    forward: Callable[[DiffusionModel], Tensor],
    shape: tuple[int, ...],
) -> Tensor:
    """What `forward` returns on the last pipeline stage, float32 of `shape`, on every rank.

    `forward` runs one stage on `ids` [b, s], which like all it closes over is the same on the
    model-parallel ranks; they call this together.
    """
    pp = model.groups.pp
    if pp.size() == 1:
        return forward(model)
    found: list[Tensor] = []

    def keep(output: Tensor) -> tuple[Tensor, Tensor, dict]:
        found.append(output)
        return output.sum(), torch.ones((), dtype=torch.int, device=ids.device), {}

    def step(iterator: Any, stage: DiffusionModel) -> tuple[Tensor, Any]:
        del iterator
        return forward(stage), keep

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(()),
        model=model,
        num_microbatches=1,
        seq_length=ids.shape[1],
        micro_batch_size=len(ids),
        forward_only=True,
    )
    output = found[0].contiguous() if found else torch.empty(shape, device=ids.device)
    last = torch.distributed.get_process_group_ranks(pp)[-1]
    torch.distributed.broadcast(output, src=last, group=pp)
    return output


def model_logits(
    model: DiffusionModel, ids: Tensor, visibility: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Logits [b, s, v] float32 on every rank; collective over the model-parallel ranks.

    `ids` [b, s], `visibility` [b, 2, s] and `positions` [b, s] are the same on all of them.
    """
    shape = (*ids.shape, model.schedule.vocab_size)
    return run_stages(model, ids, lambda stage: stage(ids, visibility, None, positions), shape)


class TrainingDenoiser:
    """A `DiffusionModel` in evaluation mode, cp 1, one chunk per pipeline rank."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.prefix: tuple[Tensor, Tensor] | None = None

    def begin_block(self, ids: Tensor, positions: Tensor, is_token: Tensor | None) -> None:
        del is_token
        self.prefix = (ids.clone(), positions)

    def logits(
        self, ids: Tensor, positions: Tensor, is_token: Tensor | None, num_active: int
    ) -> Tensor:
        assert self.prefix is not None, "begin_block comes first"
        first = self.prefix[0].shape[1]
        ids, positions = (
            torch.cat(pair, dim=1) for pair in zip(self.prefix, (ids, positions), strict=True)
        )
        level = torch.arange(ids.shape[1], device=ids.device) >= first
        level = level.int().expand(len(ids), -1)
        # Padding is a document of its own, which nothing else attends to.
        document = torch.zeros_like(level) if is_token is None else (~is_token).int()
        visibility = torch.stack([level, document], dim=1)
        logits = model_logits(self.model, ids, visibility, positions)
        return logits[:, first : first + num_active]
