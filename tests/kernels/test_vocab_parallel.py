"""Losses with the vocabulary split on tensor-parallel ranks equal the unsplit ones.

Every case runs in one spawn per number of ranks. The oracle is the unsplit loss in float64: the
dense definition for the diffusion loss, torch's cross-entropy for the other. Sizes are chosen so
that there are padding columns, and in one case a rank that holds nothing else.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.diffusion import MixingSchedule, dense_gidd_loss
from megatron_ext.kernels.cross_entropy import linear_cross_entropy
from megatron_ext.kernels.gidd_loss import gidd_loss, linear_gidd_loss
from megatron_ext.kernels.vocabulary.split_softmax import VocabSlice
from tests.distributed import run_ranks
from tests.kernels.samples import MASK_ID, Tokens, draw_normal, draw_tokens

NUM_TOKENS, WIDTH, SCALE, BETA_IS = 37, 6, 1.3, 0.7
CASES = [(29, 32, -1000.0), (29, 32, 0.0), (60, 128, 0.0), (60, 128, 1000.0), (90, 128, 0.0)]
"""Vocabulary, its padded size, mixing shift. 60 of 128 leave rank 1 of 2 nothing but padding, and
90 of 128 rank 3 of 4."""


def _case(vocab_size: int, padded_size: int, shift: float) -> tuple:
    schedule = MixingSchedule(vocab_size, MASK_ID, shift)
    tokens = draw_tokens(schedule, NUM_TOKENS, seed=vocab_size)
    hidden = draw_normal(NUM_TOKENS, WIDTH, seed=1)
    weight = draw_normal(padded_size, WIDTH, seed=2, scale=2)
    upstream = draw_normal(NUM_TOKENS, seed=3)
    return schedule, tokens, hidden, weight, upstream


def _targets(tokens: Tokens) -> Tensor:
    ignored = torch.arange(NUM_TOKENS) % 4 == 0
    return torch.where(ignored, -1, tokens.x0)


def _losses_of_rank(rank: int) -> dict[tuple, list[Tensor]]:
    """Losses and gradients of this rank, by case and form."""
    group = torch.distributed.group.WORLD
    results = {}
    for case in CASES:
        schedule, tokens, hidden, weight, upstream = _case(*case)
        rows = weight.chunk(group.size())[rank]
        for impl in ("chunked", "reference"):
            columns = (SCALE * hidden @ rows.t()).requires_grad_()
            losses = gidd_loss(
                columns, *tokens, schedule, tp_group=group, beta_is=BETA_IS, impl=impl
            )
            (losses.loss * upstream).sum().backward()
            results[case, impl] = [*losses, columns.grad]
            for is_partial in (False, True):
                leaves = hidden.clone().requires_grad_(), rows.clone().requires_grad_()
                losses = linear_gidd_loss(
                    *leaves, *tokens, schedule, logit_scale=SCALE, tp_group=group,
                    beta_is=BETA_IS, chunk_size=20, partial_hidden_grad=is_partial, impl=impl,
                )  # fmt: skip
                (losses.loss * upstream).sum().backward()
                key = case, impl, "partial" if is_partial else "summed"
                results[key] = [*losses, *(x.grad for x in leaves)]
        leaves = hidden.clone().requires_grad_(), rows.clone().requires_grad_()
        nll = linear_cross_entropy(
            *leaves, _targets(tokens), schedule.vocab_size, logit_scale=SCALE,
            excluded_id=MASK_ID, tp_group=group, chunk_size=20,
        )  # fmt: skip
        (nll * upstream).sum().backward()
        results[case, "cross_entropy"] = [nll, *(x.grad for x in leaves)]
    return results


def _refusal_of_rank(rank: int) -> str:
    with pytest.raises(ValueError) as refusal:
        VocabSlice.of(
            28 // torch.distributed.get_world_size(), 29, None, torch.distributed.group.WORLD
        )
    return str(refusal.value)


def _everything_of_rank(rank: int) -> tuple[dict[tuple, list[Tensor]], str]:
    return _losses_of_rank(rank), _refusal_of_rank(rank)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_losses_split_on_the_vocabulary_equal_the_unsplit_ones(num_ranks: int) -> None:
    ranks, refusals = zip(*run_ranks(num_ranks, _everything_of_rank), strict=True)
    for case in CASES:
        schedule, tokens, hidden, weight, upstream = _case(*case)
        hidden.requires_grad_(), weight.requires_grad_()
        logits = SCALE * hidden @ weight.t()
        logits.retain_grad()
        losses = dense_gidd_loss(logits, *tokens, schedule, BETA_IS)
        (losses.loss * upstream).sum().backward()
        for impl in ("chunked", "reference"):
            of_logits = [rank[case, impl] for rank in ranks]
            _assert_same_everywhere(of_logits, [*losses])
            _assert_equal(torch.cat([x[4] for x in of_logits], dim=-1), logits.grad)
            for form in ("summed", "partial"):
                fused = [rank[case, impl, form] for rank in ranks]
                _assert_same_everywhere(fused, [*losses])
                hidden_grads = [x[4] for x in fused]
                if form == "partial":
                    hidden_grads = [torch.stack(hidden_grads).sum(0)]
                for grad in hidden_grads:
                    _assert_equal(grad, hidden.grad)
                _assert_equal(torch.cat([x[5] for x in fused]), weight.grad)
        _assert_cross_entropy([rank[case, "cross_entropy"] for rank in ranks], case)
    for refusal in refusals:
        assert f"{num_ranks} ranks" in refusal and "29" in refusal


def _assert_cross_entropy(of_ranks: list[list[Tensor]], case: tuple) -> None:
    schedule, tokens, hidden, weight, upstream = _case(*case)
    hidden.requires_grad_(), weight.requires_grad_()
    logits = SCALE * hidden @ weight[: schedule.vocab_size].t()
    logits = logits.index_fill(-1, torch.tensor([MASK_ID]), -torch.inf)
    nll = torch.nn.functional.cross_entropy(
        logits, _targets(tokens), ignore_index=-1, reduction="none"
    )
    (nll * upstream).sum().backward()
    _assert_same_everywhere(of_ranks, [nll])
    for of_rank in of_ranks:
        _assert_equal(of_rank[1], hidden.grad)
    _assert_equal(torch.cat([x[2] for x in of_ranks]), weight.grad)


def _assert_same_everywhere(of_ranks: list[list[Tensor]], truth: list[Tensor]) -> None:
    for of_rank in of_ranks:
        for ours, first, exact in zip(of_rank, of_ranks[0], truth, strict=False):
            assert torch.equal(ours, first), "every rank must hold the same bits"
            _assert_equal(ours, exact)


def _assert_equal(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours, exact.detach(), rtol=1e-9, atol=1e-10)
