"""The GIDD loss as the paper writes it: dense over the vocabulary, differentiated by autograd.

This is the definition that every other implementation is tested against (arXiv 2512.10858,
equation of the loss; weights in `MixingSchedule`):

    q = alpha onehot(x0) + beta pi        p = alpha softmax(logits) + beta pi
    KL = sum_j q_j (log q_j - log p_j)    IS = q_z / p_z - log(q_z / p_z) - 1,  z = xt
    loss = w (KL + beta_is IS)            elbo = w_elbo (KL + IS)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.diffusion.schedule import MixingSchedule

MASK_LOGIT = -1e6
RATIO_EPSILON = 1e-12


class GiddLoss(NamedTuple):
    """Per-token values in nats, float32 (float64 for float64 inputs), the shape of `xt`."""

    loss: Tensor
    """Training loss; the only differentiable part."""
    elbo: Tensor
    """The token's share of the bound on the negative log-likelihood."""
    kl: Tensor
    """Loss weight times KL."""
    is_div: Tensor
    """Loss weight times Itakura-Saito divergence, without beta_is."""


def _floored_log(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny).log()


def dense_gidd_loss(
    logits: Tensor,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    *,
    beta_is: float = 1.0,
) -> GiddLoss:
    """Losses of `logits` [..., v] (true vocabulary) at `xt`, `x0` int64 and `log_snr` [...]."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    logits, log_snr = logits.to(exact), log_snr.to(exact)
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == schedule.mask_token_id
    denoised = torch.softmax(logits.masked_fill(is_mask, MASK_LOGIT), dim=-1)
    clean = torch.nn.functional.one_hot(x0, schedule.vocab_size).to(exact)
    p, q = schedule.marginal(log_snr, denoised), schedule.marginal(log_snr, clean)
    log_p, log_q = _floored_log(p), _floored_log(q)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    p_z, q_z, log_p_z, log_q_z = (
        x.gather(-1, xt.unsqueeze(-1)).squeeze(-1) for x in (p, q, log_p, log_q)
    )
    is_div = q_z / (p_z + RATIO_EPSILON) - (log_q_z - log_p_z) - 1
    weight = schedule.loss_weight(log_snr, xt, x0)
    elbo = schedule.elbo_weight(log_snr, xt, x0) * (kl + is_div)
    loss = weight * (kl + beta_is * is_div)
    return GiddLoss(loss, elbo.detach(), (weight * kl).detach(), (weight * is_div).detach())
