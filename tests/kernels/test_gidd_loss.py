"""The closed form is the dense definition: values and gradients, in float64 to the last digits.

The oracle everywhere is `dense_gidd_loss` in float64 with autograd. Lower precisions are held to
the rule of the project: twice what the reference loses in that dtype plus one rounding.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.diffusion import GiddLoss, MixingSchedule, dense_gidd_loss
from megatron_ext.kernels.gidd_loss import gidd_loss, linear_gidd_loss
from tests.kernels.samples import (
    MASK_ID,
    Tokens,
    assert_as_close_as_reference,
    draw_normal,
    draw_tokens,
)

SHIFTS = [-1000.0, -2.0, 0.0, 2.0, 1000.0]


def _leaf(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return x.detach().clone().to(dtype).requires_grad_()


def _upstream(num_tokens: int) -> Tensor:
    """Factors of the tokens' losses: of both signs, and zero as outside the noise mask."""
    factors = draw_normal(num_tokens, seed=99)
    factors[::5] = 0
    return factors


def _dense(
    logits: Tensor, tokens: Tokens, schedule: MixingSchedule, beta_is: float
) -> tuple[GiddLoss, Tensor]:
    logits = _leaf(logits)
    losses = dense_gidd_loss(logits, *tokens, schedule, beta_is)
    (losses.loss * _upstream(len(tokens.xt))).sum().backward()
    return losses, logits.grad


def _on_logits(
    logits: Tensor, tokens: Tokens, schedule: MixingSchedule, beta_is: float, impl: Any = "chunked"
) -> tuple[GiddLoss, Tensor]:
    logits = _leaf(logits, logits.dtype)
    xt, x0, log_snr = tokens
    losses = gidd_loss(logits, xt, x0, log_snr, schedule, beta_is=beta_is, impl=impl)
    (losses.loss * _upstream(len(xt))).sum().backward()
    return losses, logits.grad


def _on_hidden(
    hidden: Tensor, weight: Tensor, tokens: Tokens, schedule: MixingSchedule, **options: Any
) -> list[Tensor]:
    """The four losses and the gradients of hidden and weight."""
    hidden, weight = _leaf(hidden, hidden.dtype), _leaf(weight, weight.dtype)
    losses = linear_gidd_loss(hidden, weight, *tokens, schedule, **options)
    (losses.loss * _upstream(len(tokens.xt))).sum().backward()
    return [*losses, hidden.grad, weight.grad]


def _assert_equal(got: GiddLoss, truth: GiddLoss, *gradients: tuple[Tensor, Tensor]) -> None:
    for name, ours, exact in zip(GiddLoss._fields, got, truth, strict=True):
        torch.testing.assert_close(
            ours, exact, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
    for ours, exact in gradients:
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 5), (63, 97), (127, 151), (40, 4)])
def test_closed_form_equals_the_definition(shift: float, num_tokens: int, vocab_size: int) -> None:
    schedule = MixingSchedule(vocab_size, MASK_ID, shift)
    tokens = draw_tokens(schedule, num_tokens, seed=num_tokens)
    logits = draw_normal(num_tokens, vocab_size, seed=1, scale=3)
    truth, grad_truth = _dense(logits, tokens, schedule, beta_is=0.3)
    got, grad = _on_logits(logits, tokens, schedule, beta_is=0.3)
    _assert_equal(got, truth, (grad, grad_truth))


@pytest.mark.parametrize("shift", SHIFTS)
def test_closed_form_equals_the_definition_for_large_logits(shift: float) -> None:
    schedule = MixingSchedule(97, MASK_ID, shift)
    tokens = draw_tokens(schedule, 63)
    logits = draw_normal(63, 97, seed=2, scale=50)
    assert (torch.softmax(logits, -1).gather(-1, tokens.x0[:, None]) < 1e-40).any()
    truth, grad_truth = _dense(logits, tokens, schedule, beta_is=1.0)
    got, grad = _on_logits(logits, tokens, schedule, beta_is=1.0)
    _assert_equal(got, truth, (grad, grad_truth))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("noised", ["none", "all"])
