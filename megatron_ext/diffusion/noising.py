"""From clean tokens to what the model sees: the noise of a sequence, drawn before the model.

One sequence at a time, numpy in and numpy out, a pure function of (seed, index, draw):

    empty tokens   inserted among the labels, the tail cut off
    prompt         a clean head of the sequence; decides which positions see which
    infilling      scattered clean tokens; visibility stays as the prompt made it
    log-SNR        independent per token, linear along the sequence, or one for the sequence
    corruption     x ~ q_lambda(. | x0) = alpha onehot(x0) + (1 - alpha) pi_lambda

(arXiv 2512.10858, section 3). Each step reads its own stream (`diffusion.random.Purpose`), so an
option of one step leaves the draws of the others as they are: a run with prompts and one without
corrupt the same tokens in the same way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from megatron_ext.config import NoiseConfig
from megatron_ext.diffusion.random import Purpose, generator
from megatron_ext.diffusion.schedule import MixingSchedule

CLEAN_LOG_SNR = 10.0
"""Log-SNR reported for positions without noise; they are not in the loss."""

PUBLISHED_NOISE = {
    "paper": NoiseConfig(
        p_independent=0.5,
        max_empty_fraction=0.2,
        prompt_length_law="paper",
        uniform_noise_includes_mask=False,
    ),
    "code": NoiseConfig(
        p_independent=0.2,
        max_empty_fraction=0.0,
        prompt_length_law="code",
        uniform_noise_includes_mask=True,
    ),
}
"""What the paper's text says, and what the code that produced its results does."""

_GOLDEN_STEP = 0x9E3779B97F4A7C15
"""2^64 (sqrt(5) - 1) / 2, rounded: multiples of it spread evenly modulo 2^64."""


class NoisedSequence(NamedTuple):
    """A training example; all arrays are new and own their memory."""

    x0: np.ndarray
    """[s] int64, clean tokens with the empty ones among them."""
    xt: np.ndarray
    """[s] int64, the model's input; equals `x0` where `noise_mask` is false."""
    log_snr: np.ndarray
    """[s] float32, noise level; `CLEAN_LOG_SNR` where `noise_mask` is false."""
    noise_mask: np.ndarray
    """[s] bool, positions that were exposed to noise, which are those in the loss."""
    visibility: np.ndarray
    """[2, s] int32, level and document of each position (`diffusion.visibility`)."""


def noise_sequence(
    tokens: np.ndarray,
    schedule: MixingSchedule,
    noise: NoiseConfig,
    *,
    seed: int,
    index: int,
    draw: int = 0,
    documents: np.ndarray | None = None,
    empty_token_id: int | None = None,
) -> NoisedSequence:
    """Noise the sequence with global sample index `index`.

    `tokens` [s] are ids of any integer dtype. `documents` [s] numbers the document of each token
    and confines attention to it; absent, all positions are one document. An inserted empty token
    belongs to the document of the token before it. `draw` numbers repeated draws for one index.
    Raises `ValueError` where `--max-empty-fraction` asks for empty tokens and `empty_token_id`
    is absent.
    """
    x0 = np.array(tokens, dtype=np.int64)
    length = len(x0)
    if noise.max_empty_fraction > 0:
        if empty_token_id is None:
            raise ValueError(
                f"--max-empty-fraction is {noise.max_empty_fraction}: there is no token to insert. "
                "Give --pad-token-id, or --max-empty-fraction 0."
            )
        numbers = generator(seed, index, Purpose.EMPTY_TOKENS, draw)
        is_empty = _empty_positions(numbers, length, noise.max_empty_fraction)
        x0, documents = _insert_empty(x0, documents, is_empty, empty_token_id)

    noise_mask = np.ones(length, dtype=bool)
    if noise.p_prompt > 0:
        numbers = generator(seed, index, Purpose.PROMPT, draw)
        noise_mask[: _draw_prompt_length(numbers, length, noise)] = False
    visibility = _visibility(noise_mask, documents)
    if noise.p_infill > 0:
        numbers = generator(seed, index, Purpose.INFILL, draw)
        noise_mask &= ~_infilled(numbers, length, noise)

    numbers = generator(seed, index, Purpose.LOG_SNR, draw)
    levels = _draw_log_snr(numbers, length, schedule, noise)
    numbers = generator(seed, index, Purpose.CORRUPTION, draw)
    xt = _corrupt(numbers, x0, levels, schedule, noise.uniform_noise_includes_mask)
    log_snr = np.broadcast_to(levels, length).copy()
    np.copyto(xt, x0, where=~noise_mask)
    np.copyto(log_snr, CLEAN_LOG_SNR, where=~noise_mask)
    return NoisedSequence(x0, xt, log_snr, noise_mask, visibility)


