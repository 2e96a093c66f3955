"""Fused cross-entropy is torch's cross-entropy of the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.cross_entropy import IGNORED, linear_cross_entropy
from tests.kernels.samples import assert_as_close_as_reference, draw_normal

VOCAB_SIZE, PADDED_SIZE, WIDTH, SCALE = 41, 48, 7, 1.9


def _inputs(num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = draw_normal(num_tokens, WIDTH, seed=1)
    weight = draw_normal(PADDED_SIZE, WIDTH, seed=2)
    rng = torch.Generator().manual_seed(3)
    targets = torch.randint(4, VOCAB_SIZE, (num_tokens,), generator=rng)
    targets[::6] = IGNORED
    return hidden, weight, targets, draw_normal(num_tokens, seed=4)


def _expected(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, excluded_id: int | None
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    logits = (leaves[0] @ leaves[1][:VOCAB_SIZE].t()).to(upstream.dtype) * SCALE
    if excluded_id is not None:
        logits = logits.index_fill(-1, torch.tensor([excluded_id]), -torch.inf)
    nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    (nll * upstream).sum().backward()
    return [nll, *(x.grad for x in leaves)]


def _fused(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor,
    excluded_id: int | None,
    chunk_size: int | None,
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    nll = linear_cross_entropy(
        *leaves, targets, VOCAB_SIZE,
        logit_scale=SCALE, excluded_id=excluded_id, chunk_size=chunk_size,
    )  # fmt: skip
    (nll * upstream).sum().backward()
    return [nll, *(x.grad for x in leaves)]


@pytest.mark.parametrize("num_tokens", [1, 63, 127])
@pytest.mark.parametrize("chunk_size", [1, 20, 500, None])
@pytest.mark.parametrize("excluded_id", [None, 3])
def test_fused_cross_entropy_equals_torch(
    num_tokens: int, chunk_size: int | None, excluded_id: int | None
) -> None:
    inputs = _inputs(num_tokens)
    got = _fused(*inputs, excluded_id, chunk_size)
    for ours, exact in zip(got, _expected(*inputs, excluded_id), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def test_ignored_targets_have_no_loss_and_no_gradient() -> None:
    hidden, weight, targets, upstream = _inputs(12)
    nll, grad_hidden, _ = _fused(hidden, weight, targets, upstream, None, 5)
    assert not nll[::6].any() and not grad_hidden[::6].any()
    assert (nll[1:6] > 0).all() and grad_hidden[1:6].any(-1).all()
    nothing = _fused(hidden, weight, torch.full_like(targets, IGNORED), upstream, None, 5)
    assert not any(x.any() for x in nothing)


def test_no_tokens_have_no_cross_entropy() -> None:
    nll, grad_hidden, grad_weight = _fused(*_inputs(0), None, None)
    assert nll.shape == (0,) and grad_hidden.shape == (0, WIDTH) and not grad_weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_cross_entropy_loses_no_more_than_torch(dtype: torch.dtype) -> None:
    hidden, weight, targets, upstream = _inputs(127)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    truth = _expected(hidden.double(), weight.double(), targets, upstream, None)
    reference = _expected(hidden, weight, targets, upstream.float(), None)
    got = _fused(hidden, weight, targets, upstream.float(), None, 50)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    assert_as_close_as_reference(got, reference, truth, dtype)
