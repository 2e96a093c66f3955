"""The laws of the noise, each by counting, and that noise is a function of its key.

Distributions are tested with the bounds of `tests.diffusion.bounds`: one failure in a hundred
thousand per comparison, had the seed been left open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.config import NoiseConfig
from megatron_ext.diffusion import MixingSchedule
from megatron_ext.diffusion.noising import (
    CLEAN_LOG_SNR,
    PUBLISHED_NOISE,
    NoisedSequence,
    noise_for_validation,
    noise_sequence,
    prompt_length,
    validation_log_snr,
)
from tests.diffusion.bounds import assert_mean, assert_share, assert_shares, assert_uniform

MASK_ID, PAD_ID = 3, 2
PLAIN = NoiseConfig(
    p_independent=0.0, p_prompt=0.0, max_empty_fraction=0.0, uniform_noise_includes_mask=True
)
"""Every token is noised, at one log-SNR per sequence."""
EVERYTHING = NoiseConfig(
    p_independent=0.4, p_linear=0.2, p_prompt=0.5, p_infill=0.5, max_empty_fraction=0.3,
    uniform_noise_includes_mask=True,
)  # fmt: skip


def _schedule(shift: float = 0.0, vocab_size: int = 7) -> MixingSchedule:
    return MixingSchedule(vocab_size, MASK_ID, shift)


def _fixed_level(log_snr: float, shift: float, vocab_size: int = 7) -> MixingSchedule:
    """All but one log-SNR cut off: what is left varies by 2e-6."""
    return MixingSchedule(
        vocab_size, MASK_ID, shift, min_log_snr=log_snr - 1e-6, max_log_snr=log_snr + 1e-6
    )


def _sequences(
    num_sequences: int,
    length: int,
    noise: NoiseConfig,
    schedule: MixingSchedule | None = None,
    seed: int = 0,
) -> Iterable[NoisedSequence]:
    tokens = np.resize([0, 1, 4, 5, 6], length)
    for index in range(num_sequences):
        yield noise_sequence(
            tokens, schedule or _schedule(), noise, seed=seed, index=index, empty_token_id=PAD_ID
        )


def _times(log_snr: np.ndarray, schedule: MixingSchedule) -> np.ndarray:
    """Log-SNRs back to times, scaled to [0, 1]."""
    low, high = schedule.time_bounds
    time = 1 / (1 + np.exp(log_snr.astype(np.float64)))
    return np.clip((time - low) / (high - low), 0, 1)


@pytest.mark.parametrize("log_snr", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("shift", [-1000.0, -2.0, 0.0, 2.0, 1000.0])
@pytest.mark.parametrize("includes_mask", [False, True])
def test_corruption_draws_from_the_marginal(
    log_snr: float, shift: float, includes_mask: bool
) -> None:
    """Every id's share: alpha for the token itself, beta s for uniform noise, the rest masks.

    Without the mask this is `schedule.marginal`; with it the uniform part is 1 / v on all ids.
    """
    schedule = _fixed_level(log_snr, shift)
    noise = replace(PLAIN, uniform_noise_includes_mask=includes_mask)
    x0 = 5
    tokens = np.full(60_000, x0)
    result = noise_sequence(tokens, schedule, noise, seed=1, index=int(10 * log_snr) + 99)
    level = torch.tensor(log_snr, dtype=torch.float64)
    if includes_mask:
        alpha, share = schedule.alpha(level).item(), schedule.uniform_share(level).item()
        expected = np.full(7, (1 - alpha) * share / 7)
        expected[MASK_ID] += (1 - alpha) * (1 - share)
        expected[x0] += alpha
    else:
        onehot = torch.eye(7, dtype=torch.float64)[x0]
        expected = schedule.marginal(level, onehot).numpy()
    assert_shares(np.bincount(result.xt, minlength=7), expected)
    assert np.unique(result.xt).max() < 7


def test_pure_noises_never_yield_the_other_kind() -> None:
    for result in _sequences(50, 200, PLAIN, _schedule(-1000.0)):
        assert ((result.xt == result.x0) | (result.xt == MASK_ID)).all()
    without_mask = replace(PLAIN, uniform_noise_includes_mask=False)
    for result in _sequences(50, 200, without_mask, _schedule(1000.0)):
        assert (result.xt != MASK_ID).all()


def test_tokens_are_corrupted_independently() -> None:
    """Given the level, neighbours are kept together as often as independent ones."""
    schedule = _fixed_level(0.4, -1000.0)
    tokens = np.full(60_000, 5)
    kept = noise_sequence(tokens, schedule, PLAIN, seed=2, index=0).xt == 5
    alpha = torch.sigmoid(torch.tensor(0.4)).item()
    assert_share(np.count_nonzero(kept[::2] & kept[1::2]), 30_000, alpha**2)


def test_time_is_uniform_for_the_sequence_and_for_the_token() -> None:
    schedule = _schedule()
    of_sequence = [x.log_snr for x in _sequences(4000, 3, PLAIN)]
    assert all((x == x[0]).all() for x in of_sequence)
    assert_uniform(_times(np.array([x[0] for x in of_sequence]), schedule))
    independent = replace(PLAIN, p_independent=1.0)
    of_token = np.concatenate([x.log_snr for x in _sequences(40, 500, independent)])
    assert_uniform(_times(of_token, schedule))
    assert of_token.dtype == np.float32 and np.abs(of_token).max() <= 9


def test_independent_levels_of_a_sequence_are_uncorrelated() -> None:
    independent = replace(PLAIN, p_independent=1.0)
    times = np.stack([_times(x.log_snr, _schedule()) for x in _sequences(4000, 2, independent)])
    centred = times - 0.5
    assert_mean(centred[:, 0] * centred[:, 1], 0.0)


def test_shares_of_independent_linear_and_common_levels() -> None:
    noise = replace(PLAIN, p_independent=0.3, p_linear=0.2)
    counts = np.zeros(3, dtype=int)
    times = np.linspace(0, 1, 10)[1:-1]
    linear = np.log((1 - times) / times)
    for result in _sequences(6000, 8, noise):
        if np.allclose(result.log_snr, linear, atol=1e-5):
            counts[1] += 1
        elif (result.log_snr == result.log_snr[0]).all():
            counts[2] += 1
        else:
            assert len(np.unique(result.log_snr)) == 8
            counts[0] += 1
    assert_shares(counts, np.array([0.3, 0.2, 0.5]))


def test_linear_levels_stay_in_the_range_of_log_snrs() -> None:
    schedule = MixingSchedule(7, MASK_ID, 0.0, min_log_snr=-2, max_log_snr=3)
    noise = replace(PLAIN, p_independent=0.0, p_linear=1.0)
    result = next(iter(_sequences(1, 300, noise, schedule)))
    assert result.log_snr.max() == 3 and result.log_snr.min() == -2
    assert (np.diff(result.log_snr) <= 0).all()


def test_prompt_length_is_the_number_of_positions_up_to_the_fraction() -> None:
    """Positions i <= f (s - 1): at least one, all for f = 1."""
    for length in (1, 2, 17, 2048):
        for fraction in (0.0, 0.1, 0.5, 0.999, 1.0):
            counted = np.count_nonzero(np.arange(length) <= fraction * (length - 1))
            assert prompt_length(fraction, length) == counted


@pytest.mark.parametrize("max_fraction", [1.0, 0.5])
@pytest.mark.parametrize("law", ["code", "paper"])
def test_prompts_are_as_frequent_and_as_long_as_their_law(law: str, max_fraction: float) -> None:
    """P(f <= u) is (1 - cos(pi u)) / 2 in the code and 1 - cos(u) for u < 1 in the paper."""
    noise = replace(PLAIN, p_prompt=0.25, prompt_length_law=law, max_prompt_fraction=max_fraction)
    length = 9
    counts = np.zeros(length + 1, dtype=int)
    for result in _sequences(12_000, length, noise):
        size = length - np.count_nonzero(result.noise_mask)
        assert result.noise_mask[size:].all(), "a prompt is a head of the sequence"
        assert np.array_equal(result.xt[:size], result.x0[:size])
        assert (result.log_snr[:size] == CLEAN_LOG_SNR).all()
        assert (result.log_snr[size:] <= 9).all()
        counts[size] += 1

    def below(u: float) -> float:
        """P(f < u)."""
        u = min(u, 1.0 + 1e-12)
        if law == "code":
            return (1 - math.cos(math.pi * min(u, 1))) / 2
        return 1.0 if u > 1 else 1 - math.cos(u)

    # A prompt of k tokens or fewer: f max_fraction (length - 1) < k.
    at_most = [below(k / (max_fraction * (length - 1))) for k in range(length)] + [1.0]
    assert_share(counts[0], 12_000, 0.75)
    assert_shares(counts[1:], np.diff(at_most))


def test_a_prompt_of_the_papers_law_is_often_the_whole_sequence() -> None:
    """arccos reaches pi / 2, so P(f = 1) = cos 1: such a sequence has no loss at all."""
    noise = replace(PLAIN, p_prompt=1.0, prompt_length_law="paper")
    clean = sum(not x.noise_mask.any() for x in _sequences(4000, 64, noise))
    assert_share(clean, 4000, math.cos(1))


def test_infilling_leaves_tokens_clean_with_its_share() -> None:
    """Chosen with p_infill; then each token with max f, f of density (pi / 2) sin(pi f)."""
    noise = replace(PLAIN, p_infill=0.4, max_infill_fraction=0.8)
    fractions = []
    for result in _sequences(3000, 400, noise):
        assert np.array_equal(result.xt[~result.noise_mask], result.x0[~result.noise_mask])
        assert (result.log_snr[~result.noise_mask] == CLEAN_LOG_SNR).all()
        fractions.append(1 - result.noise_mask.mean())
    fractions = np.array(fractions)
    # P(f < 1/400) is 1.5e-5, so a sequence without clean tokens was not chosen, nearly always.
    chosen = fractions > 0
    assert_share(np.count_nonzero(chosen), 3000, 0.4)
    assert_mean(fractions[chosen], 0.8 * 0.5)
    second_moment = 0.5 - 2 / math.pi**2
    sampling = (0.8 * 0.5 - 0.8**2 * second_moment) / 400
    assert_mean(fractions[chosen] ** 2, 0.8**2 * second_moment + sampling)


def test_infilling_scatters_over_all_positions() -> None:
    noise = replace(PLAIN, p_infill=1.0)
    clean = np.stack([~x.noise_mask for x in _sequences(4000, 10, noise)])
    for position in range(10):
        # One token's marginal law is Bernoulli(E f), whatever f does.
        assert_share(np.count_nonzero(clean[:, position]), 4000, 0.5)


def test_empty_tokens_are_as_many_as_their_law_and_keep_the_order() -> None:
    """n = ceil(s f / (1 - f)), f ~ U(0, max): P(n <= k) = (k / (s + k)) / max."""
    length, max_fraction = 50, 0.2
    noise = replace(PLAIN, max_empty_fraction=max_fraction)
    tokens = np.arange(10, 60)
    schedule = _schedule(vocab_size=100)
    counts = np.zeros(length + 1, dtype=int)
    positions = np.zeros(length, dtype=int)
    for index in range(6000):
        x0 = noise_sequence(tokens, schedule, noise, seed=0, index=index, empty_token_id=PAD_ID).x0
        is_empty = x0 == PAD_ID
        num_real = length - np.count_nonzero(is_empty)
        assert np.array_equal(x0[~is_empty], tokens[:num_real])
        counts[length - num_real] += 1
        positions += is_empty
    k = np.arange(length + 1)
    at_most = np.minimum(k / (length + k) / max_fraction, 1)
    assert counts[0] == 0, "f is above 0, so there is at least one"
    assert_shares(counts[1:], np.diff(at_most))
    # Given n, every position is empty with n / s; a sum of these has at most this variance.
    mean = positions.sum() / length
    assert np.abs(positions - mean).max() <= 4.5 * math.sqrt(mean)


def test_many_empty_tokens_fill_the_sequence_at_most() -> None:
    noise = replace(PLAIN, max_empty_fraction=0.9)
    full = [x for x in _sequences(200, 10, noise) if (x.x0 == PAD_ID).all()]
    assert full and all(len(x.x0) == 10 for x in full)


def test_empty_tokens_are_ordinary_labels() -> None:
    """They are noised and in the loss."""
    noise = replace(PLAIN, max_empty_fraction=0.5)
    noised = sum(
        np.count_nonzero((x.x0 == PAD_ID) & (x.xt == MASK_ID) & x.noise_mask)
        for x in _sequences(50, 50, noise)
    )
    assert noised > 100


def test_empty_tokens_without_an_id_are_refused() -> None:
    with pytest.raises(ValueError, match="--max-empty-fraction"):
        noise_sequence(np.zeros(4, int), _schedule(), EVERYTHING, seed=0, index=0)


def _bytes(sequence: NoisedSequence) -> list[bytes]:
    return [x.tobytes() for x in sequence]


def test_noise_depends_on_seed_index_and_draw_alone() -> None:
    """Not on the order of the calls, the tokens' dtype, or any generator with state."""
    tokens, schedule = np.resize([0, 1, 4, 5, 6], 64), _schedule()

    def draw(seed: int, index: int, number: int, dtype: type = np.int64) -> list[bytes]:
        return _bytes(
            noise_sequence(
                tokens.astype(dtype), schedule, EVERYTHING,
                seed=seed, index=index, draw=number, empty_token_id=PAD_ID,
            )
        )  # fmt: skip

    keys = [(seed, index, number) for seed in (0, 1) for index in range(8) for number in (0, 1)]
    straight = [draw(*key) for key in keys]
    np.random.seed(5), torch.manual_seed(5)
    backward = [draw(*key, dtype=np.uint16) for key in reversed(keys)]
    assert straight == backward[::-1]
    corrupted = {x[1] for x in straight}
    assert len(corrupted) == len(keys), "another seed, index or draw is another noise"


