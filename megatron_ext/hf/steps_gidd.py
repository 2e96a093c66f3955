"""Single steps of sampling: settings, noise levels, draws, ancestral and adaptive updates.

    ids     [n] or [b, k] int64  tokens that may change
    logits  [..., v]             the denoiser's, minus infinity where a token must not come
    uniform [..., 3] float64     one row per token, from `uniforms`

This file needs torch and numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .random_gidd import Purpose, generator
from .schedule_gidd import MixingSchedule


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to sample."""

    method: Literal["ancestral", "adaptive"] = "ancestral"
    """The reverse process, or replacing the tokens the model is surest are wrong."""
    max_length: int = 2048
    """New tokens at most; the end of the context limits them too."""
    min_length: int = 0
    """No end of document among the first so many new tokens."""
    block_length: int = 128
    """Positions denoised together."""
    steps: int = 128
    """Steps per block."""
    tokens_per_step: int = 1
    """Tokens replaced per adaptive step."""
    correction_steps: int = 0
    """Adaptive steps after a block's last one, which revise its tokens (not for masked noise)."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float | None = None
    """Keep the likeliest tokens that together reach this probability; absent keeps all."""
    top_k: int | None = None
    """Keep the likeliest k tokens; absent keeps all."""
    grid: str | Callable[[float], float] = "cosine"
    """Noise levels: cosine, linear, or a function from time in [0, 1] to the clean share."""
    mode: Literal["canvas", "window"] = "canvas"
    """Where the noise behind the active block ends: with the context, or `look_ahead` later."""
    look_ahead: int = 0
    """Positions behind the active block in mode `window`."""
    seed: int = 0
    """Keys all draws, together with the number of the sequence."""

    def __post_init__(self) -> None:
        for name in ("max_length", "block_length", "steps", "tokens_per_step", "top_k", "top_p"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value!r}: give a number above zero.")
        for name in ("min_length", "correction_steps", "temperature", "look_ahead"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} is {value!r}: give zero or more.")
        choices = {
            "method": ("ancestral", "adaptive"),
            "mode": ("canvas", "window"),
            "grid": ("cosine", "linear"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known and not callable(value):
                raise ValueError(f"{name} is {value!r}: choose {' or '.join(known)}.")


def log_snr_grid(
    schedule: MixingSchedule, steps: int, grid: str | Callable[[float], float]
) -> list[float]:
    """Noise levels, `steps + 1` of them, from `max_log_snr` (index 0) down to `min_log_snr`.

    In float32 like the published sampler's, whose rounding shows near the clean end.
    """
    low, high = (
        torch.tensor(bound).sigmoid() for bound in (schedule.min_log_snr, schedule.max_log_snr)
    )
    time = torch.linspace(0, 1, steps + 1)
    if callable(grid):
        clean = torch.tensor([float(grid(t)) for t in time.tolist()])
    else:
        clean = 1 - time if grid == "linear" else 0.5 + 0.5 * torch.cos(torch.pi * time)
    alpha = (high - low) * clean + low
    level = torch.log(alpha / (1 - alpha))
    return level.clamp(schedule.min_log_snr, schedule.max_log_snr).tolist()


def uniforms(seed: int, row: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1) float64 that depend on the arguments alone."""
    return torch.from_numpy(generator(seed, row, Purpose.SAMPLING, draw).random(shape))