def test_closed_form_equals_the_definition_when_none_or_all_are_noised(
    shift: float, noised: str
) -> None:
    schedule = MixingSchedule(31, MASK_ID, shift)
    xt, x0, log_snr = draw_tokens(schedule, 64)
    if noised == "none":
        xt = x0.clone()
    else:
        other = torch.where((x0 + 1) % 31 == MASK_ID, 5, (x0 + 1) % 31)
        xt = torch.where(torch.arange(64) % 2 == 0, MASK_ID, other)
    tokens = Tokens(xt, x0, log_snr)
    logits = draw_normal(64, 31, seed=3)
    truth, grad_truth = _dense(logits, tokens, schedule, beta_is=2.0)
    got, grad = _on_logits(logits, tokens, schedule, beta_is=2.0)
    _assert_equal(got, truth, (grad, grad_truth))


def test_closed_form_keeps_the_mixing_scale() -> None:
    schedule = MixingSchedule(31, MASK_ID, 0.5, scale=0.4)
    tokens, logits = draw_tokens(schedule, 64), draw_normal(64, 31, seed=3)
    truth, grad_truth = _dense(logits, tokens, schedule, beta_is=1.0)
    got, grad = _on_logits(logits, tokens, schedule, beta_is=1.0)
    _assert_equal(got, truth, (grad, grad_truth))


@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0])
def test_closed_form_keeps_the_denominators_floor_of_a_large_vocabulary(shift: float) -> None:
    """At V = 131072 pi falls below 1e-8 at low SNR: the weight is s^2 / ((V - 1) 1e-8) there."""
    schedule = MixingSchedule(131072, MASK_ID, shift)
    log_snr = torch.tensor([-8.9, -8.9, -8.9, -6.8, 1.0, 8.9], dtype=torch.float64)
    xt = torch.tensor([11, MASK_ID, 10, 131071, 12, 10])
    tokens = Tokens(xt, torch.full((6,), 10), log_snr)
    share = torch.sigmoid(log_snr[0] + shift)
    noise = share / 131071
    assert noise < 1e-8
    weight = schedule.loss_weight(*(log_snr, tokens.xt, tokens.x0))[0]
    torch.testing.assert_close(weight, share * noise / 1e-8, rtol=1e-9, atol=0)

    logits = draw_normal(6, 131072, seed=4, scale=2)
    logits[:, 10] += 9
    truth, grad_truth = _dense(logits, tokens, schedule, beta_is=1.0)
    got, grad = _on_logits(logits, tokens, schedule, beta_is=1.0)
    _assert_equal(got, truth, (grad, grad_truth))


def test_padding_columns_and_the_mask_column_count_for_nothing() -> None:
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    tokens = draw_tokens(schedule, 50)
    logits = draw_normal(50, 29, seed=5)
    truth, grad_truth = _dense(logits, tokens, schedule, beta_is=1.0)
    padded = torch.cat([logits, torch.full((50, 3), 77.0)], dim=-1)
    padded[:, MASK_ID] = 55.0
    got, grad = _on_logits(padded, tokens, schedule, beta_is=1.0)
    _assert_equal(got, truth, (grad[:, :29], grad_truth))
    assert not grad[:, 29:].any() and not grad[:, MASK_ID].any()


