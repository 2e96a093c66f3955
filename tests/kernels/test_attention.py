"""The attention reference against torch's own attention, and its additions against definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.diffusion.visibility import attention_mask_from_visibility
from megatron_ext.kernels.attention import attention_reference
from tests.kernels.samples import assert_as_close_as_reference, draw_normal

LENGTH, BATCH, HEADS, HEAD_WIDTH = 9, 3, 2, 4


def _inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    shape = LENGTH, BATCH, HEADS, HEAD_WIDTH
    return tuple(draw_normal(*shape, seed=seed, scale=scale) for seed in (1, 2, 3))


def _biases() -> tuple[Tensor, Tensor]:
    return draw_normal(HEADS, HEAD_WIDTH, seed=4), draw_normal(HEADS, HEAD_WIDTH, seed=5)


def _prompt_mask() -> Tensor:
    """Sequences without a prompt, with one of four tokens, and all prompt."""
    visibility = torch.zeros(BATCH, 2, LENGTH, dtype=torch.int32)
    visibility[0, 0] = 1
    visibility[1, 0, 4:] = 1
    return attention_mask_from_visibility(visibility, causal_prompt=True)


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    bias = None if mask is None else mask.unsqueeze(1)
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return output.permute(2, 0, 1, 3)


def _with_gradients(function, *inputs: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    output.backward(draw_normal(*output.shape, seed=6).to(output.dtype))
    return [output.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("is_masked", [False, True])
def test_plain_attention_is_torchs(is_masked: bool) -> None:
    mask = _prompt_mask() if is_masked else None
    ours = _with_gradients(lambda *x: attention_reference(*x, mask), *_inputs())
    theirs = _with_gradients(lambda *x: _torch_attention(*x, mask), *_inputs())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_loses_no_more_than_torchs(dtype: torch.dtype) -> None:
    mask, inputs = _prompt_mask(), [x.to(dtype) for x in _inputs()]
    exact = [x.double() for x in inputs]
    truth = _with_gradients(lambda *x: _torch_attention(*x, mask), *exact)
    theirs = _with_gradients(lambda *x: _torch_attention(*x, mask), *inputs)
    ours = _with_gradients(lambda *x: attention_reference(*x, mask), *inputs)
    assert {x.dtype for x in ours} == {dtype}
    assert_as_close_as_reference(ours, theirs, truth, dtype)


@pytest.mark.parametrize("is_masked", [False, True])
def test_the_bias_token_is_a_key_and_value_put_in_front(is_masked: bool) -> None:
    """One that every query sees, in every sequence; its gradient is the sum over the batch."""
    mask = _prompt_mask() if is_masked else None

    def concatenated(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        key, value = (
            torch.cat([extra.expand(1, BATCH, -1, -1), x])
            for extra, x in zip(bias, (key, value), strict=True)
        )
        wider = None if mask is None else torch.cat([torch.ones(BATCH, LENGTH, 1) > 0, mask], -1)
        return _torch_attention(query, key, value, wider)

    def ours(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        return attention_reference(query, key, value, mask, k_bias=bias[0], v_bias=bias[1])

    inputs = (*_inputs(), *_biases())
    for a, b in zip(
        _with_gradients(ours, *inputs), _with_gradients(concatenated, *inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_soft_cap_bounds_the_scores() -> None:
    """Scores c tanh(x / c), one query and key at a time."""
    query, key, value = _inputs(scale=4.0)
    cap = 2.0
    got = attention_reference(query, key, value, softcap=cap)
    for b, a, q in [(0, 0, 0), (2, 1, 8), (1, 0, 5)]:
        scores = [
            cap * math.tanh(torch.dot(query[q, b, a], key[k, b, a]).item() / cap / 2)
            for k in range(LENGTH)
        ]
        assert max(map(abs, scores)) > 0.99 * cap
        total = sum(math.exp(x) for x in scores)
        expected = sum(math.exp(x) / total * value[k, b, a] for k, x in enumerate(scores))
        torch.testing.assert_close(got[q, b, a], expected, rtol=1e-12, atol=1e-13)


def test_a_wide_soft_cap_changes_little() -> None:
    """tanh(x) = x - x^3 / 3: at c = 10^4 scores change by 1e-8 of themselves."""
    plain = attention_reference(*_inputs())
    torch.testing.assert_close(
        attention_reference(*_inputs(), softcap=1e4), plain, rtol=0, atol=1e-7
    )
    assert not torch.allclose(attention_reference(*_inputs(), softcap=1.0), plain, atol=1e-3)


def test_gradients_are_the_finite_differences() -> None:
    """With everything on: soft cap, mask, bias token."""
    mask = _prompt_mask()[:, :, :]
    inputs = [x.requires_grad_() for x in (*_inputs(), *_biases())]

    def function(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        return attention_reference(
            query, key, value, mask, softcap=1.5, k_bias=bias[0], v_bias=bias[1]
        )

    assert torch.autograd.gradcheck(function, inputs, atol=1e-7, rtol=1e-5, fast_mode=True)


def test_hidden_keys_have_no_influence_and_no_gradient() -> None:
    """The prompt's queries do not see the noise: not its values, not its keys, to the last bit."""
    query, key, value = _inputs()
    mask = _prompt_mask()
    other_key, other_value = key.clone(), value.clone()
    other_key[4:, 1] = 1e4
    other_value[4:, 1] = -1e4
    options = {"softcap": 30.0, "k_bias": _biases()[0], "v_bias": _biases()[1]}
    a = attention_reference(query, key, value, mask, **options)
    b = attention_reference(query, other_key, other_value, mask, **options)
    assert torch.equal(a[:4, 1], b[:4, 1]) and not torch.equal(a[4:, 1], b[4:, 1])
    key.requires_grad_(), value.requires_grad_()
    attention_reference(query, key, value, mask, **options)[:4, 1].sum().backward()
    for x in (key, value):
        assert not x.grad[4:, 1].any() and x.grad[:4, 1].any()


def test_a_causal_prompt_of_one_token_sees_itself_alone() -> None:
    query, key, value = _inputs()
    got = attention_reference(query, key, value, _prompt_mask())
    torch.testing.assert_close(got[0, 1], value[0, 1], rtol=0, atol=0)
    torch.testing.assert_close(got[0, 2], value[0, 2], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gets_the_bias_token(dtype: torch.dtype) -> None:
    """Masked scores are finite, so without a bias token it is the mean of all values, never NaN."""
    query, key, value = (x.to(dtype) for x in _inputs())
    k_bias, v_bias = (x.to(dtype) for x in _biases())
    nothing = torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool)
    got = attention_reference(query, key, value, nothing, k_bias=k_bias, v_bias=v_bias)
    assert torch.equal(got, v_bias.expand_as(got))
    without = attention_reference(query, key, value, nothing)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        without, value.double().mean(0).to(dtype).expand_as(without), rtol=tolerance, atol=tolerance
    )