def noise_for_validation(
    tokens: np.ndarray,
    schedule: MixingSchedule,
    *,
    seed: int,
    index: int,
    draw: int,
    num_draws: int,
    documents: np.ndarray | None = None,
    uniform_noise_includes_mask: bool = False,
) -> NoisedSequence:
    """Noise a whole validation sequence at the one log-SNR of `validation_log_snr`.

    The result depends on (seed, index, draw, num_draws) alone, so every evaluation of a run uses
    the same noise.
    """
    level = validation_log_snr(schedule, seed=seed, index=index, draw=draw, num_draws=num_draws)
    return noise_at_level(
        tokens, schedule, level, seed=seed, index=index, draw=draw, documents=documents,
        uniform_noise_includes_mask=uniform_noise_includes_mask,
    )  # fmt: skip


def noise_at_level(
    tokens: np.ndarray,
    schedule: MixingSchedule,
    log_snr: float,
    *,
    seed: int,
    index: int,
    draw: int,
    documents: np.ndarray | None = None,
    uniform_noise_includes_mask: bool = False,
) -> NoisedSequence:
    """Noise a whole sequence at one log-SNR, as validation does.

    No prompt, no infilling, no empty tokens: every position is in the loss. Uniform noise leaves
    out the mask unless asked for: the reported bound is one for that law alone.
    """
    x0 = np.array(tokens, dtype=np.int64)
    levels = np.full(1, log_snr, dtype=np.float32)
    numbers = generator(seed, index, Purpose.VALIDATION_CORRUPTION, draw)
    noise_mask = np.ones(len(x0), dtype=bool)
    return NoisedSequence(
        x0=x0,
        xt=_corrupt(numbers, x0, levels, schedule, uniform_noise_includes_mask),
        log_snr=np.repeat(levels, len(x0)),
        noise_mask=noise_mask,
        visibility=_visibility(noise_mask, documents),
    )


def validation_log_snr(
    schedule: MixingSchedule, *, seed: int, index: int, draw: int, num_draws: int
) -> float:
    """Log-SNR of validation draw `draw` of `num_draws` for sequence `index`.

    Times follow the training law, spread evenly instead of independently: the draws of a sequence
    lie 1 / num_draws of the range apart, successive sequences are shifted by the golden ratio, and
    one uniform number per seed shifts all. The mean over the draws is unbiased over seeds. Draws
    of one sequence are dependent, so a standard error is taken over the sequences' means.
    """
    if not 0 <= draw < num_draws:
        raise ValueError(f"draw is {draw}: it must lie in [0, {num_draws}), the number of draws.")
    offset = generator(seed, 0, Purpose.VALIDATION_LOG_SNR).random()
    return log_snr_at(schedule, (rotation(index) + (draw + offset) / num_draws) % 1.0)


def rotation(index: int) -> float:
    """Multiples of the golden ratio in [0, 1): successive ones are spread evenly."""
    return (index * _GOLDEN_STEP % 2**64) / 2**64


def log_snr_at(schedule: MixingSchedule, fraction: float) -> float:
    """Log-SNR at a fraction of the range of times."""
    low, high = schedule.time_bounds
    time = torch.tensor(low + (high - low) * fraction, dtype=torch.float64)
    return schedule.log_snr_from_time(time).item()


def prompt_length(fraction: float, length: int) -> int:
    """Prompt tokens of a sequence: the positions i with i <= fraction (length - 1)."""
    return math.floor(fraction * (length - 1)) + 1


