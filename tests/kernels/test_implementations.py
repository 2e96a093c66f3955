"""Every implementation of the passes over the vocabulary gives the same losses and gradients.

The oracle is the dense definition in float64 (torch's cross-entropy for the autoregressive loss);
allowed is twice what the dense form loses in the dtype plus one rounding. Triton's kernels run in
its interpreter, and are compiled for GPUs that are not here.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.diffusion import MixingSchedule
from megatron_ext.kernels.cross_entropy import linear_cross_entropy
from megatron_ext.kernels.gidd_loss import gidd_loss, linear_gidd_loss
from megatron_ext.kernels.vocabulary.passes import choose
from tests.distributed import run_ranks
from tests.kernels.samples import (
    MASK_ID,
    Tokens,
    assert_as_close_as_reference,
    draw_normal,
    draw_tokens,
)

IMPLEMENTATIONS = ["chunked", "compiled", "triton"]
DTYPES = [torch.float32, torch.bfloat16]
SHIFTS = [-1000.0, 0.0, 1000.0]


def _of_logits(logits: Tensor, tokens: Tokens, schedule: MixingSchedule, impl: Any) -> list[Tensor]:
    logits = logits.clone().requires_grad_()
    losses = gidd_loss(logits, *tokens, schedule, beta_is=0.7, impl=impl)
    (losses.loss * draw_normal(len(tokens.xt), seed=99).to(losses.loss.dtype)).sum().backward()
    return [*losses, logits.grad]


def _in(dtype: torch.dtype, tokens: Tokens) -> Tokens:
    return tokens._replace(log_snr=tokens.log_snr.to(dtype))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(17, 5), (63, 97), (127, 151), (9, 9001)])
def test_losses_of_logits_are_the_definitions(
    num_tokens: int, vocab_size: int, shift: float, dtype: torch.dtype, impl: Any
) -> None:
    schedule = MixingSchedule(vocab_size, MASK_ID, shift)
    tokens = draw_tokens(schedule, num_tokens, seed=8)
    logits = draw_normal(num_tokens, vocab_size + 3, seed=9, scale=2).to(dtype)
    truth = _of_logits(logits.double(), tokens, schedule, "reference")
    rounded = _in(torch.float32, tokens)
    reference = _of_logits(logits, rounded, schedule, "reference")
    got = _of_logits(logits, rounded, schedule, impl)
    assert_as_close_as_reference(got[:4], reference[:4], truth[:4], torch.float32)
    assert_as_close_as_reference(got[4:], reference[4:], truth[4:], dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_token_alone_has_the_loss_that_it_has_in_company(impl: Any) -> None:
    schedule = MixingSchedule(97, MASK_ID, 0.0)
    tokens = _in(torch.float32, draw_tokens(schedule, 12, seed=8))
    logits = draw_normal(12, 97, seed=9, scale=2).float()
    together = gidd_loss(logits, *tokens, schedule, impl=impl)
    for i in range(12):
        alone = gidd_loss(logits[i : i + 1], *(x[i : i + 1] for x in tokens), schedule, impl=impl)
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[i], rtol=1e-6, atol=0)


def _of_hidden(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor,
    tokens: Tokens,
    schedule: MixingSchedule,
    *,
    factor: float = 0.3,
    **options: Any,
) -> list[Tensor]:
    """Losses and gradients of `factor` times their sum."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = linear_gidd_loss(*leaves, *tokens, schedule, logit_scale=0.5, **options)
    (factor * losses.loss.sum()).backward()
    return [*losses, *(x.grad for x in leaves)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("summed", [False, True])
def test_losses_fused_with_the_head_are_the_definitions(
    summed: bool, shift: float, dtype: torch.dtype, impl: Any
) -> None:
    schedule = MixingSchedule(97, MASK_ID, shift)
    tokens = draw_tokens(schedule, 127, seed=8)
    hidden = draw_normal(127, 32, seed=10).to(dtype)
    weight = draw_normal(100, 32, seed=11, scale=0.4).to(dtype)
    truth = _of_hidden(hidden.double(), weight.double(), tokens, schedule, impl="reference")
    rounded = _in(torch.float32, tokens)
    reference = _of_hidden(hidden, weight, rounded, schedule, impl="reference")
    got = _of_hidden(hidden, weight, rounded, schedule, impl=impl, summed=summed, chunk_size=48)
    assert_as_close_as_reference(got, reference, truth, dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("summed", [False, True])
def test_cross_entropy_is_torchs(summed: bool, dtype: torch.dtype, impl: Any) -> None:
    hidden = draw_normal(63, 32, seed=10).to(dtype)
    weight = draw_normal(100, 32, seed=11, scale=0.4).to(dtype)
    targets = torch.where(torch.arange(63) % 7 == 0, -1, torch.arange(63) + MASK_ID + 1)

    def ours() -> list[Tensor]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        nll = linear_cross_entropy(
            *leaves, targets, 97, excluded_id=MASK_ID, chunk_size=20, summed=summed, impl=impl
        )
        nll.sum().backward()
        return [nll, *(x.grad for x in leaves)]

    def torchs(exact: torch.dtype) -> list[Tensor]:
        leaves = [x.to(exact).detach().clone().requires_grad_() for x in (hidden, weight)]
        logits = leaves[0] @ leaves[1][:97].t()
        logits = logits.index_fill(-1, torch.tensor([MASK_ID]), -torch.inf)
        nll = torch.nn.functional.cross_entropy(
            logits.to(torch.promote_types(exact, torch.float32)), targets, ignore_index=-1,
            reduction="none",
        )  # fmt: skip
        nll.sum().backward()
        return [nll, *(x.grad for x in leaves)]

    assert_as_close_as_reference(ours(), torchs(dtype), torchs(torch.float64), dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_no_tokens_and_no_noised_token(shift: float, impl: Any) -> None:
    schedule = MixingSchedule(29, MASK_ID, shift)
    nothing = _in(torch.float32, draw_tokens(schedule, 0))
    hidden, weight = draw_normal(0, 8, seed=1).float(), draw_normal(29, 8, seed=2).float()
    *losses, grad_hidden, grad_weight = _of_hidden(
        hidden, weight, nothing, schedule, impl=impl, summed=True
    )
    assert all(x.shape == (0,) for x in losses) and grad_hidden.shape == (0, 8)
    assert grad_weight.shape == (29, 8) and not grad_weight.any()
    x0 = torch.arange(4, 24)
    kept = Tokens(x0, x0, torch.linspace(-9, 9, 20))
    logits = draw_normal(20, 29, seed=3).float()
    got, reference = (_of_logits(logits, kept, schedule, x) for x in (impl, "reference"))
    truth = _of_logits(logits.double(), _in(torch.float64, kept), schedule, "reference")
    assert_as_close_as_reference(got, reference, truth, torch.float32)


def test_a_clean_token_that_is_the_mask_has_no_gradient_at_the_mask() -> None:
    """The mask has no probability, so no logit moves it; the dense form agrees."""
    for shift in (0.0, 1000.0):
        schedule = MixingSchedule(29, MASK_ID, shift)
        tokens = Tokens(torch.tensor([7]), torch.tensor([MASK_ID]), torch.zeros(1).double())
        logits = draw_normal(1, 29, seed=3)
        got = _of_logits(logits, tokens, schedule, "chunked")[4]
        want = _of_logits(logits, tokens, schedule, "reference")[4]
        assert got[0, MASK_ID] == 0
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_broken_promise_to_add_the_losses_up_raises(impl: Any) -> None:
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    tokens = _in(torch.float32, draw_tokens(schedule, 5))
    hidden, weight = draw_normal(5, 8, seed=1).float(), draw_normal(29, 8, seed=2).float()
    losses = linear_gidd_loss(
        hidden.requires_grad_(), weight, *tokens, schedule, impl=impl, summed=True
    )
    with pytest.raises(RuntimeError, match="announced as summed"):
        (losses.loss * torch.arange(5)).sum().backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("summed", [False, True])
def test_the_weights_gradient_is_added_to_what_was_there(
    summed: bool, dtype: torch.dtype, impl: Any
) -> None:
    """As megatron-core keeps it over micro-batches, in float32."""
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    tokens = _in(torch.float32, draw_tokens(schedule, 50, seed=8))
    hidden, weight = draw_normal(50, 8, seed=1).to(dtype), draw_normal(29, 8, seed=2).to(dtype)
    options = {
        "impl": impl, "summed": summed, "chunk_size": 20, "factor": 1.0 if summed else 0.3,
    }  # fmt: skip
    *losses, grad_hidden, grad_weight = _of_hidden(hidden, weight, tokens, schedule, **options)
    before = draw_normal(29, 8, seed=3).float()
    total = before.clone()
    *again, hidden_again, unused = _of_hidden(
        hidden, weight, tokens, schedule, weight_grad=total, **options
    )
    assert unused.shape == weight.shape and unused.dtype == dtype
    assert all(map(torch.equal, (*again, hidden_again), (*losses, grad_hidden)))
    torch.testing.assert_close(
        total - before, grad_weight.float(), rtol=torch.finfo(dtype).eps, atol=2e-6
    )


def test_a_gradient_added_ahead_takes_no_factor() -> None:
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    tokens = _in(torch.float32, draw_tokens(schedule, 5))
    hidden, weight = draw_normal(5, 8, seed=1).float(), draw_normal(29, 8, seed=2).float()
    losses = linear_gidd_loss(
        hidden.requires_grad_(), weight, *tokens, schedule, summed=True, weight_grad=0 * weight
    )
    with pytest.raises(RuntimeError, match="not 1"):
        (2 * losses.loss).sum().backward()
    with pytest.raises(ValueError, match="does not add to weight_grad"):
        linear_gidd_loss(
            hidden, weight, *tokens, schedule, impl="reference", weight_grad=0 * weight
        )


@pytest.mark.parametrize("where", [0, 3])
def test_a_nan_from_upstream_reaches_every_gradient(where: int) -> None:
    schedule = MixingSchedule(29, MASK_ID, 0.0)
    tokens = _in(torch.float32, draw_tokens(schedule, 5))
    leaves = [draw_normal(n, 8, seed=n).float().requires_grad_() for n in (5, 29)]
    losses = linear_gidd_loss(*leaves, *tokens, schedule, summed=True)
    factors = torch.ones(5)
    factors[where] = torch.nan
    (losses.loss * factors).sum().backward()
    assert all(leaf.grad.isnan().all() for leaf in leaves)


def _split_losses_of_rank(rank: int) -> dict[tuple, list[Tensor]]:
    group = torch.distributed.group.WORLD
    schedule, tokens, hidden, weight = _split_case()
    rows = weight.chunk(group.size())[rank]
    results = {}
    for impl, dtype in _split_implementations(group.size()):
        results[impl, dtype] = _of_hidden(
                hidden.to(dtype), rows.to(dtype), _in(torch.float32, tokens), schedule,
                impl=impl, summed=True, chunk_size=20, tp_group=group,
            )  # fmt: skip
    return results


def _split_implementations(num_ranks: int) -> list[tuple[str, torch.dtype]]:
    """Every rank compiles for itself, which takes time: one dtype at one size is enough."""
    plain = [(impl, dtype) for impl in ("chunked", "triton") for dtype in DTYPES]
    return [*plain, ("compiled", torch.bfloat16)] if num_ranks == 2 else plain


def _split_case() -> tuple[MixingSchedule, Tokens, Tensor, Tensor]:
    """90 of 128 leave rank 3 of 4 nothing but padding."""
    schedule = MixingSchedule(90, MASK_ID, 0.0)
    hidden, weight = draw_normal(37, 16, seed=1), draw_normal(128, 16, seed=2, scale=0.5)
    return schedule, draw_tokens(schedule, 37), hidden.bfloat16(), weight.bfloat16()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_split_losses_lose_no_more_than_the_unsplit_definition(num_ranks: int) -> None:
    schedule, tokens, hidden, weight = _split_case()
    truth = _of_hidden(hidden.double(), weight.double(), tokens, schedule, impl="reference")
    ranks = run_ranks(num_ranks, _split_losses_of_rank)
    for impl, dtype in _split_implementations(num_ranks):
        reference = _of_hidden(
            hidden.to(dtype), weight.to(dtype), _in(torch.float32, tokens), schedule,
            impl="reference",
        )  # fmt: skip
        # Ranks round their shares of the hidden gradient each.
        reference[4] = _twice_the_error(reference[4], truth[4])
        of_ranks = [rank[impl, dtype] for rank in ranks]
        grad_weight = torch.cat([x[5] for x in of_ranks])
        for losses in of_ranks:
            assert_as_close_as_reference([*losses[:5], grad_weight], reference, truth, dtype)


def _twice_the_error(x: Tensor, truth: Tensor) -> Tensor:
    return truth + 2 * (x.double() - truth)


def test_the_choice_is_the_fastest_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, single = torch.device("cpu"), torch.device("cuda"), torch.float32
    assert choose("auto", cpu, single, 131072) == "compiled"
    assert choose("auto", cpu, single, 4096) == "chunked"
    assert choose("auto", cpu, torch.float64, 131072) == "chunked"
    assert choose("auto", gpu, single, 4096) == "triton"
    assert choose("reference", gpu, single, 4096) == "reference"
    monkeypatch.setenv("PATH", "")
    assert choose("auto", cpu, single, 131072) == "chunked"
    with pytest.raises(ValueError, match=r"--loss-impl is compiled.*g\+\+"):
        choose("compiled", cpu, single, 97)
    with pytest.raises(ValueError, match="--loss-impl is triton.*float64"):
        choose("triton", gpu, torch.float64, 97)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="--loss-impl is triton.*need a GPU"):
        choose("triton", cpu, single, 97)


def test_triton_kernels_compile_for_gpus_without_spilling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    command = [sys.executable, "-m", "megatron_ext.kernels.vocabulary.ahead_of_time"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = re.findall(r"\| (fp32|bf16) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", table)
    assert len(rows) == 4 * 2 * 3 and {int(row[1]) for row in rows} == {80, 90, 100}
    for _, _, registers, spilled, _ in rows:
        # 256 threads of at most 128 registers: two programs and more share a multiprocessor.
        assert 16 <= int(registers) <= 128 and int(spilled) == 0