def test_noise_leaves_the_given_tokens_alone() -> None:
    tokens, documents = np.resize([0, 1, 4, 5, 6], 64), np.repeat([0, 1], 32)
    before = tokens.copy(), documents.copy()
    result = noise_sequence(
        tokens, _schedule(), EVERYTHING, seed=0, index=0, documents=documents, empty_token_id=PAD_ID
    )
    assert np.array_equal(tokens, before[0]) and np.array_equal(documents, before[1])
    assert not any(np.shares_memory(x, y) for x in result for y in (tokens, documents))


BASE = replace(EVERYTHING, p_prompt=0.0, p_infill=0.0, max_empty_fraction=0.0)


def _compare(option: NoiseConfig) -> Iterable[tuple[NoisedSequence, NoisedSequence]]:
    return zip(_sequences(60, 64, BASE), _sequences(60, 64, option), strict=True)


@pytest.mark.parametrize(
    "option",
    [
        replace(BASE, p_prompt=0.7),
        replace(BASE, p_infill=0.7),
        replace(BASE, p_prompt=0.7, prompt_length_law="paper", p_infill=0.7),
    ],
)
def test_prompts_and_infilling_leave_the_remaining_noise_as_it_is(option: NoiseConfig) -> None:
    num_clean = 0
    for without, with_option in _compare(option):
        noised = with_option.noise_mask
        assert np.array_equal(without.xt[noised], with_option.xt[noised])
        assert np.array_equal(without.log_snr[noised], with_option.log_snr[noised])
        num_clean += np.count_nonzero(~noised)
    assert num_clean > 200


