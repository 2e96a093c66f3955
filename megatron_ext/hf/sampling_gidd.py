"""Denoising from pure noise to text, block by block (arXiv 2512.10858, sampling).

    canvas     [b, n] int64  prompts in front, noise behind; rows of shorter prompts begin later
    positions  [b, n] int64  a row counts from its own first token, and has `context` of them
    logits     [b, k, v]     of the k active positions, from the denoiser

Blocks of `block_length` positions are denoised from left to right. While one is active, everything
before it is clean and attends to itself alone, so its keys and values are computed once per block;
the active block and the noise behind it attend to everything. In mode `canvas` the noise behind it
reaches to the end of the model's context, as in the published sampler; in mode `window` it ends
`look_ahead` positions after the block, which costs less and gives other numbers.

All randomness is a function of (seed, number of the row, block, step): a row does not depend on its
batch.
This file needs torch and numpy alone and serves every model that implements `Denoiser`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .schedule_gidd import MixingSchedule
from .steps_gidd import (
    SamplingConfig,
    adaptive_step,
    ancestral_step,
    log_snr_grid,
    noise_from_uniform,
    uniforms,
)

HOLE = -1
"""Id of a position to fill, in a prompt with fixed tokens behind it."""


class Denoiser(Protocol):
    """What sampling asks of a model. All ranks of a model-parallel one return the same logits."""

    def begin_block(self, ids: Tensor, positions: Tensor, is_token: Tensor | None) -> None:
        """Take the clean prefix [b, p] (p may be 0); `is_token` marks what is not padding."""

    def logits(
        self, ids: Tensor, positions: Tensor, is_token: Tensor | None, num_active: int
    ) -> Tensor:
        """Logits [b, num_active, v] of the first positions of `ids` [b, r], which follow the
        prefix and attend to it and to each other; `is_token` [b, p + r]."""


class SpecialTokens(NamedTuple):
    """Ids with a meaning; the mask's is the schedule's."""

    eos: int | None = None
    pad: int | None = None


class Step(NamedTuple):
    """What an observer sees after a step."""

    block: int
    step: int
    """Steps left in the block; negative in correction steps."""
    first: int
    """Column of the canvas where the active block begins."""
    ids: Tensor
    """[b, block] the block after the step."""
    log_snr: float
    """Noise level after the step."""
    confidence: Tensor
    """[b, block] the denoiser's probability of each token of `ids`."""
    gain: Tensor | None
    """[b, block] scores of an adaptive step."""


@dataclass
class Canvas:
    """The sequences while they are being denoised."""

    ids: Tensor
    is_fixed: Tensor
    """[b, n] what stays: prompts, what stands behind their holes, columns outside of a row."""
    pads: Tensor
    """[b] columns before a row's first token."""
    prompt_end: int
    """Column where every row's new tokens begin."""
    context: int
    """Positions of the model."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        schedule: MixingSchedule,
        context: int,
        seed: int,
        rows: Sequence[int],
        prior: Tensor | None,
        device: torch.device,
    ) -> Canvas:
        """Prompts in front of noise; `prior` [b, context] replaces the noise that is drawn."""
        given = [torch.as_tensor(prompt, dtype=torch.int64).reshape(-1) for prompt in prompts]
        lengths = [_clean_length(prompt) for prompt in given]
        for length, prompt in zip(lengths, given, strict=True):
            if length >= context or len(prompt) > context:
                raise ValueError(
                    f"a prompt has {len(prompt)} tokens, the context {context}: there is no room "
                    "for new ones."
                )
        end = max(lengths)
        pads = torch.tensor([end - length for length in lengths])
        ids = torch.zeros(len(given), int(pads.max()) + context, dtype=torch.int64)
        is_fixed = torch.ones_like(ids, dtype=torch.bool)
        for index, prompt in enumerate(given):
            if prior is None:
                u = uniforms(seed, rows[index], 0, (context,))
                noise = noise_from_uniform(schedule, schedule.min_log_snr, u)
            else:
                noise = prior[index]
            first = int(pads[index])
            ids[index, first : first + context] = noise
            is_fixed[index, first : first + context] = False
            is_given = prompt != HOLE
            part = slice(first, first + len(prompt))
            ids[index, part] = torch.where(is_given, prompt, ids[index, part])
            is_fixed[index, part] = is_given
        return cls(ids.to(device), is_fixed.to(device), pads.to(device), end, context)

    @property
    def ends(self) -> Tensor:
        """[b] the column behind a row's last position."""
        return self.pads + self.context

    def positions(self, first: int, last: int) -> Tensor:
        columns = torch.arange(first, last, device=self.ids.device)
        return (columns - self.pads.unsqueeze(-1)).clamp_min(0)

    def is_token(self, last: int) -> Tensor | None:
        """[b, last] columns that belong to a row; None where all do."""
        if not bool(self.pads.any()):
            return None
        columns = torch.arange(last, device=self.ids.device)
        return (columns >= self.pads.unsqueeze(-1)) & (columns < self.ends.unsqueeze(-1))


