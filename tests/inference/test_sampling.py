"""The sampler against exact enumeration of the process it draws from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.hf.sampling_gidd import HOLE, SpecialTokens, Step, sample
from megatron_ext.hf.steps_gidd import (
    SamplingConfig,
    adaptive_step,
    draw,
    filtered_probs,
    noise_from_uniform,
)
from tests.inference.tables import LENGTH, MASK, VOCABULARY, TableDenoiser, exact_distribution


def draw_pairs(schedule: MixingSchedule, count: int, config: SamplingConfig) -> np.ndarray:
    """[v, v] counts of sampled pairs."""
    ids = sample(TableDenoiser(), schedule, [[]] * count, LENGTH, config)
    observed = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(observed, tuple(ids.T.numpy()), 1)
    return observed


def p_value(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square over cells that expect more than 5, the others as one."""
    expected = probabilities * observed.sum()
    likely = expected > 5
    cells = [*observed[likely], observed[~likely].sum()]
    wanted = [*expected[likely], max(expected[~likely].sum(), 1e-9)]
    if wanted[-1] < 5:
        assert cells[-1] <= wanted[-1] + 15
        cells, wanted = cells[:-1], wanted[:-1]
    scale = sum(cells) / sum(wanted)
    return chisquare(cells, [scale * x for x in wanted]).pvalue


@pytest.mark.parametrize("block_length", [1, 2])
@pytest.mark.parametrize("shift", [-1000.0, 0.0, 2.0, 1000.0])
def test_samples_follow_the_exact_reverse_process(shift: float, block_length: int) -> None:
    schedule = MixingSchedule(VOCABULARY, MASK, shift)
    config = SamplingConfig(steps=5, block_length=block_length, max_length=2, seed=1)
    expected = exact_distribution(TableDenoiser().table, schedule, 5, block_length)
    assert expected.sum() == pytest.approx(1)
    observed = draw_pairs(schedule, 6_000, config)
    assert p_value(observed, expected) > 1e-3
    flatter = exact_distribution(TableDenoiser().table * 0.8, schedule, 5, block_length)
    assert p_value(observed, flatter) < 1e-3, "the test must tell temperatures apart"