def test_empty_tokens_leave_levels_and_corruption_as_they_are() -> None:
    num_changed = 0
    for without, with_option in _compare(replace(BASE, max_empty_fraction=0.3)):
        assert np.array_equal(without.log_snr, with_option.log_snr)
        # Where the clean tokens agree, so do the corrupted ones.
        same = without.x0 == with_option.x0
        assert np.array_equal(without.xt[same], with_option.xt[same])
        # Uniform ids and masks do not depend on the clean token.
        replaced = (without.xt != without.x0) & (with_option.xt != with_option.x0)
        assert np.array_equal(without.xt[replaced], with_option.xt[replaced])
        num_changed += np.count_nonzero(~same)
    assert num_changed > 200


def test_the_laws_of_the_levels_leave_prompts_and_corruption_alone() -> None:
    """Only sequences whose law changes get other levels, and each token keeps its own threshold.

    Under masking a token is kept where its uniform number is below alpha: kept at one level, it
    is kept at every higher one.
    """
    noise = replace(BASE, p_prompt=0.5, p_independent=0.4, p_linear=0.0)
    more = replace(noise, p_independent=0.6)
    num_same, num_higher = 0, 0
    masked = _schedule(-1000.0)
    for a, b in zip(
        _sequences(100, 64, noise, masked), _sequences(100, 64, more, masked), strict=True
    ):
        assert np.array_equal(a.noise_mask, b.noise_mask)
        if np.array_equal(a.log_snr, b.log_snr):
            assert np.array_equal(a.xt, b.xt)
            num_same += 1
        kept_a, kept_b = a.xt == a.x0, b.xt == b.x0
        assert kept_b[kept_a & (b.log_snr >= a.log_snr)].all()
        assert kept_a[kept_b & (a.log_snr >= b.log_snr)].all()
        num_higher += np.count_nonzero(kept_a & (b.log_snr > a.log_snr))
    assert 60 < num_same < 95 and num_higher > 50