def _arccos_fraction(r: float) -> float:
    """Maps U(0, 1) to the density (pi / 2) sin(pi f) on [0, 1]."""
    return math.acos(1 - 2 * r) / math.pi


def _draw_prompt_length(numbers: np.random.Generator, length: int, noise: NoiseConfig) -> int:
    chosen, r = numbers.random(2)
    if chosen >= noise.p_prompt:
        return 0
    match noise.prompt_length_law:
        case "code":
            fraction = _arccos_fraction(r)
        case "paper":
            fraction = min(math.acos(r), 1.0)
    return prompt_length(fraction * noise.max_prompt_fraction, length)


def _infilled(numbers: np.random.Generator, length: int, noise: NoiseConfig) -> np.ndarray:
    """Tokens left clean by infilling, bool [s]."""
    chosen, r = numbers.random(2)
    if chosen >= noise.p_infill:
        return np.zeros(length, dtype=bool)
    return numbers.random(length) < _arccos_fraction(r) * noise.max_infill_fraction


def _empty_positions(numbers: np.random.Generator, length: int, max_fraction: float) -> np.ndarray:
    """Where empty tokens stand, bool [s]: n = ceil(s f / (1 - f)) of them for f ~ U(0, max).

    That many among the s real tokens are a share f of the lengthened sequence. All stand in its
    first s positions, so what is left once the tail is cut has exactly n of them (at most s).
    """
    fraction = max_fraction * numbers.random()
    count = math.ceil(length * fraction / (1 - fraction))
    if count >= length:
        return np.ones(length, dtype=bool)
    ranks = numbers.bit_generator.random_raw(length)
    return ranks < np.partition(ranks, count)[count]


def _insert_empty(
    tokens: np.ndarray, documents: np.ndarray | None, is_empty: np.ndarray, empty_token_id: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens in their order around the empty positions, cut to the same length; and documents."""
    is_real = ~is_empty
    filled = np.full_like(tokens, empty_token_id)
    filled[is_real] = tokens[: np.count_nonzero(is_real)]
    if documents is not None:
        documents = documents[np.maximum(np.cumsum(is_real) - 1, 0)]
    return filled, documents


def _draw_log_snr(
    numbers: np.random.Generator, length: int, schedule: MixingSchedule, noise: NoiseConfig
) -> np.ndarray:
    """Log-SNRs, float32 [s], or [1] where the sequence has one for all."""
    chosen = numbers.random()
    is_linear = noise.p_independent <= chosen < noise.p_independent + noise.p_linear
    if is_linear:
        time = np.linspace(0, 1, length + 2)[1:-1]
    else:
        low, high = schedule.time_bounds
        count = length if chosen < noise.p_independent else 1
        time = low + (high - low) * numbers.random(count)
    return schedule.log_snr_from_time(torch.from_numpy(time)).numpy().astype(np.float32)


def _corrupt(
    numbers: np.random.Generator,
    x0: np.ndarray,
    levels: np.ndarray,
    schedule: MixingSchedule,
    includes_mask: bool,
) -> np.ndarray:
    """A draw from q_lambda per token, int64 [s].

    One 53-bit uniform per token says what becomes of it: below alpha it is kept, below
    alpha + (1 - alpha) s it becomes a uniform id, else the mask. In float64 the upper bound is
    alpha where s = 0 and 1 where s = 1, so pure noise of one kind never yields the other.
    """
    mask_id, length = schedule.mask_token_id, len(x0)
    exact = torch.from_numpy(levels).double()
    alpha, share = schedule.alpha(exact).numpy(), schedule.uniform_share(exact).numpy()
    u = numbers.random(length)
    xt = numbers.integers(0, schedule.vocab_size - (not includes_mask), length)
    if not includes_mask:
        xt += xt >= mask_id
    np.copyto(xt, mask_id, where=u >= alpha + (1 - alpha) * share)
    np.copyto(xt, x0, where=u < alpha)
    return xt


def _visibility(noise_mask: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
    visibility = np.zeros((2, len(noise_mask)), dtype=np.int32)
    visibility[0] = noise_mask
    if documents is not None:
        visibility[1] = documents
    return visibility
