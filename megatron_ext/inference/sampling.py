"""Ancestral sampling: the reverse process from pure noise to text (paper section 3).

    ids         [b, s] int64  the canvas: a clean prompt in front, noise behind it
    visibility  [b, 2, s]     as in training: prompt positions see the prompt, the rest everything
    logits      [b, s, v]     float, from the denoiser; the mask token never counts

A step from log-SNR t to the higher s draws every position that is not prompt from the posterior
p(z_s | z_t) with the denoiser's prediction for the clean token. All randomness is a function of
(seed, sequence, step), so a sequence does not depend on the batch it is drawn in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_ext.diffusion.random import Purpose, generator
from megatron_ext.diffusion.schedule import MixingSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(ids [b, s], visibility [b, 2, s]) -> logits [b, s, v]."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to sample."""

    steps: int = 128
    """Steps from noise to text; the model runs once per step."""
    temperature: float = 1.0
    """Logits are divided by it."""
    top_p: float | None = None
    """Keep the likeliest tokens that together have this probability; absent keeps all."""
    top_k: int | None = None
    """Keep the likeliest k tokens; absent keeps all."""
    grid: Literal["cosine", "linear"] = "cosine"
    """Spacing of the noise levels in time."""
    seed: int = 0
    """Keys all draws."""

    def __post_init__(self) -> None:
        for name in ("steps", "temperature", "top_p", "top_k"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {value!r}: give a number above zero.")


def log_snr_grid(schedule: MixingSchedule, steps: int, grid: str) -> Tensor:
    """Noise levels [steps + 1] float64 from `max_log_snr` (index 0) down to `min_log_snr`."""
    time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    clean = 1 - time if grid == "linear" else 0.5 + 0.5 * torch.cos(torch.pi * time)
    low, high = (
        torch.sigmoid(torch.tensor(bound, dtype=torch.float64))
        for bound in (schedule.min_log_snr, schedule.max_log_snr)
    )
    alpha = (high - low) * clean + low
    return torch.logit(alpha).clamp(schedule.min_log_snr, schedule.max_log_snr)


def filtered_probs(logits: Tensor, config: SamplingConfig, mask_token_id: int) -> Tensor:
    """The denoiser's distribution [..., v] after temperature, top-k and top-p; no mask token."""
    logits = logits.float() / config.temperature
    logits[..., mask_token_id] = -torch.inf
    if config.top_k is not None:
        least = logits.topk(min(config.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if config.top_p is not None:
        ranked, order = probs.sort(descending=True)
        beyond = ranked.cumsum(-1) - ranked >= config.top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Ids [...] by inverting the cumulative distribution of `probs` [..., v] at `uniform` [...]."""
    cumulative = probs.double().cumsum(-1)
    target = uniform.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_max(
        probs.shape[-1] - 1
    )  # fmt: skip


def prior(schedule: MixingSchedule, length: int, seed: int, sequence: int) -> np.ndarray:
    """Pure noise [length] int64: the mixing distribution at the lowest log-SNR."""
    numbers = generator(seed, sequence, Purpose.SAMPLING)
    share = schedule.uniform_share(torch.tensor(schedule.min_log_snr, dtype=torch.float64)).item()
    is_uniform = numbers.random(length) < share
    ids = numbers.integers(0, schedule.vocab_size - 1, length)
    ids += ids >= schedule.mask_token_id
    return np.where(is_uniform, ids, schedule.mask_token_id)


@torch.no_grad()
def sample_ancestral(
    denoiser: Denoiser,
    schedule: MixingSchedule,
    prompts: Sequence[Sequence[int]],
    length: int,
    config: SamplingConfig,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Continue each prompt (possibly empty) to `length` tokens in all; int64 [b, length].

    Raises `ValueError` for a prompt that leaves no room.
    """
    for prompt in prompts:
        if len(prompt) >= length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens: it must be shorter than the sequence "
                f"({length})."
            )
    ids = torch.stack(
        [
            torch.from_numpy(prior(schedule, length, config.seed, number))
            for number in range(len(prompts))
        ]
    )
    is_free = torch.ones_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        is_free[row, : len(prompt)] = False
    visibility = torch.stack([is_free.int(), torch.zeros_like(ids, dtype=torch.int32)], dim=1)
    levels = log_snr_grid(schedule, config.steps, config.grid).float()
    logits = None
    for step in progress(range(config.steps, 0, -1)):
        if logits is None:
            logits = denoiser(ids, visibility)
        probs = filtered_probs(logits, config, schedule.mask_token_id)
        posterior = schedule.posterior(
            probs, ids, levels[step].expand(ids.shape), levels[step - 1].expand(ids.shape)
        )
        uniform = np.stack(
            [
                generator(config.seed, number, Purpose.SAMPLING, draw=step).random(length)
                for number in range(len(prompts))
            ]
        )
        new = torch.where(is_free, draw(posterior, torch.from_numpy(uniform)), ids)
        if not torch.equal(new, ids):
            ids, logits = new, None
    return ids


def until_end(ids: Sequence[int], prompt_length: int, eos_token_id: int | None) -> list[int]:
    """The new tokens of a sequence up to, not including, the first end of document."""
    new = list(ids[prompt_length:])
    return new[: new.index(eos_token_id)] if eos_token_id in new else new