def test_repeated_draws_draw_everything_again() -> None:
    """Empty tokens, prompt, infilling and levels, in every one of ten draws of one index."""
    tokens = np.resize([0, 1, 4, 5, 6], 400)
    always = replace(BASE, p_prompt=1.0, p_infill=1.0, max_prompt_fraction=0.5, p_linear=0.0)
    always = replace(always, p_independent=0.0, max_empty_fraction=0.3)
    draws = [
        noise_sequence(
            tokens, _schedule(), always, seed=0, index=3, draw=draw, empty_token_id=PAD_ID
        )
        for draw in range(10)
    ]
    for what in (
        [x.x0.tobytes() for x in draws],
        [x.visibility.tobytes() for x in draws],
        [(x.noise_mask & (x.visibility[0] == 1)).tobytes() for x in draws],
        [x.log_snr.min() for x in draws],
    ):
        assert len(set(what)) == 10


def test_prompts_and_infilling_are_chosen_independently() -> None:
    noise = replace(BASE, p_prompt=0.5, p_infill=0.5, max_prompt_fraction=0.5)
    counts = np.zeros(4, dtype=int)
    for result in _sequences(3000, 300, noise):
        level = result.visibility[0] == 1
        has_prompt, has_infill = not level.all(), (level & ~result.noise_mask).any()
        counts[2 * has_prompt + has_infill] += 1
    assert_shares(counts, np.full(4, 0.25))


