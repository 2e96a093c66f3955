"""Ancestral sampling against exact enumeration of the reverse process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.inference.sampling import (
    SamplingConfig,
    draw,
    filtered_probs,
    log_snr_grid,
    sample_ancestral,
    until_end,
)

VOCABULARY, MASK, STEPS = 4, 3, 5


def table_denoiser(ids: Tensor, visibility: Tensor) -> Tensor:
    """Logits that depend on both tokens of a sequence and on the position."""
    del visibility
    table = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 4, 4, VOCABULARY)) * 1.5)
    return torch.stack([table[i, ids[:, 0], ids[:, 1]] for i in range(2)], dim=1).float()


def exact_distribution(schedule: MixingSchedule) -> np.ndarray:
    """[v, v] probabilities of the two final tokens, by multiplying all transitions in float64."""
    states = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    levels = log_snr_grid(schedule, STEPS, "cosine")
    first = schedule.pi(levels[-1])
    state = torch.outer(first, first).reshape(-1)
    logits = table_denoiser(states, states)
    logits[..., MASK] = -torch.inf
    probs = torch.softmax(logits.double(), dim=-1)
    for step in range(STEPS, 0, -1):
        now, after = (levels[i].expand(states.shape) for i in (step, step - 1))
        new = schedule.posterior(probs, states, now, after)
        transition = (new[:, 0, :, None] * new[:, 1, None, :]).reshape(len(states), -1)
        state = state @ transition
    return state.reshape(VOCABULARY, VOCABULARY).numpy()


@pytest.mark.parametrize("shift", [-1000.0, 0.0, 2.0, 1000.0])
def test_samples_follow_the_exact_reverse_process(shift: float) -> None:
    schedule = MixingSchedule(VOCABULARY, MASK, shift)
    count = 20_000
    config = SamplingConfig(steps=STEPS, seed=1)
    samples = sample_ancestral(table_denoiser, schedule, [[]] * count, 2, config)
    expected = exact_distribution(schedule) * count
    observed = np.zeros_like(expected)
    np.add.at(observed, tuple(samples.T.numpy()), 1)
    assert expected.sum() == pytest.approx(count)
    likely = expected > 5
    assert observed[~likely].sum() <= expected[~likely].sum() + 20
    scaled = expected[likely] * observed[likely].sum() / expected[likely].sum()
    assert chisquare(observed[likely], scaled).pvalue > 1e-3


def test_a_sequence_does_not_depend_on_its_batch_and_keeps_its_prompt() -> None:
    schedule = MixingSchedule(VOCABULARY, MASK, 0.0)
    config = SamplingConfig(steps=4, seed=3)
    several = sample_ancestral(table_denoiser, schedule, [[2], [], [1]], 2, config)
    alone = sample_ancestral(table_denoiser, schedule, [[2]], 2, config)
    assert torch.equal(several[:1], alone)
    assert several[0, 0] == 2 and several[2, 0] == 1


def test_filters_keep_the_likeliest_tokens_and_never_the_mask() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05, 100.0]]))
    mask = 4

    def kept(**options: float) -> list[float]:
        probs = filtered_probs(logits.clone(), SamplingConfig(**options), mask)  # type: ignore[arg-type]
        return [round(x, 4) for x in probs[0].tolist()]

    assert kept() == [0.5, 0.3, 0.15, 0.05, 0.0]
    assert kept(top_k=2) == [0.625, 0.375, 0.0, 0.0, 0.0]
    assert kept(top_p=0.79) == [0.625, 0.375, 0.0, 0.0, 0.0]
    assert kept(top_p=0.81) == [0.5263, 0.3158, 0.1579, 0.0, 0.0]
    assert kept(temperature=0.5) == [0.6849, 0.2466, 0.0616, 0.0068, 0.0]


def test_draw_inverts_the_cumulative_distribution_and_skips_impossible_tokens() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(4, 5)
    assert draw(probs, torch.tensor([0.0, 0.2499, 0.25, 0.999999])).tolist() == [1, 1, 3, 3]


def test_text_ends_before_the_first_end_of_document() -> None:
    assert until_end([5, 1, 6, 1, 7], prompt_length=2, eos_token_id=1) == [6]
    assert until_end([5, 1, 6], prompt_length=1, eos_token_id=None) == [1, 6]


@pytest.mark.parametrize("options", [{"steps": 0}, {"temperature": 0.0}, {"top_k": -1}])
def test_settings_without_a_meaning_are_refused_by_name(options: dict) -> None:
    with pytest.raises(ValueError, match="--" + next(iter(options)).replace("_", "-")):
        SamplingConfig(**options)