def filtered_probs(logits: Tensor, config: SamplingConfig) -> Tensor:
    """The denoiser's distribution [..., v] in float32 after temperature, top-k and top-p."""
    logits = logits.float()
    if config.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if config.temperature != 1:
        logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if config.top_p is not None:
        ranked, order = probs.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked > config.top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Ids [n] by inverting the cumulative distribution of `probs` [n, v] at `uniform` [n]."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = uniform.to(probs.device).unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def ancestral_step(
    logits: Tensor,
    ids: Tensor,
    schedule: MixingSchedule,
    levels: tuple[float, float],
    uniform: Tensor,
    config: SamplingConfig,
) -> Tensor:
    """Ids [n] at the higher log-SNR `levels[1]` from those at `levels[0]`, by the posterior.

    The posterior q_s(z_s) (jump + a [z_s = z_t]) / q_t(z_t), with a = alpha_t / alpha_s and jump
    the noise that t has beyond s at z_t, is a mixture: z_t stays with weight a q_s(z_t), else z_s
    is drawn from q_s = alpha_s xhat + beta_s pi_s. So only tokens that do jump, and to the
    prediction xhat, cost a draw over the vocabulary, and a token that cannot jump not even a
    softmax. `uniform` [n, 3]. A token that the denoiser rules out while the noise cannot have made
    it stays as it is; a mask token that the noise cannot have made is drawn anew.
    """
    now, after = (torch.full(ids.shape, x, dtype=torch.float64, device=ids.device) for x in levels)
    alpha_t, alpha_s = schedule.alpha(now), schedule.alpha(after)
    noise_t = (1 - alpha_t) * schedule.pi_at(now, ids)
    noise_s = (1 - alpha_s) * schedule.pi_at(after, ids)
    jump = (noise_t - alpha_t / alpha_s * noise_s).clamp_min(0)
    is_stray = (ids == schedule.mask_token_id) & (noise_t == 0)
    jump, noise_t = (torch.where(is_stray, 1.0, x) for x in (jump, noise_t))
    (open_positions,) = torch.nonzero(jump > 0, as_tuple=True)
    new = ids.clone()
    if len(open_positions) == 0:
        return new
    probs = filtered_probs(logits[open_positions], config)
    at_z = probs.gather(-1, ids[open_positions].unsqueeze(-1)).squeeze(-1).double()
    total = alpha_t[open_positions] * at_z + noise_t[open_positions]
    u = uniform.to(ids.device)[open_positions]
    jumps = u[:, 0] * total < jump[open_positions]
    is_clean = u[:, 1] < alpha_s[open_positions]
    to_clean, to_noise = open_positions[jumps & is_clean], open_positions[jumps & ~is_clean]
    new[to_clean] = draw(probs[jumps & is_clean], u[:, 2][jumps & is_clean])
    noise = noise_from_uniform(schedule, levels[1], u[:, 2][jumps & ~is_clean])
    new[to_noise] = noise.to(ids.device)
    return new


def noise_from_uniform(schedule: MixingSchedule, log_snr: float, uniform: Tensor) -> Tensor:
    """Ids [n] from the mixing distribution at a noise level, one uniform each."""
    share = schedule.uniform_share(torch.tensor(log_snr, dtype=torch.float64)).item()
    ids = (uniform / max(share, 1e-300) * (schedule.vocab_size - 1)).clamp_max(
        schedule.vocab_size - 2
    )
    ids = ids.long()
    ids += ids >= schedule.mask_token_id
    return torch.where(uniform < share, ids, schedule.mask_token_id)


def confidence_gain(logits: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """(largest probability - probability of the present token) x weight, [...]."""
    lse = logits.float().logsumexp(-1)
    at_ids = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1).float()
    return ((logits.amax(-1).float() - lse).exp() - (at_ids - lse).exp()) * weight


def adaptive_step(
    logits: Tensor,
    ids: Tensor,
    schedule: MixingSchedule,
    log_snr: float,
    uniform: Tensor,
    config: SamplingConfig,
    is_fixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids [b, k] with the `tokens_per_step` positions of the largest gain replaced, and gains.

    A position's weight is the noise's probability of its token relative to the block, fixed
    positions left out. Where the noise cannot have made any token of a row, nothing is left to
    replace.
    """
    levels = torch.full(ids.shape, log_snr, dtype=torch.float64, device=ids.device)
    noise = schedule.pi_at(levels, ids)
    if is_fixed is not None:
        noise = noise.masked_fill(is_fixed, 0.0)
    total = noise.sum(-1, keepdim=True)
    weight = torch.where(total > 0, noise / total.clamp_min(1e-300), 0.0)
    gain = confidence_gain(logits, ids, weight.float())
    order = gain if is_fixed is None else gain.masked_fill(is_fixed, -torch.inf)
    # A stable sort and no topk: equal gains are frequent (0 for the likeliest token).
    chosen = order.sort(dim=-1, descending=True, stable=True).indices[:, : config.tokens_per_step]
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(-1)
    at_chosen = logits[rows, chosen].flatten(0, 1)
    if config.temperature == 0:
        replaced = at_chosen.argmax(-1)
    else:
        u = uniform[..., 2].to(ids.device).gather(-1, chosen)
        replaced = draw(filtered_probs(at_chosen, config), u.flatten())
    present = ids.gather(-1, chosen)
    replaced = torch.where(total > 0, replaced.view(chosen.shape), present)
    return ids.scatter(-1, chosen, replaced), gain
