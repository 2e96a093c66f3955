"""Every implementation of attention against the dense definition: values and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from megatron_ext.kernels.attention import attention, blocked, choose_attention
from megatron_ext.kernels.attention.flash import FlashKernel
from megatron_ext.kernels.attention.flex import attention_flex
from megatron_ext.kernels.attention.fold import folded_attention
from megatron_ext.kernels.attention.pieces import Rules
from megatron_ext.kernels.attention.sdpa import attention_sdpa
from tests.kernels.attention_cases import (
    BATCH,
    CASES,
    HEAD_WIDTH,
    REGULAR,
    Case,
    Function,
    draw_inputs,
    reference_of,
    value_and_gradients,
)
from tests.kernels.flash_attn_stand_in import VERSIONS, FlashAttnStandIn
from tests.kernels.samples import assert_as_close_as_reference, draw_normal

CAPS = {"blocked": (None, 3.0), "sdpa": (None,)}
LARGE = 3.0
"""Scale of queries, keys and the token's key: scores have a standard deviation of 9."""
NUM_DRAWS = 6
"""The largest error of one draw is a matter of luck."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks per sequence, for two heads and for one."""
    monkeypatch.setattr(blocked, "_MIN_QUERIES", 16)
    monkeypatch.setattr(blocked, "_SCORES_PER_THREAD", 2 * 16 * 127)


