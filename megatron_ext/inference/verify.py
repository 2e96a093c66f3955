"""A training checkpoint and a Hugging Face folder compared: logits, losses, generated tokens.

Both compute in float32 (weights in bfloat16 are exact in it), one model in memory at a time, on the
same noised tokens and masks. The training side is the model with its fused loss, the Hugging Face
side the exported code with the dense reference loss on its logits. Multipliers, noise and special
ids are each side's own, so a wrong field of config.json shows as much as a wrong weight.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ext.checkpoint.export_hf import OpenedRun, open_run
from megatron_ext.checkpoint.training import load_checkpoint
from megatron_ext.config import Config, NoiseConfig, ParallelConfig, require
from megatron_ext.diffusion.noising import noise_for_validation, noise_sequence
from megatron_ext.diffusion.random import Purpose, generator
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.diffusion.visibility import attention_mask_from_visibility
from megatron_ext.hf.generation_gidd import CachedDenoiser
from megatron_ext.hf.sampling_gidd import Denoiser, sample
from megatron_ext.hf.steps_gidd import SamplingConfig
from megatron_ext.inference.denoiser import TrainingDenoiser
from megatron_ext.kernels.gidd_loss import GiddLoss, gidd_loss
from megatron_ext.model.diffusion_model import DiffusionModel, Targets
from megatron_ext.parallel.groups import device_of_rank, initialize_parallel, shutdown_parallel

TOLERANCE = 1e-4
"""Allowed difference relative to the largest value (at least 1)."""


class Check(NamedTuple):
    """One comparison."""

    name: str
    difference: float
    """Largest absolute difference; for tokens their number."""
    allowed: float
    scale: float
    """Largest value; for tokens their number."""

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed


class Batch(NamedTuple):
    """Noised sequences, one row without and one with a clean prompt."""

    ids: Tensor
    """[b, s] int64, noised."""
    targets: Targets
    visibility: Tensor
    """[b, 2, s] int32."""
    in_loss: Tensor
    """[b, s] bool."""


class Outcome(NamedTuple):
    """What one side computed, on the CPU."""

    logits: Tensor
    """[b, s, v] float32, the mask token's at zero."""
    losses: GiddLoss
    generated: Tensor


def build_batch(
    schedule: MixingSchedule, seq_length: int, seed: int, device: torch.device
) -> Batch:
    """Random tokens under the schedule's noise, as in validation and with a prompt."""
    draws = generator(seed, 0, Purpose.MOCK_DATA).integers(
        0, schedule.vocab_size - 1, (2, seq_length)
    )
    tokens = draws + (draws >= schedule.mask_token_id)
    prompted = NoiseConfig(p_prompt=1.0, max_empty_fraction=0.0)
    rows = [
        noise_for_validation(tokens[0], schedule, seed=seed, index=0, draw=0, num_draws=1),
        noise_sequence(tokens[1], schedule, prompted, seed=seed, index=1),
    ]
    x0, xt, log_snr, in_loss, visibility = (
        torch.from_numpy(np.stack(column)).to(device) for column in zip(*rows, strict=True)
    )
    return Batch(xt, Targets(x0, xt, log_snr), visibility, in_loss)