def test_losses_of_a_batch_have_its_shape() -> None:
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    tokens = draw_tokens(schedule, 6)
    logits = draw_normal(6, 29, seed=5)
    flat, flat_grad = _on_logits(logits, tokens, schedule, beta_is=1.0)
    leaf = _leaf(logits.view(2, 3, 29))
    batch = gidd_loss(leaf, *(x.view(2, 3) for x in tokens), schedule, impl="chunked")
    (batch.loss * _upstream(6).view(2, 3)).sum().backward()
    for ours, theirs in zip([*batch, leaf.grad], [*flat, flat_grad], strict=True):
        assert torch.equal(ours, theirs.view(ours.shape)) and ours.dim() in (2, 3)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_no_tokens_have_no_loss_and_no_gradient(impl: Any) -> None:
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    tokens = draw_tokens(schedule, 0)
    losses, grad = _on_logits(torch.zeros(0, 29), tokens, schedule, 1.0, impl)
    assert all(x.shape == (0,) for x in losses) and grad.shape == (0, 29)
    *losses, grad_hidden, grad_weight = _on_hidden(
        torch.zeros(0, 8), torch.ones(29, 8), tokens, schedule, impl=impl
    )
    assert all(x.shape == (0,) for x in losses) and grad_hidden.shape == (0, 8)
    assert grad_weight.shape == (29, 8) and not grad_weight.any()


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("chunk_size", [1, 7, 32, 63, 100, None])
def test_fused_head_equals_the_definition_at_every_chunk_size(
    shift: float, chunk_size: int | None
) -> None:
    schedule = MixingSchedule(53, MASK_ID, shift)
    tokens = draw_tokens(schedule, 63)
    hidden, weight = draw_normal(63, 11, seed=6), draw_normal(56, 11, seed=7)
    exact = _leaf(hidden), _leaf(weight)
    truth = dense_gidd_loss(1.7 * exact[0] @ exact[1].t(), *tokens, schedule, 0.6)
    (truth.loss * _upstream(63)).sum().backward()
    *losses, grad_hidden, grad_weight = _on_hidden(
        hidden, weight, tokens, schedule,
        logit_scale=1.7, beta_is=0.6, chunk_size=chunk_size, impl="chunked",
    )  # fmt: skip
    _assert_equal(
        GiddLoss(*losses), truth, (grad_hidden, exact[0].grad), (grad_weight, exact[1].grad)
    )
    assert not grad_weight[53:].any()


def test_fused_reference_equals_the_definition() -> None:
    schedule = MixingSchedule(53, MASK_ID, 0.0)
    tokens = draw_tokens(schedule, 20)
    hidden, weight = draw_normal(20, 11, seed=6), draw_normal(56, 11, seed=7)
    options = {"logit_scale": 1.7, "beta_is": 0.6}
    chunked = _on_hidden(hidden, weight, tokens, schedule, impl="auto", **options)
    reference = _on_hidden(hidden, weight, tokens, schedule, impl="reference", **options)
    _assert_equal(
        GiddLoss(*chunked[:4]), GiddLoss(*reference[:4]),
        (chunked[4], reference[4]), (chunked[5], reference[5]),
    )  # fmt: skip


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_form_loses_no_more_than_the_reference(shift: float, dtype: torch.dtype) -> None:
    schedule = MixingSchedule(97, MASK_ID, shift)
    tokens = draw_tokens(schedule, 127, seed=8)
    logits = draw_normal(127, 97, seed=9, scale=2).to(dtype)
    truth, grad_truth = _dense(logits, tokens, schedule, beta_is=1.0)
    rounded = Tokens(tokens.xt, tokens.x0, tokens.log_snr.float())
    got, grad = _on_logits(logits, rounded, schedule, 1.0)
    reference, grad_reference = _on_logits(logits, rounded, schedule, 1.0, "reference")
    assert grad.dtype == dtype and {x.dtype for x in got} == {torch.float32}
    assert_as_close_as_reference(got, reference, truth, torch.float32)
    assert_as_close_as_reference([grad], [grad_reference], [grad_truth], dtype)


