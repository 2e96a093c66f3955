"""Noised tokens with logits to test losses on, and how close two dtypes have to be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.diffusion import MixingSchedule

MASK_ID = 3


class Tokens(NamedTuple):
    """A batch of tokens in the order the losses take them; log-SNRs are float64."""

    xt: Tensor
    x0: Tensor
    log_snr: Tensor


def draw_tokens(schedule: MixingSchedule, num_tokens: int, seed: int = 0) -> Tokens:
    """Clean ids without the mask, log-SNRs over the whole range, and a draw from q_lambda."""
    rng = torch.Generator().manual_seed(seed)
    size, mask = schedule.vocab_size, schedule.mask_token_id
    x0 = torch.randint(size - 1, (num_tokens,), generator=rng)
    x0 += x0 >= mask
    log_snr = 18 * torch.rand(num_tokens, generator=rng, dtype=torch.float64) - 9
    alpha, share = schedule.alpha(log_snr), schedule.uniform_share(log_snr)
    u = torch.rand(num_tokens, generator=rng, dtype=torch.float64)
    anything = torch.randint(size, (num_tokens,), generator=rng)
    xt = torch.where(u < alpha, x0, torch.where(u < alpha + (1 - alpha) * share, anything, mask))
    return Tokens(xt, x0, log_snr)


def draw_normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64) * scale


def assert_as_close_as_reference(
    got: Iterable[Tensor], reference: Iterable[Tensor], truth: Iterable[Tensor], dtype: torch.dtype
) -> None:
    """The error of `got` is at most twice the reference's, in `dtype`, plus one rounding.

    Errors are the largest of a tensor, against the float64 `truth`; a rounding is that of its
    largest entry.
    """
    for index, (ours, theirs, exact) in enumerate(zip(got, reference, truth, strict=True)):
        if exact.numel() == 0:
            assert ours.shape == exact.shape
            continue
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        allowed = 2 * (theirs.double() - exact).abs().max() + rounding
        error = (ours.double() - exact).abs().max()
        assert error <= allowed, f"tensor {index}: error {error:.2e}, allowed {allowed:.2e}"