def _generate(
    denoiser: Denoiser, schedule: MixingSchedule, batch: Batch, context: int, new_tokens: int
) -> Tensor:
    """Greedy continuations of two prompts of different lengths."""
    config = SamplingConfig(
        method="adaptive", temperature=0.0, max_length=new_tokens, steps=new_tokens,
        block_length=max(new_tokens // 2, 1), mode="window",
    )  # fmt: skip
    longest = min(8, context - new_tokens)
    prompts = [row[: longest - i].tolist() for i, row in enumerate(batch.targets.x0)]
    return sample(denoiser, schedule, prompts, context, config, device=batch.ids.device).cpu()


def _without_mask(schedule: MixingSchedule, logits: Tensor) -> Tensor:
    """Logits without the mask token's, which mean nothing."""
    logits = logits.float().clone()
    logits[..., schedule.mask_token_id] = 0.0
    return logits.cpu()


def _schedule(run: OpenedRun) -> MixingSchedule:
    diffusion = run.config.diffusion
    return MixingSchedule(
        run.vocab_size, run.mask_token_id, diffusion.shift, diffusion.mixing_scale,
        diffusion.min_log_snr, diffusion.max_log_snr,
    )  # fmt: skip


def _run_training_side(run: OpenedRun, batch: Batch, new_tokens: int) -> Outcome:
    config, schedule = (
        Config(model=run.config.model, diffusion=run.config.diffusion),
        _schedule(run),
    )
    groups = initialize_parallel(ParallelConfig())
    model = DiffusionModel(config, run.vocab_size, schedule, groups).to(device_of_rank()).eval()
    load_checkpoint(run.folder, [model], None)
    logits = model(batch.ids, batch.visibility)
    losses = model(batch.ids, batch.visibility, batch.targets)
    context = config.model.seq_length
    generated = _generate(TrainingDenoiser(model), schedule, batch, context, new_tokens)
    at_noise = GiddLoss(*(x[batch.in_loss].cpu() for x in losses))
    return Outcome(_without_mask(schedule, logits), at_noise, generated)


def _run_hugging_face_side(folder: Path, run: OpenedRun, batch: Batch, new_tokens: int) -> Outcome:
    from megatron_ext.hf import GiddForDiffusionLM

    model = GiddForDiffusionLM.from_pretrained(folder).float().to(device_of_rank()).eval()
    require(
        model.config.vocab_size == run.vocab_size, "hf", str(folder),
        f"its vocabulary has {model.config.vocab_size} ids, the run's {run.vocab_size}.",
    )  # fmt: skip
    schedule = model.mixing_schedule()
    mask = attention_mask_from_visibility(batch.visibility, causal=False, causal_prompt=False)
    logits = model(batch.ids, mask).logits
    losses = gidd_loss(
        logits, batch.ids, batch.targets.x0, batch.targets.log_snr, schedule, impl="reference"
    )
    context = model.config.max_position_embeddings
    generated = _generate(CachedDenoiser(model), schedule, batch, context, new_tokens)
    at_noise = GiddLoss(*(x[batch.in_loss].cpu() for x in losses))
    return Outcome(_without_mask(schedule, logits), at_noise, generated)


def _difference(name: str, mine: Tensor, theirs: Tensor) -> Check:
    if mine.shape != theirs.shape:
        return Check(name, float("inf"), 0.0, float(mine.numel()))
    scale = mine.abs().amax().item()
    return Check(name, (mine - theirs).abs().amax().item(), TOLERANCE * max(scale, 1.0), scale)


@torch.no_grad()
def verify_conversion(
    load: Path, folder: Path, *, step: int | None, seq_length: int, new_tokens: int, seed: int
) -> list[Check]:
    """Compare a run's checkpoint with a folder; `ValueError` where either cannot be read."""
    require((folder / "config.json").is_file(), "hf", str(folder), "it has no config.json.")
    run = open_run(load, step)
    context = run.config.model.seq_length
    require(seq_length >= 1, "seq_length", seq_length, "give a number above zero.")
    require(
        1 <= new_tokens <= context - 2, "new_tokens", new_tokens,
        f"give 1 to {context - 2}; the context has {context} positions.",
    )  # fmt: skip
    batch = build_batch(_schedule(run), min(seq_length, context), seed, device_of_rank())
    try:
        mine = _run_training_side(run, batch, new_tokens)
    finally:
        shutdown_parallel()
    gc.collect()
    theirs = _run_hugging_face_side(folder, run, batch, new_tokens)
    same_shape = mine.generated.shape == theirs.generated.shape
    differing = (mine.generated != theirs.generated).sum().item() if same_shape else float("inf")
    return [
        _difference("logits", mine.logits, theirs.logits),
        _difference("loss per token", mine.losses.loss, theirs.losses.loss),
        _difference("bound per token", mine.losses.elbo, theirs.losses.elbo),
        Check("generated tokens", differing, 0.0, float(mine.generated.numel())),
    ]


def report(checks: list[Check]) -> str:
    """A table of the comparisons."""
    lines = [f"{'':18}{'largest':>12}{'difference':>12}{'allowed':>12}"]
    for check in checks:
        verdict = "agrees" if check.agrees else "DIFFERS"
        lines.append(
            f"{check.name:18}{check.scale:12.6g}{check.difference:12.3g}{check.allowed:12.3g}"
            f"  {verdict}"
        )
    return "\n".join(lines)