@pytest.mark.parametrize("shift", SHIFTS)
def test_large_logits_in_float32_cost_one_rounding_of_a_logit(shift: float) -> None:
    """exp(logit - lse) inherits the rounding of its argument; the dense form is no yardstick.

    Its softmax subtracts the peak, which is exact for the likeliest ids, and underflows for others.
    """
    schedule = MixingSchedule(97, MASK_ID, shift)
    tokens = draw_tokens(schedule, 127, seed=8)
    logits = draw_normal(127, 97, seed=9, scale=50).float()
    truth, grad_truth = _dense(logits, tokens, schedule, beta_is=1.0)
    rounded = Tokens(tokens.xt, tokens.x0, tokens.log_snr.float())
    got, grad = _on_logits(logits, rounded, schedule, 1.0)
    rounding = torch.finfo(torch.float32).eps * logits.abs().max().item()
    torch.testing.assert_close(got.kl.double(), truth.kl, rtol=rounding, atol=rounding)
    torch.testing.assert_close(grad.double(), grad_truth, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_head_loses_no_more_than_the_reference(shift: float, dtype: torch.dtype) -> None:
    schedule = MixingSchedule(97, MASK_ID, shift)
    tokens = draw_tokens(schedule, 127, seed=8)
    hidden = draw_normal(127, 32, seed=10).to(dtype)
    weight = draw_normal(97, 32, seed=11, scale=0.4).to(dtype)
    truth = _on_hidden(
        hidden.double(), weight.double(), tokens, schedule, logit_scale=0.5, impl="reference"
    )
    rounded = Tokens(tokens.xt, tokens.x0, tokens.log_snr.float())
    options = {"logit_scale": 0.5, "chunk_size": 48}
    got = _on_hidden(hidden, weight, rounded, schedule, impl="chunked", **options)
    reference = _on_hidden(hidden, weight, rounded, schedule, impl="reference", **options)
    assert {x.dtype for x in got[4:]} == {dtype}
    assert_as_close_as_reference(got, reference, truth, dtype)


def test_weight_gradient_accumulates_over_chunks_in_float32() -> None:
    """1024 equal tokens, one per chunk: in bfloat16 the sum would stop growing at 256."""
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    one = Tokens(torch.tensor([MASK_ID]), torch.tensor([7]), torch.tensor([0.5]))
    hidden, weight = draw_normal(1, 8, seed=6).bfloat16(), draw_normal(29, 8, seed=7).bfloat16()

    def weight_gradient(num_tokens: int) -> Tensor:
        leaves = hidden.repeat(num_tokens, 1).requires_grad_(), _leaf(weight, torch.bfloat16)
        tokens = (x.repeat(num_tokens) for x in one)
        linear_gidd_loss(*leaves, *tokens, schedule, chunk_size=1).loss.sum().backward()
        return leaves[1].grad

    assert torch.equal(weight_gradient(1024), 1024 * weight_gradient(1))


@pytest.mark.parametrize("shift", [-95.0, -85.0, -80.0, -60.0, -30.0, 30.0, 100.0])
def test_a_share_at_the_edge_of_float32_is_the_masked_or_uniform_limit(shift: float) -> None:
    """Uniform noise per id between the smallest float32 and zero must not overflow its inverse."""
    limit = MixingSchedule(97, MASK_ID, math.copysign(1000, shift))
    schedule = MixingSchedule(97, MASK_ID, shift)
    tokens = draw_tokens(limit, 127, seed=8)
    logits = draw_normal(127, 97, seed=9, scale=2)
    truth, grad_truth = _dense(logits, tokens, schedule, beta_is=1.0)
    rounded = Tokens(tokens.xt, tokens.x0, tokens.log_snr.float())
    got, grad = _on_logits(logits.float(), rounded, schedule, 1.0)
    # log(alpha / c) reaches 100 in size: one rounding of it is 4e-6 in every probability ratio.
    torch.testing.assert_close(got.loss.double(), truth.loss, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(grad.double(), grad_truth, rtol=1e-5, atol=5e-6)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("vocab_size", [7, 997])
def test_nothing_cancels_at_low_snr_in_float32(vocab_size: int) -> None:
    """KL and IS are of the order of v^2 there, and every token keeps its digits.

    The dense form subtracts logarithms of near equals, and is off by percents.
    """
    schedule = MixingSchedule(vocab_size, MASK_ID, 1000.0)
    xt, x0, _ = draw_tokens(schedule, 256, seed=8)
    log_snr = torch.linspace(-9, -7, 256)
    other = torch.where((x0 + 1) % vocab_size == MASK_ID, 5, (x0 + 1) % vocab_size)
    xt = torch.where(torch.arange(256) % 2 == 0, other, x0)
    logits = draw_normal(256, vocab_size, seed=9).float()
    tokens = Tokens(xt, x0, log_snr)
    truth, _ = _dense(logits, Tokens(xt, x0, log_snr.double()), schedule, 1.0)
    got, _ = _on_logits(logits, tokens, schedule, 1.0)
    dense, _ = _on_logits(logits, tokens, schedule, 1.0, "reference")
    for ours, theirs, exact in zip(got, dense, truth, strict=True):
        # IS of a replaced token is v^2 / 2 - 1e-12 / c, and may pass through zero.
        torch.testing.assert_close(ours.double(), exact, rtol=4e-6, atol=1e-14)
        assert ((theirs - exact).abs() > 0.01 * exact.abs()).any()


def test_closed_form_keeps_its_gradient_where_the_dense_form_underflows() -> None:
    """exp(-200) is 0 in float32: the dense loss stops at its floor, the closed form goes on."""
    schedule = MixingSchedule(5, MASK_ID, -1000.0)
    tokens = Tokens(torch.tensor([MASK_ID]), torch.tensor([0]), torch.tensor([0.0]))
    logits = torch.tensor([[-200.0, 0.0, -300.0, 0.0, -300.0]])
    dense, dense_grad = _on_logits(logits, tokens, schedule, 1.0, "reference")
    truth, grad_truth = _dense(logits, Tokens(*tokens[:2], tokens[2].double()), schedule, 1.0)
    got, grad = _on_logits(logits, tokens, schedule, 1.0)
    assert truth.loss.item() == pytest.approx(0.5 * 200, rel=1e-9)
    assert dense.loss.item() < 0.5 * 90
    torch.testing.assert_close(got.loss.double(), truth.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), grad_truth, rtol=1e-5, atol=0)


def test_gradient_of_a_token_sums_to_zero() -> None:
    """Softmax ignores a constant, so no loss of it may push all logits the same way."""
    for shift in SHIFTS:
        schedule = MixingSchedule(97, MASK_ID, shift)
        _, grad = _on_logits(
            draw_normal(127, 97, seed=9, scale=2), draw_tokens(schedule, 127), schedule, 1.0
        )
        assert grad.abs().sum(-1).max() > 1e-2
        assert grad.sum(-1).abs().max() < 1e-14


def test_masked_loss_is_the_weighted_cross_entropy() -> None:
    """The known bound: alpha x CE as trained, CE / t as reported, nothing where xt is revealed."""
    schedule = MixingSchedule(97, MASK_ID, -1000.0)
    xt, x0, log_snr = tokens = draw_tokens(schedule, 127)
    logits = draw_normal(127, 97, seed=9, scale=2)
    got = gidd_loss(logits, *tokens, schedule)
    without_mask = logits.index_fill(-1, torch.tensor([MASK_ID]), -torch.inf)
    nll = torch.nn.functional.cross_entropy(without_mask, x0, reduction="none")
    nll = torch.where(xt == MASK_ID, nll, 0)
    time = 1 - torch.sigmoid(log_snr)
    torch.testing.assert_close(got.loss, (1 - time) * nll, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.elbo, nll / time, rtol=1e-7, atol=1e-6)


def test_only_the_loss_is_differentiable() -> None:
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    tokens, logits = draw_tokens(schedule, 6), _leaf(draw_normal(6, 29, seed=5))
    for impl in ("reference", "chunked"):
        losses = gidd_loss(logits, *tokens, schedule, impl=impl)
        assert [x.requires_grad for x in losses] == [True, False, False, False]


def test_an_unknown_implementation_is_refused_by_name() -> None:
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    tokens = draw_tokens(schedule, 6)
    with pytest.raises(ValueError, match="dense"):
        gidd_loss(torch.zeros(6, 29), *tokens, schedule, impl="dense")
    with pytest.raises(ValueError, match="dense"):
        linear_gidd_loss(torch.zeros(6, 2), torch.zeros(29, 2), *tokens, schedule, impl="dense")


def test_a_head_with_too_few_rows_is_refused() -> None:
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    with pytest.raises(ValueError, match="29"):
        gidd_loss(torch.zeros(6, 28), *draw_tokens(schedule, 6), schedule)