@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1000.0])
def test_more_steps_approach_the_distribution_of_the_data(shift: float) -> None:
    """The exact denoiser of a correlated pair: few steps miss the correlation, many find it."""
    data = np.zeros((VOCABULARY, VOCABULARY))
    data[:3, :3] = [[0.4, 0.05, 0.0], [0.05, 0.3, 0.0], [0.0, 0.05, 0.15]]
    schedule = MixingSchedule(VOCABULARY, MASK, shift)

    def distance(steps: int) -> float:
        found = _exact_reverse(data, schedule, steps)
        return float(np.abs(found - data).sum() / 2)

    distances = [distance(steps) for steps in (1, 4, 16, 64)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.03 < distances[0]


def _exact_reverse(data: np.ndarray, schedule: MixingSchedule, steps: int) -> np.ndarray:
    """Final distribution of the reverse chain whose denoiser knows `data` and the noise level.

    The ideal prediction for a token is its distribution given the *other* noised tokens: what the
    token itself shows enters through the posterior's formula.
    """
    from megatron_ext.hf.steps_gidd import log_snr_grid

    states = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    levels = log_snr_grid(schedule, steps, "cosine")
    first = schedule.pi(torch.tensor(levels[-1], dtype=torch.float64))
    state = torch.outer(first, first).reshape(-1)
    clean = torch.from_numpy(data)
    eye = torch.eye(VOCABULARY, dtype=torch.float64)
    for step in range(steps, 0, -1):
        now, after = (torch.full(states.shape, levels[i]).double() for i in (step, step - 1))
        likelihood = schedule.marginal(now[0, 0].expand(VOCABULARY), eye)
        at_first, at_second = (likelihood[:, states[:, i]].T for i in range(LENGTH))
        probs = torch.stack([at_second @ clean.T, at_first @ clean], dim=1)
        # A neighbour that data and noise cannot make says nothing.
        total = probs.sum(-1, keepdim=True)
        probs = torch.where(total > 0, probs / total.clamp_min(1e-300), 1 / VOCABULARY)
        moves = schedule.posterior(probs, states, now, after)
        transition = moves[:, 0, :, None] * moves[:, 1, None, :]
        state = state @ transition.reshape(len(states), -1)
    return state.reshape(VOCABULARY, VOCABULARY).numpy()


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_a_sequence_depends_on_its_number_alone_and_keeps_its_prompt(shift: float) -> None:
    schedule = MixingSchedule(VOCABULARY, MASK, shift)
    config = SamplingConfig(steps=2, max_length=1, seed=3)
    prompts, rows = [[i % 3] for i in range(40)], [7 * i for i in range(40)]
    several = sample(TableDenoiser(), schedule, prompts, LENGTH, config, rows=rows)
    backwards = sample(
        TableDenoiser(), schedule, prompts[20:][::-1], LENGTH, config, rows=rows[20:][::-1]
    )
    assert torch.equal(several[20:], backwards.flip(0))
    assert several[:, 0].tolist() == [prompt[0] for prompt in prompts]
    by_place = sample(TableDenoiser(), schedule, prompts, LENGTH, config)
    assert not torch.equal(several, by_place)
    assert torch.equal(several[:1], by_place[:1])
    with pytest.raises(ValueError, match="rows has 40 numbers for 1 prompts"):
        sample(TableDenoiser(), schedule, [[0]], LENGTH, config, rows=rows)


def test_equal_gains_are_settled_by_position_whatever_stands_behind() -> None:
    """The last block of a row whose context ends is as long as that of a longer row beside it."""
    schedule = MixingSchedule(VOCABULARY, MASK, 1000.0)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    logits = torch.tensor([4.0, 0.0, 0.0, -torch.inf]).expand(1, 16, -1)
    uniform = torch.full((1, 16, 3), 0.9999)
    config = SamplingConfig(method="adaptive", tokens_per_step=3)
    is_fixed = torch.arange(16)[None] >= 5
    for length in (5, 16):
        new, gain = adaptive_step(
            logits[:, :length], ids[:, :length], schedule, 0.0, uniform[:, :length], config,
            is_fixed[:, :length],
        )  # fmt: skip
        assert gain[:, :5].unique().numel() == 1
        assert torch.nonzero(new[0]).flatten().tolist() == [0, 1, 2]


def test_a_fixed_token_behind_a_hole_stays_and_the_hole_is_filled() -> None:
    schedule = MixingSchedule(VOCABULARY, MASK, -1000.0)
    for method in ("ancestral", "adaptive"):
        config = SamplingConfig(steps=4, max_length=2, seed=0, method=method)  # type: ignore[arg-type]
        ids = sample(TableDenoiser(), schedule, [[HOLE, 1]] * 20, LENGTH, config)
        assert (ids[:, 1] == 1).all()
        assert (ids[:, 0] != MASK).all()


def test_a_filled_hole_follows_the_conditional_distribution() -> None:
    """With the second token fixed, masked diffusion draws the first from one prediction."""
    schedule = MixingSchedule(VOCABULARY, MASK, -1000.0)
    table = TableDenoiser().table
    config = SamplingConfig(steps=3, max_length=2, seed=5)
    ids = sample(TableDenoiser(), schedule, [[HOLE, 2]] * 3000, LENGTH, config)
    logits = table[0, MASK, 2].double()
    logits[MASK] = -torch.inf
    expected = torch.softmax(logits, -1)[:3].numpy() * len(ids)
    # A step's last noise level leaves a mask with probability 1e-4; such rows are not compared.
    observed = np.bincount(ids[:, 0].numpy(), minlength=VOCABULARY)[:3]
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_a_step_that_changes_nothing_reuses_its_logits() -> None:
    schedule = MixingSchedule(VOCABULARY, MASK, -1000.0)
    denoiser, seen = TableDenoiser(), []
    config = SamplingConfig(steps=50, max_length=2, seed=0)
    sample(denoiser, schedule, [[]], LENGTH, config, observer=seen.append)
    ids = [step.ids for step in seen]
    changes = sum(not torch.equal(a, b) for a, b in zip(ids, ids[1:], strict=False))
    assert len(seen) == 50
    assert denoiser.calls <= changes + 2 < 10


def test_correction_steps_repair_a_token_that_the_model_finds_wrong() -> None:
    """The model wants token 0 beside anything: after correction nothing else is left."""
    table = torch.zeros(LENGTH, 4, 4, VOCABULARY)
    table[..., 0] = 3.0
    schedule = MixingSchedule(VOCABULARY, MASK, 1000.0)

    def wrong(correction_steps: int) -> int:
        config = SamplingConfig(
            steps=1, max_length=2, seed=0, correction_steps=correction_steps
        )  # fmt: skip
        ids = sample(TableDenoiser(table), schedule, [[]] * 400, LENGTH, config)
        return int((ids != 0).sum())

    assert wrong(0) > 40
    assert wrong(8) < wrong(0) / 2
    with pytest.raises(ValueError, match="correction_steps"):
        masked = MixingSchedule(VOCABULARY, MASK, -1000.0)
        sample(TableDenoiser(), masked, [[]], LENGTH, SamplingConfig(correction_steps=1))


def test_text_ends_at_the_first_end_of_document_and_not_before_the_minimum() -> None:
    table = torch.zeros(LENGTH, 4, 4, VOCABULARY)
    eos = 1
    table[0, ..., eos] = 50.0
    table[1, ..., 2] = 50.0
    schedule = MixingSchedule(VOCABULARY, MASK, -1000.0)
    special = SpecialTokens(eos=eos, pad=0)
    options = {"steps": 8, "max_length": 2, "method": "adaptive", "temperature": 0.0}
    ended = sample(TableDenoiser(table), schedule, [[]], LENGTH, SamplingConfig(**options), special)
    assert ended.tolist() == [[0, 0]]
    longer = SamplingConfig(**options, min_length=1)
    ids = sample(TableDenoiser(table), schedule, [[]], LENGTH, longer, special)
    assert ids[0, 1] == 2 and ids[0, 0] not in (eos, MASK)


def test_generation_stops_when_every_row_has_ended() -> None:
    table = torch.zeros(LENGTH, 4, 4, VOCABULARY)
    table[..., 1] = 50.0
    schedule = MixingSchedule(VOCABULARY, MASK, -1000.0)
    seen: list[Step] = []
    config = SamplingConfig(steps=3, max_length=2, block_length=1)
    special = SpecialTokens(eos=1, pad=0)
    sample(TableDenoiser(table), schedule, [[]], LENGTH, config, special, observer=seen.append)
    assert {step.block for step in seen} == {0}


def test_filters_keep_the_likeliest_tokens() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def kept(**options: float) -> list[float]:
        probs = filtered_probs(logits.clone(), SamplingConfig(**options))  # type: ignore[arg-type]
        return [round(x, 4) for x in probs[0].tolist()]

    assert kept() == [0.5, 0.3, 0.15, 0.05]
    assert kept(top_k=2) == [0.625, 0.375, 0.0, 0.0]
    assert kept(top_p=0.79) == [0.625, 0.375, 0.0, 0.0]
    assert kept(top_p=0.81) == [0.5263, 0.3158, 0.1579, 0.0]
    assert kept(temperature=0.5) == [0.6849, 0.2466, 0.0616, 0.0068]
    assert kept(temperature=0.0) == [1.0, 0.0, 0.0, 0.0]


def test_draw_inverts_the_cumulative_distribution_and_skips_impossible_tokens() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(4, 5)
    assert draw(probs, torch.tensor([0.0, 0.2499, 0.25, 0.999999])).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("shift", [-1000.0, -0.5, 1000.0])
def test_noise_follows_the_mixing_distribution(shift: float) -> None:
    schedule = MixingSchedule(5, 2, shift)
    ids = noise_from_uniform(schedule, 0.7, torch.linspace(0, 1, 10001, dtype=torch.float64)[:-1])
    found = np.bincount(ids.numpy(), minlength=5) / 10_000
    np.testing.assert_allclose(found, schedule.pi(torch.tensor(0.7)).numpy(), atol=2e-4)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"temperature": -1.0}, {"top_k": -1}, {"method": "x"}, {"grid": "y"}]
)
def test_settings_without_a_meaning_are_refused_by_name(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingConfig(**options)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    schedule = MixingSchedule(VOCABULARY, MASK, 0.0)
    with pytest.raises(ValueError, match="no room"):
        sample(TableDenoiser(), schedule, [[0, 1]], LENGTH, SamplingConfig())
