"""The forward process: how much signal is left and what the noise looks like at a log-SNR.

    lambda = log(alpha / (1 - alpha))           log-SNR, clipped to [min_log_snr, max_log_snr]
    alpha(lambda) = sigmoid(lambda)             share of the clean token
    s(lambda)     = sigmoid(a lambda + b)       share of uniform noise, lambda not clipped
    pi_lambda[m]  = 1 - s,   pi_lambda[j] = s / (v - 1) for every other id j
    q_lambda(. | x0) = alpha onehot(x0) + (1 - alpha) pi_lambda

(arXiv 2512.10858, section 3). A shift b of -1000 is masked diffusion, +1000 uniform diffusion. The
float32 expression order follows the reference: 1 - alpha and 1 - s are subtractions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_WEIGHT_MAX = 1e3
ELBO_WEIGHT_MAX = 1e6
_DENOMINATOR_FLOOR = 1e-8
_DENSITY_FLOOR = 1e-12


@dataclass(frozen=True)
class MixingSchedule:
    """Mixing of clean, uniform and mask tokens as a function of log-SNR.

    Every method takes float32 or float64 and returns the same dtype. `vocab_size` is the true
    vocabulary with the mask token in it, never a padded one. Valid Markov chains have
    `0 < scale <= 1`.
    """

    vocab_size: int
    mask_token_id: int
    shift: float
    scale: float = 1.0
    min_log_snr: float = -9.0
    max_log_snr: float = 9.0

    def __post_init__(self) -> None:
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"--mask-token-id is {self.mask_token_id}: "
                f"it must be an id below the vocabulary size ({self.vocab_size})."
            )
        if self.vocab_size < 2:
            raise ValueError(f"--vocab-size is {self.vocab_size}: give 2 or more.")
        if not 0 < self.scale <= 1:
            raise ValueError(
                f"--mixing-scale is {self.scale}: it must lie in (0, 1]; "
                "the process is no Markov chain otherwise."
            )
        if self.min_log_snr >= self.max_log_snr:
            raise ValueError(
                f"--min-log-snr is {self.min_log_snr}: "
                f"it must be below --max-log-snr ({self.max_log_snr})."
            )

    @property
    def is_mask_only(self) -> bool:
        """No uniform noise worth a float32 at any log-SNR: s < 1e-30."""
        return self.scale * self.max_log_snr + self.shift < math.log(1e-30)

    @property
    def time_bounds(self) -> tuple[float, float]:
        """Times of the highest and the lowest log-SNR, t = 1 - sigmoid(log_snr)."""
        return 1 / (1 + math.exp(self.max_log_snr)), 1 / (1 + math.exp(self.min_log_snr))

    def log_snr_from_time(self, time: Tensor) -> Tensor:
        """Linear rate: log((1 - t) / t), clipped."""
        return torch.log((1 - time) / time).clamp(self.min_log_snr, self.max_log_snr)

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return 1 - self.alpha(log_snr)

    def log_snr_density(self, log_snr: Tensor) -> Tensor:
        """p(lambda) of the linear rate, not renormalised for the clipped ends."""
        signal = torch.sigmoid(log_snr)
        return signal * (1 - signal)

    def alpha(self, log_snr: Tensor) -> Tensor:
        """Share of the clean token."""
        return torch.sigmoid(log_snr.clamp(self.min_log_snr, self.max_log_snr))

    def uniform_share(self, log_snr: Tensor) -> Tensor:
        """s: share of uniform noise in the noise; the rest is the mask token."""
        return torch.sigmoid(self.scale * log_snr + self.shift)

    def pi_at(self, log_snr: Tensor, ids: Tensor) -> Tensor:
        """pi_lambda at token ids of a shape that broadcasts with `log_snr`."""
        share = self.uniform_share(log_snr)
        return torch.where(ids == self.mask_token_id, 1 - share, share / (self.vocab_size - 1))

    def pi_prime_at(self, log_snr: Tensor, ids: Tensor) -> Tensor:
        """Derivative of `pi_at` by the log-SNR."""
        share = self.uniform_share(log_snr)
        slope = self.scale * share * (1 - share)
        # A product here and a quotient in `pi_at`: their difference cancels, and the reference's
        # rounding is in the recorded weights.
        return torch.where(ids == self.mask_token_id, -slope, slope * (1 / (self.vocab_size - 1)))

    def pi(self, log_snr: Tensor) -> Tensor:
        """The noise distribution [..., v]."""
        return self.pi_at(log_snr.unsqueeze(-1), self._all_ids(log_snr))

    def pi_prime(self, log_snr: Tensor) -> Tensor:
        """Derivative of `pi` [..., v]."""
        return self.pi_prime_at(log_snr.unsqueeze(-1), self._all_ids(log_snr))

    def marginal(self, log_snr: Tensor, probs: Tensor) -> Tensor:
        """q_lambda for a distribution over clean tokens `probs` [..., v]."""
        signal = self.alpha(log_snr).unsqueeze(-1)
        return signal * probs + (1 - signal) * self.pi(log_snr)

    def loss_weight(self, log_snr: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
        """Weight of a token's loss (the bound's with p(lambda) := 1), clipped to [0, 1e3]."""
        return self._raw_weight(log_snr, xt, x0).clamp(0, LOSS_WEIGHT_MAX)

    def elbo_weight(self, log_snr: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
        """Weight of a token in the bound, clipped to [0, 1e6]."""
        density = self.log_snr_density(log_snr).clamp_min(_DENSITY_FLOOR)
        return (self._raw_weight(log_snr, xt, x0) / density).clamp(0, ELBO_WEIGHT_MAX)

    def posterior(self, probs: Tensor, xt: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
        """Distribution [..., v] of the token at the higher log-SNR s given the one at t.

        `probs` [..., v] is the denoiser's distribution of the clean token, zero at the mask;
        `xt`, `log_snr_t`, `log_snr_s` [...]. With a = alpha_t / alpha_s:

            p(z_s | z_t) = q_s(z_s) (a [z_s = z_t] + (beta_t pi_t - a beta_s pi_s)[z_t]) / q_t(z_t)

        Where q_t(xt) = 0 the formula is 0 / 0. A denoiser that rules out a revealed token of a
        process without uniform noise cannot change it: xt stays. A mask token that the process
        does not produce says nothing: the distribution is q_s.
        """
        at_xt = xt.unsqueeze(-1)
        alpha_t, alpha_s = self.alpha(log_snr_t), self.alpha(log_snr_s)
        ratio = alpha_t / alpha_s
        noise_t = (1 - alpha_t) * self.pi_at(log_snr_t, xt)
        noise_s = (1 - alpha_s) * self.pi_at(log_snr_s, xt)
        jump = (noise_t - ratio * noise_s).clamp_min(0)
        total = alpha_t * probs.gather(-1, at_xt).squeeze(-1) + noise_t
        q_s = self.marginal(log_snr_s, probs)
        at = torch.zeros_like(probs).scatter_(-1, at_xt, 1.0)
        joint = q_s * (at * ratio.unsqueeze(-1) + jump.unsqueeze(-1))
        impossible = torch.where(at_xt == self.mask_token_id, q_s, at)
        total = total.unsqueeze(-1)
        return torch.where(total > 0, joint / total, impossible)

    def _raw_weight(self, log_snr: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
        noise, slope = self.pi_at(log_snr, xt), self.pi_prime_at(log_snr, xt)
        signal = torch.where(xt == x0, log_snr.exp(), 0.0)
        return (noise - slope) / (noise + signal).clamp_min(_DENOMINATOR_FLOOR)

    def _all_ids(self, like: Tensor) -> Tensor:
        return torch.arange(self.vocab_size, device=like.device)