def _clean_length(prompt: Tensor) -> int:
    """Tokens before the first hole."""
    holes = torch.nonzero(prompt == HOLE)
    return int(holes[0]) if len(holes) else len(prompt)


def check_supported(schedule: MixingSchedule, config: SamplingConfig) -> None:
    """Raise where the noise does not allow what `config` asks for."""
    if config.correction_steps and schedule.is_mask_only:
        raise ValueError(
            f"correction_steps is {config.correction_steps}: masked noise never makes a token "
            "wrong, so there is nothing to correct; give 0."
        )


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    schedule: MixingSchedule,
    prompts: Sequence[Sequence[int]],
    context: int,
    config: SamplingConfig,
    special: SpecialTokens = SpecialTokens(),  # noqa: B008
    *,
    rows: Sequence[int] | None = None,
    prior: Tensor | None = None,
    device: torch.device | None = None,
    observer: Callable[[Step], None] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Tensor:
    """Continue each prompt (possibly empty); int64 [b, longest prompt + new tokens].

    `rows` are numbers in [0, 2^64) under which the sequences draw, 0 to b - 1 when absent: under
    one seed and number a prompt becomes the same text at every place of every batch.

    A prompt may hold `HOLE`s: what stands before the first is the clean prefix, tokens behind it
    are fixed while everything around them is denoised, and new tokens count from the first hole.

    Rows of shorter prompts begin with padding (0 where there is no padding token), and padding
    replaces everything from a row's first end of document among its new tokens on, and what a
    longer row has beyond the row's own context. Generation stops early where every row has ended.
    Raises `ValueError` for a prompt that fills the context.
    """
    check_supported(schedule, config)
    rows = range(len(prompts)) if rows is None else rows
    if len(rows) != len(prompts):
        raise ValueError(f"rows has {len(rows)} numbers for {len(prompts)} prompts.")
    canvas = Canvas.of(
        prompts, schedule, context, config.seed, rows, prior, device or torch.device("cpu")
    )
    end = min(canvas.prompt_end + config.max_length, canvas.ids.shape[1])
    starts = range(canvas.prompt_end, end, config.block_length)
    plan = [(block, step) for block in range(len(starts)) for step in _steps(config)]
    run = _BlockRun(denoiser, schedule, canvas, config, special, rows, observer)
    finished = len(starts)
    for block, step in progress(plan):
        if block >= finished:
            break
        if step == config.steps:
            run.begin(block, starts[block])
        run.advance(step)
        is_last = step == _steps(config)[-1]
        if is_last and bool(_has_ended(canvas, run.last, special).all()):
            finished = block + 1
    return _padded(canvas, end, special)


def _steps(config: SamplingConfig) -> list[int]:
    """steps, ..., 1, then -1, ..., -correction_steps."""
    return [*range(config.steps, 0, -1), *range(-1, -config.correction_steps - 1, -1)]