def _function(case: Case, impl: str, softcap: float | None, *, has_token: bool = True) -> Function:
    def function(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        token = {"k_bias": bias[0], "v_bias": bias[1]} if has_token else {}
        return attention(
            query, key, value, case.visibility(), **case.keywords(), **token, softcap=softcap,
            impl=impl,
        )  # fmt: skip

    return function


PAIRS = [(impl, cap) for impl, caps in CAPS.items() for cap in caps]


@pytest.mark.parametrize(("impl", "softcap"), PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_implementations_are_the_definition_in_float64(
    name: str, impl: str, softcap: float | None
) -> None:
    case = CASES[name]
    inputs = draw_inputs(case, torch.float64)
    truth = value_and_gradients(reference_of(case, softcap), inputs)
    got = value_and_gradients(_function(case, impl, softcap), inputs)
    for ours, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def _assert_loses_no_more(
    case: Case, impl: str, softcap: float | None, dtype: torch.dtype, scale: float
) -> None:
    """Than the definition in `dtype`, by the largest error of several draws."""
    definition, function = reference_of(case, softcap), _function(case, impl, softcap)
    draws: dict[str, list[list[Tensor]]] = {"truth": [], "theirs": [], "ours": []}
    for seed in range(NUM_DRAWS):
        inputs = draw_inputs(case, dtype, scale, seed=10 * seed)
        truth = value_and_gradients(definition, [x.double() for x in inputs])
        theirs = value_and_gradients(definition, inputs)
        ours = value_and_gradients(function, inputs)
        assert {x.dtype for x in ours} == {dtype}
        for name, result in (("truth", truth), ("theirs", theirs), ("ours", ours)):
            draws[name].append(result)
    together = {
        name: [torch.stack(x) for x in zip(*results, strict=True)]
        for name, results in draws.items()
    }
    assert_as_close_as_reference(together["ours"], together["theirs"], together["truth"], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("impl", "softcap"), PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_implementations_lose_no_more_than_the_definition(
    name: str, impl: str, softcap: float | None, dtype: torch.dtype
) -> None:
    _assert_loses_no_more(CASES[name], impl, softcap, dtype, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("impl", "softcap"), [*PAIRS, ("blocked", 30.0)])
@pytest.mark.parametrize("name", ["prompts_127", "causal_documents", "piece"])
def test_implementations_lose_no_more_where_scores_are_large(
    name: str, impl: str, softcap: float | None, dtype: torch.dtype
) -> None:
    """Far beyond a cap of 3; without a cap one key has all the weight."""
    _assert_loses_no_more(CASES[name], impl, softcap, dtype, scale=LARGE)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_scores_beyond_all_exponentials_stay_finite(scale: float) -> None:
    """tanh goes through e^x, which is infinite here."""
    case = CASES["prompts"]
    inputs = draw_inputs(case, torch.float32, scale**0.5)
    for softcap in (1.0, 30.0):
        truth = reference_of(case, softcap)(*(x.double() for x in inputs))
        got = value_and_gradients(_function(case, "blocked", softcap), inputs)
        assert all(x.isfinite().all() for x in got)
        torch.testing.assert_close(got[0], truth.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("impl", CAPS)
def test_implementations_work_without_a_token(impl: str) -> None:
    case = CASES["documents"]
    inputs = draw_inputs(case, torch.float64)[:3]
    truth = value_and_gradients(reference_of(case, None, has_token=False), inputs)
    got = value_and_gradients(_function(case, impl, None, has_token=False), inputs)
    for ours, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("impl", "softcap"), PAIRS)
def test_any_pattern_can_be_given_as_a_mask(impl: str, softcap: float | None) -> None:
    case = CASES["scattered"]
    inputs = draw_inputs(case, torch.float64)
    mask = case.mask()

    def function(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        return attention(
            query, key, value, mask, softcap=softcap, k_bias=bias[0], v_bias=bias[1], impl=impl
        )

    truth = value_and_gradients(reference_of(case, softcap), inputs)
    for ours, exact in zip(value_and_gradients(function, inputs), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", CAPS)
def test_hidden_keys_have_no_influence_and_no_gradient(impl: str) -> None:
    """To the last bit: another block, or a key of minus infinity, would show here."""
    case = CASES["prompts"]
    query, key, value, *bias = draw_inputs(case, torch.float32)
    prompt, row = case.length // 3, 2
    function = _function(case, impl, None)
    before = function(query, key, value, *bias)
    changed = [x.clone() for x in (key, value)]
    for x in changed:
        x[prompt:, row] = 1e4
    after = function(query, *changed, *bias)
    assert torch.equal(before[:prompt, row], after[:prompt, row])
    assert not torch.equal(before[prompt:, row], after[prompt:, row])
    key.requires_grad_(), value.requires_grad_()
    function(query, key, value, *bias)[:prompt, row].sum().backward()
    for x in (key, value):
        assert not x.grad[prompt:, row].any() and x.grad[:prompt, row].any()


def test_the_public_function_of_torch_with_the_token_as_a_key_is_the_definition() -> None:
    """What `sdpa` does where there is no CPU kernel to fold the token into."""
    case = CASES["documents"]
    inputs = draw_inputs(case, torch.float64)

    def function(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        return attention_sdpa(query, key, value, case.mask(), *bias)

    truth = value_and_gradients(reference_of(case, None), inputs)
    for ours, exact in zip(value_and_gradients(function, inputs), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.fixture
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses gradients on CPUs even for its uncompiled definition, which has them."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *inputs: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", [x for x in CASES if "127" not in x])
def test_flex_is_the_definition(
    name: str, softcap: float | None, flex_with_gradients: None
) -> None:
    """Masks, cap and the token folded in through the differentiable log-sum-exp, as on GPUs.

    The kernel is torch's uncompiled definition of FlexAttention.
    """
    case = CASES[name]
    inputs = draw_inputs(case, torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        rules = Rules(**case.keywords())
        visibility = case.visibility()
        if visibility is None and rules.causal:
            visibility = torch.zeros(BATCH, 2, case.length, dtype=torch.int32)
        return attention_flex(
            *tensors, visibility=visibility, rules=rules, softcap=softcap,
            function=torch_flex.flex_attention,
        )  # fmt: skip

    truth = value_and_gradients(reference_of(case, softcap), inputs)
    for ours, exact in zip(value_and_gradients(function, inputs), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


@torch.no_grad()
def test_compiled_flex_is_the_definition_in_inference() -> None:
    """On CPUs, with the token as an additional key."""
    case = CASES["documents"]
    definition, function = reference_of(case, 3.0), _function(case, "flex", 3.0)
    for seed in (0, 10):
        inputs = draw_inputs(case, torch.float32, seed=seed)
        truth = definition(*(x.double() for x in inputs))
        got = function(*inputs)
        assert_as_close_as_reference([got], [definition(*inputs)], [truth], torch.float32)


def _flash(case: Case, softcap: float | None, library: FlashAttnStandIn) -> Function:
    visibility, rules = case.visibility(), Rules(**case.keywords())
    if visibility is None and rules.causal:
        visibility = torch.zeros(BATCH, 2, case.length, dtype=torch.int32)
    kernel = FlashKernel(visibility, rules, softcap, library)
    return lambda *inputs: folded_attention(*inputs, kernel, softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", REGULAR)
def test_flash_attn_as_released_can_express_the_definition(
    name: str, softcap: float | None
) -> None:
    """Segments, token and signatures, over a stand-in for its kernels; two calls at most."""
    case = CASES[name]
    inputs = draw_inputs(case, torch.float64)
    truth = value_and_gradients(reference_of(case, softcap), inputs)
    for version in VERSIONS:
        library = FlashAttnStandIn(version)
        got = value_and_gradients(_flash(case, softcap, library), inputs)
        assert 1 <= library.num_calls <= 2
        for ours, exact in zip(got, truth, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def test_flash_attn_refuses_what_its_segments_cannot_express() -> None:
    case = CASES["scattered"]
    inputs = draw_inputs(case, torch.float64)
    with pytest.raises(ValueError, match="impl is 'flash'.*use flex or blocked"):
        _flash(case, None, FlashAttnStandIn(VERSIONS[-1]))(*inputs)


def _choose(impl: str = "auto", **facts: object) -> str:
    usual = {
        "device": torch.device("cpu"), "dtype": torch.float32, "head_width": 64,
        "softcap": 30.0, "trains": True,
    }  # fmt: skip
    return choose_attention(impl, **{**usual, **facts})


def test_auto_takes_what_is_measured_to_be_fastest_on_cpus() -> None:
    assert _choose() == "blocked"
    assert _choose(dtype=torch.bfloat16, softcap=None, trains=False) == "blocked"


@pytest.mark.parametrize(
    ("impl", "facts", "reason"),
    [
        ("sdpa", {}, "no soft cap"),
        ("flex", {}, "no backward pass on CPUs"),
        ("flash", {}, "CUDA"),
        ("te", {}, "key/value token"),
        ("fused", {}, "choose auto, reference, blocked"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_flag_and_the_reason(
    impl: str, facts: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"--attention-impl is '{impl}'.*{reason}"):
        _choose(impl, **facts)


def test_flex_on_cpus_is_refused_with_gradients_and_allowed_without() -> None:
    assert _choose("flex", trains=False) == "flex"
    inputs = [x.requires_grad_() for x in draw_inputs(CASES["one"], torch.float32)]
    with pytest.raises(ValueError, match="no backward pass on CPUs"):
        attention(*inputs[:3], impl="flex")
    # ... because torch refuses, too.
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        torch_flex.flex_attention(*(x.permute(1, 2, 0, 3) for x in inputs[:3]))


class _Saved:
    """Elements of the distinct storages that autograd keeps."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[Tensor, int]] = {}

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self.storages[storage.data_ptr()] = (x, storage.nbytes() // x.element_size())
        return x

    def total(self) -> int:
        return sum(count for _, count in self.storages.values())


@pytest.mark.parametrize("impl", ["reference", "blocked", "sdpa"])
def test_the_backward_pass_keeps_no_scores(impl: str) -> None:
    """Inputs, output and two numbers per query and head, where the definition keeps all scores."""
    length, heads = 256, 2
    shape = (length, 1, heads, HEAD_WIDTH)
    inputs = [draw_normal(*shape, seed=i).float().requires_grad_() for i in range(3)]
    bias = [draw_normal(heads, HEAD_WIDTH, seed=i).float().requires_grad_() for i in (3, 4)]
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        output = attention(*inputs, k_bias=bias[0], v_bias=bias[1], impl=impl)
    per_query = heads * length
    few = 4 * per_query * HEAD_WIDTH + 2 * per_query + 2 * heads * HEAD_WIDTH
    if impl == "reference":
        assert saved.total() > heads * length**2
    else:
        assert saved.total() <= few < heads * length**2 / 3
    assert output.requires_grad


@pytest.mark.parametrize("length", [256, 512])
def test_blocks_hold_no_tensor_of_all_scores(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: the largest are three buffers of a block, or two sums per key."""
    from tests.kernels.test_bench import AllocationCount

    block = 16 * 512
    monkeypatch.setattr(blocked, "_SCORES_PER_THREAD", block)
    shape = (length, 1, 2, HEAD_WIDTH)
    inputs = [draw_normal(*shape, seed=i).float().requires_grad_() for i in range(3)]
    largest = {}
    for impl in ("blocked", "reference"):
        with AllocationCount() as count:
            attention(*inputs, softcap=3.0, impl=impl).sum().backward()
        largest[impl] = count.largest
    assert largest["reference"] == 2 * length**2
    assert largest["blocked"] <= max(3 * block, 2 * length * 2 * HEAD_WIDTH) < length**2
