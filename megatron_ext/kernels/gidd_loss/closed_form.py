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
    g_k = w [(A - b E) p_k - c tau_k - alpha tau_x [k = x] + b E [k = z]]      k != m
    A = alpha tau_x + c T,  E = tau_z (1 - q_z p^_z / (p^_z + eps)^2) for z != m, else 0

Every term is a sum of non-negative numbers, so nothing cancels at low SNR, where the textbook form
loses all digits. Masked diffusion is the limit c = 0: c F -> alpha (1 - p_x), c T -> 0, tau_x -> 1.
It is taken where r^2 leaves the range of the dtype (r > 2^64 in float32, c F = alpha (1 - p_x) to
parts in 10^12), so that two numbers 1 + v can be multiplied; masked schedules (`is_mask_only`) skip
F and T altogether.

As c tau_k = alpha p_k / (1 + v_k), the gradient is p_k (w (A - b E) - w alpha / (1 + r p_k)) but
for its values at x and z.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.diffusion.objective import IS_EPSILON, GiddLoss
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.kernels.vocabulary.passes import minus_log1p
from megatron_ext.kernels.vocabulary.split_softmax import Gradient, SplitSoftmax


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
        has_uniform = (c * torch.finfo(c.dtype).max ** 0.5 > alpha) & (not schedule.is_mask_only)
        c = torch.where(has_uniform, c, 0.0)
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


def _log_deficit(u: Tensor, log_rest: Tensor) -> Tensor:
    """-log(1 - u) - u for u in [0, 1), given log(1 - u), whose digits count near u = 1 only."""
    limit = 2e-2 if u.dtype == torch.float32 else 1e-3
    series = u * u * (0.5 + u * (1 / 3 + u * (0.25 + u * 0.2)))
    log_rest = torch.where(u < 0.5, torch.log1p(-u), log_rest)
    return torch.where(u < limit, series, -log_rest - u)


def closed_form(
    rows: Tensor,
    xt: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    schedule: MixingSchedule,
    softmax: SplitSoftmax,
    beta_is: float,
) -> tuple[GiddLoss, Gradient]:
    """Losses and gradient scalars of `rows` [n, v/tp] of logits.

    `xt`, `x0` [n] int64, `log_snr` [n] float32 (float64 for float64 rows).
    """
    t = Marginals.of(xt, x0, log_snr, schedule)
    lse, (logit_x, logit_z) = softmax.log_sum_exp_and_picked(rows, [x0, xt])
    log_p_x, log_p_z = logit_x - lse, logit_z - lse
    if schedule.is_mask_only:
        sum_f = sum_tau = torch.zeros_like(lse)
    else:
        sum_f, sum_tau = softmax.tail_sums(rows, t.log_r - lse, x0)
    rest_x = _one_minus_exp(log_p_x)
    is_hybrid = t.c > 0
    tau_x = torch.where(is_hybrid, torch.sigmoid(log_p_x + t.log_r), 1.0)

    q_x = t.alpha + t.c
    log_p_hat_x = torch.where(
        is_hybrid,
        torch.logaddexp(t.c.log(), t.alpha.log() + log_p_x),
        t.alpha.log() + log_p_x,
    )
    rest = torch.where(is_hybrid, t.c * sum_f, t.alpha * rest_x)
    kl = rest + q_x * _log_deficit(t.alpha * rest_x / q_x, log_p_hat_x - q_x.log())

    p_hat_x = log_p_hat_x.exp()
    v_z = torch.exp(log_p_z + t.log_r)
    p_hat_z = torch.where(t.is_kept, p_hat_x, t.c * (1 + v_z))
    q_z = torch.where(t.is_kept, q_x, t.c)
    is_div = _is_divergence(t, q_x, p_hat_x, rest_x, v_z, q_z, p_hat_z)

    tau_z = torch.where(t.is_kept, tau_x, torch.sigmoid(log_p_z + t.log_r))
    e = tau_z * (1 - q_z * p_hat_z / (p_hat_z + IS_EPSILON).square())
    e = torch.where(t.is_masked, 0.0, beta_is * e)
    gradient = _gradient(t, lse, (log_p_x, log_p_z), (tau_x, tau_z), sum_tau, e)
    if schedule.is_mask_only:
        gradient = gradient._replace(r=None, weight_v=None)
    # A zero weight marks transitions of probability zero, whose divergences are infinite.
    possible = t.weight > 0
    kl, is_div = (torch.where(possible, x, 0.0) for x in (kl, is_div))
    losses = GiddLoss(
        t.weight * (kl + beta_is * is_div),
        torch.where(possible, t.elbo_weight * (kl + is_div), 0.0),
        t.weight * kl,
        t.weight * is_div,
    )
    return losses, gradient


def _gradient(
    t: Marginals,
    lse: Tensor,
    log_p: tuple[Tensor, Tensor],
    tau: tuple[Tensor, Tensor],
    sum_tau: Tensor,
    e: Tensor,
) -> Gradient:
    """g_k as scalars, and its values at x0 and xt, where nothing may cancel near p = 1.

    `log_p` and `tau` at x0 and xt; `sum_tau` over j != m, x; `e` is b E.
    """
    (p_x, p_z), (rest_x, rest_z) = ([f(x) for x in log_p] for f in (torch.exp, _one_minus_exp))
    (tau_x, tau_z), tail = tau, t.c * sum_tau
    at_x0 = tail * p_x - (t.alpha + t.c) * tau_x * rest_x
    at_x0 = at_x0 + torch.where(t.is_kept, e * rest_x, -e * p_x)
    factor_p = t.alpha * tau_x + tail + t.c * tau_x
    at_xt = torch.where(t.is_kept, at_x0, factor_p * p_z - t.c * tau_z + e * rest_z)
    weight_p = t.weight * (factor_p - e)
    weight_v = torch.where(t.c > 0, t.weight * t.alpha, 0.0)
    return Gradient(lse, weight_p, t.weight * at_x0, t.weight * at_xt, t.log_r.exp(), weight_v)


def _one_minus_exp(x: Tensor) -> Tensor:
    return -torch.expm1(x)


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
    kept = minus_log1p(excess)
    moved = _log_deficit(v_z / (1 + v_z), -torch.log1p(v_z))
    masked = -IS_EPSILON / (t.q_mask + IS_EPSILON)
    # The reference divides by p^_z + eps: what that takes off the ratio q_z / p^_z.
    epsilon_part = q_z * IS_EPSILON / (p_hat_z * (p_hat_z + IS_EPSILON))
    unmasked = torch.where(t.is_kept, kept, moved) - epsilon_part
    return torch.where(t.is_masked, masked, unmasked)
