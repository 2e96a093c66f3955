"""The GIDD loss of a few scalars per token and one sum over the vocabulary, and its gradient.

With m the mask, x = x0, z = xt, s the uniform share, alpha + beta = 1 and

    c = beta s / (V - 1)      r = alpha / c      p_j = softmax without the mask
    v_j = r p_j,  so the model's marginal is c (1 + v_j) for j != m
    tau_j = v_j / (1 + v_j) = sigmoid(log p_j + log r)

the sum over the vocabulary reduces to F = sum over j != m, x of v_j - log(1 + v_j) (values) and
T = sum over j != m of tau_j (gradient):

    KL = c F + (alpha + c) (-log(1 - u) - u),             u = alpha (1 - p_x) / (alpha + c)
    IS = d - log(1 + d),  d = alpha (1 - p_x) / p^_x      for z = x
       = log(1 + v_z) - v_z / (1 + v_z)                   for z != x, m
       = -eps / (q_m + eps)                               for z = m
    g_k = w [(A - b E) p_k - c tau_k - alpha tau_x [k = x] + b E [k = z]]
    A = alpha tau_x + c T,  E = tau_z (1 - q_z p^_z / (p^_z + eps)^2) for z != m, else 0

Every term is a sum of non-negative numbers, so nothing cancels at low SNR, where the textbook form
loses all digits. Masked diffusion is the limit c = 0: c F -> alpha (1 - p_x), c T -> 0, tau_x -> 1.
Where c is below every normal number it is taken for 0, as v would leave the range of the dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.diffusion.objective import IS_EPSILON, GiddLoss
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.kernels.vocab_parallel import VocabSlice


class Marginals(NamedTuple):
    """What the schedule says of each token, [n], before any logit is known."""

    alpha: Tensor
    beta: Tensor
    c: Tensor
    """Uniform noise per id."""
    log_r: Tensor
    """log(alpha / c); 0 where c = 0, where every use of it is multiplied by c."""
    q_mask: Tensor
    weight: Tensor
    elbo_weight: Tensor
    is_masked: Tensor
    is_kept: Tensor

    @classmethod
    def of(cls, xt: Tensor, x0: Tensor, log_snr: Tensor, schedule: MixingSchedule) -> Marginals:
        alpha = schedule.alpha(log_snr)
        beta = 1 - alpha
        share = schedule.uniform_share(log_snr)
        c = beta * share / (schedule.vocab_size - 1)
        c = torch.where(c > 4 * torch.finfo(c.dtype).tiny, c, 0.0)
        is_masked = xt == schedule.mask_token_id
        is_possible = is_masked | (c > 0)
        log_share = torch.nn.functional.logsigmoid(schedule.scale * log_snr + schedule.shift)
        log_r = alpha.log() - beta.log() - log_share + math.log(schedule.vocab_size - 1)
        return cls(
            alpha=alpha,
            beta=beta,
            c=c,
            log_r=torch.where(c > 0, log_r, 0.0),
            q_mask=beta * (1 - share),
            weight=torch.where(is_possible, schedule.loss_weight(log_snr, xt, x0), 0.0),
            elbo_weight=schedule.elbo_weight(log_snr, xt, x0),
            is_masked=is_masked,
            is_kept=xt == x0,
        )


class Gradient(NamedTuple):
    """All the backward pass needs per token, [n]; g_k is elementwise in the logits after this."""

    lse: Tensor
    log_r: Tensor
    weight_p: Tensor
    """w (A - b E), factor of p_k."""
    weight_tau: Tensor
    """w c, factor of -tau_k."""
    at_x0: Tensor
    """-w alpha tau_x, added at k = x0."""
    at_xt: Tensor
    """w b E, added at k = xt."""


def _minus_log1p(v: Tensor) -> Tensor:
    """v - log(1 + v) for v >= 0 without cancellation at small v."""
    limit = 2e-2 if v.dtype == torch.float32 else 1e-3
    series = v * v * (0.5 - v * (1 / 3 - v * (0.25 - v * 0.2)))
    return torch.where(v < limit, series, v - torch.log1p(v))


def _log_deficit(u: Tensor, log_rest: Tensor) -> Tensor:
    """-log(1 - u) - u for u in [0, 1), given log(1 - u), whose digits count near u = 1 only."""
    limit = 2e-2 if u.dtype == torch.float32 else 1e-3
    series = u * u * (0.5 + u * (1 / 3 + u * (0.25 + u * 0.2)))
    log_rest = torch.where(u < 0.5, torch.log1p(-u), log_rest)
    return torch.where(u < limit, series, -log_rest - u)


def closed_form(
    logits: Tensor,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    vocab: VocabSlice,
    beta_is: float,
) -> tuple[GiddLoss, Gradient]:
    """Losses and gradient scalars of a chunk.

    `logits` [n, v/tp] float32 or float64, masked by `vocab`; used as work space. `xt`, `x0`
    [n] int64, `log_snr` [n] of the logits' dtype.
    """
    t = Marginals.of(xt, x0, log_snr, schedule)
    lse, (logit_x, logit_z) = vocab.log_sum_exp_and_picked(logits, [x0, xt])
    sum_f, sum_tau = _vocabulary_sums(logits, lse, t.log_r, x0, vocab)
    log_p_x = logit_x - lse
    rest_x = -torch.expm1(log_p_x)
    tau_x = torch.where(t.c > 0, torch.sigmoid(log_p_x + t.log_r), 1.0)
    is_hybrid = t.c > 0

    q_x = t.alpha + t.c
    log_p_hat_x = torch.where(
        is_hybrid,
        torch.logaddexp(t.c.log(), t.alpha.log() + log_p_x),
        t.alpha.log() + log_p_x,
    )
    rest = torch.where(is_hybrid, t.c * sum_f, t.alpha * rest_x)
    kl = rest + q_x * _log_deficit(t.alpha * rest_x / q_x, log_p_hat_x - q_x.log())

    p_hat_x = log_p_hat_x.exp()
    log_p_z = logit_z - lse
    v_z = torch.exp(log_p_z + t.log_r)
    p_hat_z = torch.where(t.is_kept, p_hat_x, t.c * (1 + v_z))
    q_z = torch.where(t.is_kept, q_x, t.c)
    is_div = _is_divergence(t, q_x, p_hat_x, rest_x, v_z, q_z, p_hat_z)

    tau_z = torch.where(t.is_kept, tau_x, torch.sigmoid(log_p_z + t.log_r))
    e = tau_z * (1 - q_z * p_hat_z / (p_hat_z + IS_EPSILON).square())
    e = torch.where(t.is_masked, 0.0, beta_is * e)
    a = t.alpha * tau_x + t.c * (sum_tau + tau_x)
    weight = t.weight
    gradient = Gradient(
        lse, t.log_r, weight * (a - e), weight * t.c, -weight * t.alpha * tau_x, weight * e
    )
    # A zero weight marks transitions of probability zero, whose divergences are infinite.
    possible = weight > 0
    kl, is_div = (torch.where(possible, x, 0.0) for x in (kl, is_div))
    losses = GiddLoss(
        weight * (kl + beta_is * is_div),
        torch.where(possible, t.elbo_weight * (kl + is_div), 0.0),
        weight * kl,
        weight * is_div,
    )
    return losses, gradient


def _vocabulary_sums(
    logits: Tensor, lse: Tensor, log_r: Tensor, x0: Tensor, vocab: VocabSlice
) -> tuple[Tensor, Tensor]:
    """Sums over j != m, x of v - log(1 + v) and of tau, over all ranks; overwrites `logits`."""
    v = logits.add_((log_r - lse).unsqueeze(-1)).exp_()
    column, here = vocab.local(x0)
    value = torch.where(here, 0.0, v.gather(-1, column.unsqueeze(-1)).squeeze(-1))
    v.scatter_(-1, column.unsqueeze(-1), value.unsqueeze(-1))
    sum_f = _minus_log1p(v).sum(-1)
    sum_tau = (v / (1 + v)).sum(-1)
    both = vocab.sum_(torch.stack([sum_f, sum_tau]))
    return both[0], both[1]


def _is_divergence(
    t: Marginals,
    q_x: Tensor,
    p_hat_x: Tensor,
    rest_x: Tensor,
    v_z: Tensor,
    q_z: Tensor,
    p_hat_z: Tensor,
) -> Tensor:
    excess = t.alpha * rest_x / p_hat_x
    kept = _minus_log1p(excess)
    moved = _log_deficit(v_z / (1 + v_z), -torch.log1p(v_z))
    masked = -IS_EPSILON / (t.q_mask + IS_EPSILON)
    # The reference divides by p^_z + eps: what that takes off the ratio q_z / p^_z.
    epsilon_part = q_z * IS_EPSILON / (p_hat_z * (p_hat_z + IS_EPSILON))
    unmasked = torch.where(t.is_kept, kept, moved) - epsilon_part
    return torch.where(t.is_masked, masked, unmasked)


def gradient_rows(
    logits: Tensor, xt: Tensor, x0: Tensor, gradient: Gradient, upstream: Tensor, vocab: VocabSlice
) -> Tensor:
    """Gradient of sum(upstream * loss) by masked `logits` [n, v/tp]; overwrites them.

    No reduction and no collective: everything but the logits is a scalar per token.
    """

    def column(x: Tensor) -> Tensor:
        return (x * upstream).unsqueeze(-1)

    log_p = logits.sub_(gradient.lse.unsqueeze(-1))
    tau = torch.sigmoid(log_p + gradient.log_r.unsqueeze(-1))
    rows = log_p.exp_().mul_(column(gradient.weight_p)).sub_(tau.mul_(column(gradient.weight_tau)))
    for ids, value in ((x0, gradient.at_x0), (xt, gradient.at_xt)):
        place, here = vocab.local(ids)
        addend = torch.where(here, value * upstream, 0.0)
        rows.scatter_add_(-1, place.unsqueeze(-1), addend.unsqueeze(-1))
    return rows