class _BlockRun:
    """The active block."""

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: MixingSchedule,
        canvas: Canvas,
        config: SamplingConfig,
        special: SpecialTokens,
        rows: Sequence[int],
        observer: Callable[[Step], None] | None,
    ) -> None:
        self.denoiser, self.schedule, self.canvas = denoiser, schedule, canvas
        self.config, self.special, self.rows, self.observer = config, special, rows, observer
        self.levels = log_snr_grid(schedule, config.steps, config.grid)
        self.block = self.first = self.last = 0
        self.cached_logits: Tensor | None = None

    def begin(self, block: int, first: int) -> None:
        canvas = self.canvas
        self.block, self.first = block, first
        self.last = min(first + self.config.block_length, canvas.ids.shape[1])
        self.cached_logits = None
        self.denoiser.begin_block(
            canvas.ids[:, :first], canvas.positions(0, first), canvas.is_token(first)
        )

    def logits(self) -> Tensor:
        """Of the active block, mask and suppressed EOS at minus infinity."""
        canvas, config = self.canvas, self.config
        end = canvas.ids.shape[1]
        if config.mode == "window":
            end = min(self.last + config.look_ahead, end)
        logits = self.denoiser.logits(
            canvas.ids[:, self.first : end],
            canvas.positions(self.first, end),
            canvas.is_token(end),
            self.last - self.first,
        )
        logits[..., self.schedule.mask_token_id] = -torch.inf
        suppressed = canvas.prompt_end + config.min_length - self.first
        if self.special.eos is not None and suppressed > 0:
            logits[:, :suppressed, self.special.eos] = -torch.inf
        return logits

    def advance(self, step: int) -> None:
        """One step; a step that changed nothing leaves its logits to the next."""
        config, canvas = self.config, self.canvas
        ids = canvas.ids[:, self.first : self.last]
        is_fixed = canvas.is_fixed[:, self.first : self.last]
        logits = self.logits() if self.cached_logits is None else self.cached_logits
        number = self.block * (config.steps + config.correction_steps + 1)
        number += step if step > 0 else config.steps - step
        uniform = torch.stack(
            [uniforms(config.seed, row, number + 1, (ids.shape[1], 3)) for row in self.rows]
        )
        now, after = self.levels[max(step, 0)], self.levels[max(step - 1, 0)]
        gain = None
        if config.method == "ancestral" and step > 0:
            new = ancestral_step(
                logits.flatten(0, 1), ids.flatten(), self.schedule, (now, after),
                uniform.flatten(0, 1), config,
            ).view_as(ids)  # fmt: skip
        else:
            new, gain = adaptive_step(logits, ids, self.schedule, now, uniform, config, is_fixed)
        new = torch.where(is_fixed, ids, new)
        self.cached_logits = logits if torch.equal(new, ids) else None
        canvas.ids[:, self.first : self.last] = new
        if self.observer is not None:
            at_new = logits.float().log_softmax(-1).gather(-1, new.unsqueeze(-1)).squeeze(-1)
            self.observer(
                Step(self.block, step, self.first, new.clone(), after, at_new.exp(), gain)
            )


def _has_ended(canvas: Canvas, last: int, special: SpecialTokens) -> Tensor:
    """[b] whether the context or, by an end of document, the text of a row ends before `last`."""
    has_ended = canvas.ends <= last
    if special.eos is not None:
        is_eos = canvas.ids[:, canvas.prompt_end : last] == special.eos
        has_ended = has_ended | is_eos.any(-1)
    return has_ended


def _padded(canvas: Canvas, end: int, special: SpecialTokens) -> Tensor:
    pad = 0 if special.pad is None else special.pad
    ids = canvas.ids[:, :end].clone()
    columns = torch.arange(end, device=ids.device)
    is_outside = (columns < canvas.pads.unsqueeze(-1)) | (columns >= canvas.ends.unsqueeze(-1))
    ids[is_outside] = pad
    if special.eos is not None:
        is_eos = (ids == special.eos) & (columns >= canvas.prompt_end)
        ids[is_eos.cumsum(-1) > 0] = pad
    return ids
