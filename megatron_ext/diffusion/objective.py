"""The training objective as its definition reads: the dense reference, plain torch and autograd.

    logits      [..., v']  any float dtype, v' >= v; columns from v on are padding
    xt, x0      [...]      int64, noised and clean token ids; same shape
    log_snr     [...]      float, noise level per token

With p = softmax(logits without the mask token), phat = alpha p + beta pi and
q = alpha onehot(x0) + beta pi, per token

    KL = sum_j q_j (log q_j - log phat_j)
    IS = q_z / phat_z - log(q_z / phat_z) - 1           z = xt
    loss = w (KL + beta_is IS),   elbo = w_e (KL + IS)

(arXiv 2512.10858, the bound of section 3 with p(lambda) := 1 in the weight of the loss). It holds
about ten [..., v] tensors at once. `kernels.gidd_loss` computes the same without them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.diffusion.schedule import MixingSchedule

IS_EPSILON = 1e-12
"""Added to the denominator of q_z / phat_z."""

_MASK_LOGIT = -1e6


class GiddLoss(NamedTuple):
    """Per-token values, float32 (float64 for float64 inputs). Only `loss` carries a gradient."""

    loss: Tensor
    """w (KL + beta_is IS), what is trained."""
    elbo: Tensor
    """w_e (KL + IS): nats; its mean over noise levels bounds the negative log-likelihood."""
    kl: Tensor
    """w KL."""
    is_div: Tensor
    """w IS, without the factor beta_is."""


def work_dtype(values: Tensor) -> torch.dtype:
    """float64 for float64 `values`, float32 for every other dtype."""
    return torch.promote_types(values.dtype, torch.float32)


def dense_gidd_loss(
    logits: Tensor,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    beta_is: float = 1.0,
) -> GiddLoss:
    """Loss per token; differentiable in `logits` through `loss`."""
    dtype = work_dtype(logits)
    log_snr = log_snr.to(dtype)
    logits = logits[..., : schedule.vocab_size].to(dtype)
    is_mask = torch.arange(schedule.vocab_size, device=logits.device) == schedule.mask_token_id
    logits = logits.masked_fill(is_mask, _MASK_LOGIT)
    # torch.softmax adds up a row one by one, which costs its float32 gradient 3e-5 at 131,072
    # tokens; logsumexp adds pairwise.
    probs = torch.exp(logits - logits.logsumexp(-1, keepdim=True))

    clean = torch.zeros_like(probs).scatter_(-1, x0.unsqueeze(-1), 1.0)
    q, phat = schedule.marginal(log_snr, clean), schedule.marginal(log_snr, probs)
    log_q, log_phat = _floored_log(q), _floored_log(phat)
    kl = (log_q.exp() * (log_q - log_phat)).sum(-1)
    q_z, phat_z, log_q_z, log_phat_z = (
        x.gather(-1, xt.unsqueeze(-1)).squeeze(-1) for x in (q, phat, log_q, log_phat)
    )
    is_div = q_z / (phat_z + IS_EPSILON) - (log_q_z - log_phat_z) - 1

    weight = schedule.loss_weight(log_snr, xt, x0)
    elbo_weight = schedule.elbo_weight(log_snr, xt, x0)
    loss = weight * (kl + beta_is * is_div)
    kl, is_div = kl.detach(), is_div.detach()
    return GiddLoss(loss, elbo_weight * (kl + is_div), weight * kl, weight * is_div)


def _floored_log(u: Tensor) -> Tensor:
    """log u, and the log of the smallest normal number (without gradient) where u <= 0."""
    positive = u > 0
    return torch.where(positive, u, torch.finfo(u.dtype).tiny).log()