def test_including_the_mask_changes_ids_of_uniform_noise_only() -> None:
    num_changed = 0
    for a, b in _compare(replace(BASE, uniform_noise_includes_mask=False)):
        assert np.array_equal(a.log_snr, b.log_snr) and np.array_equal(a.noise_mask, b.noise_mask)
        changed = a.xt != b.xt
        assert (b.xt[changed] != MASK_ID).all()
        num_changed += np.count_nonzero(changed)
    assert num_changed > 100


def test_published_noise_is_what_paper_and_code_did() -> None:
    paper, code = PUBLISHED_NOISE["paper"], PUBLISHED_NOISE["code"]
    assert (paper.p_independent, paper.max_empty_fraction) == (0.5, 0.2)
    assert (code.p_independent, code.max_empty_fraction) == (0.2, 0.0)
    assert (paper.p_prompt, code.p_prompt) == (0.2, 0.2)
    assert (paper.prompt_length_law, code.prompt_length_law) == ("paper", "code")
    assert not paper.uniform_noise_includes_mask and code.uniform_noise_includes_mask


def test_validation_levels_are_stratified_and_uniform() -> None:
    """Draws lie evenly, and over seeds uniformly within their share: means are unbiased."""
    schedule = _schedule()
    levels = [
        validation_log_snr(schedule, seed=0, index=7, draw=draw, num_draws=8) for draw in range(8)
    ]
    times = np.sort(_times(np.array(levels), schedule))
    assert np.allclose(np.diff(times), 1 / 8, atol=1e-6)
    over_seeds = [
        validation_log_snr(schedule, seed=seed, index=7, draw=3, num_draws=8)
        for seed in range(4000)
    ]
    assert_uniform(8 * _times(np.array(over_seeds), schedule) % 1)
    over_indices = [
        validation_log_snr(schedule, seed=0, index=index, draw=0, num_draws=1)
        for index in range(1000)
    ]
    gaps = np.diff(np.sort(_times(np.array(over_indices), schedule)))
    assert gaps.max() < 3 / 1000, "successive sequences fill the range evenly"


def test_validation_noise_is_fixed_and_everywhere() -> None:
    tokens, schedule = np.resize([0, 1, 4, 5, 6], 500), _schedule()

    def draw(index: int, number: int) -> NoisedSequence:
        return noise_for_validation(tokens, schedule, seed=0, index=index, draw=number, num_draws=4)

    keys = [(index, number) for index in range(5) for number in range(4)]
    results, again = ([draw(*key) for key in keys] for _ in range(2))
    assert [_bytes(x) for x in results] == [_bytes(x) for x in again]
    assert len({x.xt.tobytes() for x in results}) == 20
    for (index, number), result in zip(keys, results, strict=True):
        level = validation_log_snr(schedule, seed=0, index=index, draw=number, num_draws=4)
        assert result.noise_mask.all() and (result.log_snr == np.float32(level)).all()
        assert (result.visibility[0] == 1).all() and np.array_equal(result.x0, tokens)
        # At shift 0 the share of uniform noise is alpha itself, and it leaves out the mask.
        alpha = 1 / (1 + math.exp(-result.log_snr[0]))
        kept = alpha + (1 - alpha) * alpha / 6
        assert_share(np.count_nonzero(result.xt == tokens), 500, kept)
        assert_share(np.count_nonzero(result.xt == MASK_ID), 500, (1 - alpha) ** 2)


def test_a_validation_draw_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="4"):
        validation_log_snr(_schedule(), seed=0, index=0, draw=4, num_draws=4)
