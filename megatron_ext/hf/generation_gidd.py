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
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .schedule_gidd import MixingSchedule

HOLE = -1
"""Id of a position to fill, in a prompt with fixed tokens behind it."""
_SAMPLING = 8
"""Key of these draws; training uses others."""


class Denoiser(Protocol):
    """What sampling asks of a model. All ranks of a model-parallel one return the same logits."""

    def begin_block(self, ids: Tensor, positions: Tensor, is_token: Tensor | None) -> None:
        """Take the clean prefix [b, p] (p may be 0); `is_token` marks what is not padding."""

    def logits(
        self, ids: Tensor, positions: Tensor, is_token: Tensor | None, num_active: int
    ) -> Tensor:
        """Logits [b, num_active, v] of the first positions of `ids` [b, r], which follow the
        prefix and attend to it and to each other; `is_token` [b, p + r]."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to sample."""

    method: Literal["ancestral", "adaptive"] = "ancestral"
    """The reverse process, or replacing the tokens the model is surest are wrong."""
    max_length: int = 2048
    """New tokens at most; the end of the context limits them too."""
    min_length: int = 0
    """No end of document among the first so many new tokens."""
    block_length: int = 128
    """Positions denoised together."""
    steps: int = 128
    """Steps per block."""
    tokens_per_step: int = 1
    """Tokens replaced per adaptive step."""
    correction_steps: int = 0
    """Adaptive steps after a block's last one, which revise its tokens (not for masked noise)."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float | None = None
    """Keep the likeliest tokens that together reach this probability; absent keeps all."""
    top_k: int | None = None
    """Keep the likeliest k tokens; absent keeps all."""
    grid: str | Callable[[float], float] = "cosine"
    """Noise levels: cosine, linear, or a function from time in [0, 1] to the clean share."""
    mode: Literal["canvas", "window"] = "canvas"
    """Where the noise behind the active block ends: with the context, or `look_ahead` later."""
    look_ahead: int = 0
    """Positions behind the active block in mode `window`."""
    seed: int = 0
    """Keys all draws, together with the number of the sequence."""

    def __post_init__(self) -> None:
        for name in ("max_length", "block_length", "steps", "tokens_per_step", "top_k", "top_p"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value!r}: give a number above zero.")
        for name in ("min_length", "correction_steps", "temperature", "look_ahead"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} is {value!r}: give zero or more.")
        choices = {
            "method": ("ancestral", "adaptive"),
            "mode": ("canvas", "window"),
            "grid": ("cosine", "linear"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known and not callable(value):
                raise ValueError(f"{name} is {value!r}: choose {' or '.join(known)}.")


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


def log_snr_grid(
    schedule: MixingSchedule, steps: int, grid: str | Callable[[float], float]
) -> list[float]:
    """Noise levels, `steps + 1` of them, from `max_log_snr` (index 0) down to `min_log_snr`.

    In float32 like the published sampler's, whose rounding shows near the clean end.
    """
    low, high = (
        torch.tensor(bound).sigmoid() for bound in (schedule.min_log_snr, schedule.max_log_snr)
    )
    time = torch.linspace(0, 1, steps + 1)
    if callable(grid):
        clean = torch.tensor([float(grid(t)) for t in time.tolist()])
    else:
        clean = 1 - time if grid == "linear" else 0.5 + 0.5 * torch.cos(torch.pi * time)
    alpha = (high - low) * clean + low
    level = torch.log(alpha / (1 - alpha))
    return level.clamp(schedule.min_log_snr, schedule.max_log_snr).tolist()


def uniforms(seed: int, row: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1) float64 that depend on the arguments alone (Philox)."""
    key = np.array([seed % 2**64, _SAMPLING], dtype=np.uint64)
    counter = np.array([0, 0, draw, row], dtype=np.uint64)
    numbers = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return torch.from_numpy(numbers.random(shape))


def filtered_probs(logits: Tensor, config: SamplingConfig) -> Tensor:
    """The denoiser's distribution [..., v] in float32 after temperature, top-k and top-p."""
    logits = logits.float()
    if config.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if config.temperature != 1:
        logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if config.top_p is not None:
        ranked, order = probs.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked > config.top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Ids [n] by inverting the cumulative distribution of `probs` [n, v] at `uniform` [n]."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = uniform.to(probs.device).unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def ancestral_step(
    logits: Tensor,
    ids: Tensor,
    schedule: MixingSchedule,
    levels: tuple[float, float],
    uniform: Tensor,
    config: SamplingConfig,
) -> Tensor:
    """Ids [n] at the higher log-SNR `levels[1]` from those at `levels[0]`, by the posterior.

    The posterior q_s(z_s) (jump + a [z_s = z_t]) / q_t(z_t), with a = alpha_t / alpha_s and jump
    the noise that t has beyond s at z_t, is a mixture: z_t stays with weight a q_s(z_t), else z_s
    is drawn from q_s = alpha_s xhat + beta_s pi_s. So only tokens that do jump, and to the
    prediction xhat, cost a draw over the vocabulary, and a token that cannot jump not even a
    softmax. `uniform` [n, 3]. A token that the denoiser rules out while the noise cannot have made
    it stays as it is; a mask token that the noise cannot have made is drawn anew.
    """
    now, after = (torch.full(ids.shape, x, dtype=torch.float64, device=ids.device) for x in levels)
    alpha_t, alpha_s = schedule.alpha(now), schedule.alpha(after)
    noise_t = (1 - alpha_t) * schedule.pi_at(now, ids)
    noise_s = (1 - alpha_s) * schedule.pi_at(after, ids)
    jump = (noise_t - alpha_t / alpha_s * noise_s).clamp_min(0)
    is_stray = (ids == schedule.mask_token_id) & (noise_t == 0)
    jump, noise_t = (torch.where(is_stray, 1.0, x) for x in (jump, noise_t))
    (open_positions,) = torch.nonzero(jump > 0, as_tuple=True)
    new = ids.clone()
    if len(open_positions) == 0:
        return new
    probs = filtered_probs(logits[open_positions], config)
    at_z = probs.gather(-1, ids[open_positions].unsqueeze(-1)).squeeze(-1).double()
    total = alpha_t[open_positions] * at_z + noise_t[open_positions]
    u = uniform.to(ids.device)[open_positions]
    jumps = u[:, 0] * total < jump[open_positions]
    is_clean = u[:, 1] < alpha_s[open_positions]
    to_clean, to_noise = open_positions[jumps & is_clean], open_positions[jumps & ~is_clean]
    new[to_clean] = draw(probs[jumps & is_clean], u[:, 2][jumps & is_clean])
    noise = noise_from_uniform(schedule, levels[1], u[:, 2][jumps & ~is_clean])
    new[to_noise] = noise.to(ids.device)
    return new


def noise_from_uniform(schedule: MixingSchedule, log_snr: float, uniform: Tensor) -> Tensor:
    """Ids [n] from the mixing distribution at a noise level, one uniform each."""
    share = schedule.uniform_share(torch.tensor(log_snr, dtype=torch.float64)).item()
    ids = (uniform / max(share, 1e-300) * (schedule.vocab_size - 1)).clamp_max(
        schedule.vocab_size - 2
    )
    ids = ids.long()
    ids += ids >= schedule.mask_token_id
    return torch.where(uniform < share, ids, schedule.mask_token_id)


def confidence_gain(logits: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """(largest probability - probability of the present token) x weight, [...]."""
    lse = logits.float().logsumexp(-1)
    at_ids = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1).float()
    return ((logits.amax(-1).float() - lse).exp() - (at_ids - lse).exp()) * weight


def adaptive_step(
    logits: Tensor,
    ids: Tensor,
    schedule: MixingSchedule,
    log_snr: float,
    uniform: Tensor,
    config: SamplingConfig,
    is_fixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids [b, k] with the `tokens_per_step` positions of the largest gain replaced, and gains.

    A position's weight is the noise's probability of its token relative to the block, fixed
    positions left out. Where the noise cannot have made any token of a row, nothing is left to
    replace.
    """
    levels = torch.full(ids.shape, log_snr, dtype=torch.float64, device=ids.device)
    noise = schedule.pi_at(levels, ids)
    if is_fixed is not None:
        noise = noise.masked_fill(is_fixed, 0.0)
    total = noise.sum(-1, keepdim=True)
    weight = torch.where(total > 0, noise / total.clamp_min(1e-300), 0.0)
    gain = confidence_gain(logits, ids, weight.float())
    order = gain if is_fixed is None else gain.masked_fill(is_fixed, -torch.inf)
    # A stable sort and no topk: equal gains are frequent (0 for the likeliest token).
    chosen = order.sort(dim=-1, descending=True, stable=True).indices[:, : config.tokens_per_step]
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(-1)
    at_chosen = logits[rows, chosen].flatten(0, 1)
    if config.temperature == 0:
        replaced = at_chosen.argmax(-1)
    else:
        u = uniform[..., 2].to(ids.device).gather(-1, chosen)
        replaced = draw(filtered_probs(at_chosen, config), u.flatten())
    present = ids.gather(-1, chosen)
    replaced = torch.where(total > 0, replaced.view(chosen.shape), present)
    return ids.scatter(-1, chosen, replaced), gain


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


class CachedDenoiser:
    """A Hugging Face model as a `Denoiser`; `use_cache=False` runs the prefix in every step."""

    def __init__(self, model: Any, *, use_cache: bool = True) -> None:
        self.model, self.use_cache = model, use_cache
        self.prefix: tuple[Tensor, Tensor] | None = None
        self.key_values: Any = None

    def begin_block(self, ids: Tensor, positions: Tensor, is_token: Tensor | None) -> None:
        self.prefix, self.key_values = (ids, positions), None
        if self.use_cache and ids.shape[1]:
            self.key_values = self.model.model(ids, is_token, positions).key_values

    def logits(
        self, ids: Tensor, positions: Tensor, is_token: Tensor | None, num_active: int
    ) -> Tensor:
        assert self.prefix is not None, "begin_block comes first"
        num_prefix = self.prefix[0].shape[1]
        if self.key_values is not None or not num_prefix:
            output = self.model.model(ids, is_token, positions, self.key_values)
            hidden = output.last_hidden_state[:, :num_active]
            return self.model.logits(hidden)
        ids, positions = (
            torch.cat(pair, dim=1) for pair in zip(self.prefix, (ids, positions), strict=True)
        )
        is_noised = torch.arange(ids.shape[1], device=ids.device) >= num_prefix
        mask = (is_noised[:, None] >= is_noised).expand(len(ids), -1, -1)
        if is_token is not None:
            mask = mask & is_token.unsqueeze(1)
        hidden = self.model.model(ids, mask, positions).last_hidden_state
        return self.model.logits(hidden[:, num_prefix : num_prefix + num_active])


PUBLISHED_IDS = {"bos": 0, "eos": 1, "pad": 2, "mask": 3}
"""Special tokens of the published tokenizer."""


def special_id(config: Any, name: str, given: int | None = None) -> int:
    """The id of a special token: as given, else the configuration's, else the published one."""
    configured = getattr(config, f"{name}_token_id", None)
    chosen = configured if given is None else given
    return PUBLISHED_IDS[name] if chosen is None else chosen


class GiddGenerationMixin:
    """`generate` with the published arguments."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        max_length: int = 2048,
        min_length: int = 0,
        temperature: float = 1.0,
        block_length: int = 128,
        steps: int = 128,
        top_p: float | None = None,
        top_k: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        mask_token_id: int | None = None,
        sampling_method: str = "ancestral",
        noise_schedule: str | Callable[[float], float] = "cosine",
        tokens_per_step: int = 1,
        show_progress: bool = False,
        *,
        attention_mask: Tensor | None = None,
        seed: int | None = None,
        rows: Sequence[int] | None = None,
        mode: Literal["canvas", "window"] = "canvas",
        look_ahead: int = 0,
        correction_steps: int = 0,
        use_cache: bool = True,
        observer: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Continue `inputs` [b, p] by up to `max_length` new tokens.

        `attention_mask` [b, p] marks padding in front of shorter prompts. Without inputs a
        sequence begins with BOS. Without a seed, one is drawn from torch's generator; `rows` are
        the numbers under which the sequences draw, 0 to b - 1 when absent. Special ids that are
        not given are the configuration's, else the published 0, 1, 2 and 3.
        """
        model: Any = self
        bos_token_id, eos_token_id, pad_token_id, mask_token_id = (
            special_id(model.config, name, given)
            for name, given in (
                ("bos", bos_token_id), ("eos", eos_token_id), ("pad", pad_token_id),
                ("mask", mask_token_id),
            )
        )  # fmt: skip
        if inputs is None:
            inputs = torch.tensor([[bos_token_id]], device=model.device)
        if attention_mask is None:
            prompts = inputs.tolist()
        else:
            prompts = [
                row[keep.bool()].tolist() for row, keep in zip(inputs, attention_mask, strict=True)
            ]
        config = SamplingConfig(
            method=sampling_method, max_length=max_length, min_length=min_length,
            block_length=block_length, steps=steps, tokens_per_step=tokens_per_step,
            correction_steps=correction_steps, temperature=temperature, top_p=top_p, top_k=top_k,
            grid=noise_schedule, mode=mode, look_ahead=look_ahead,
            seed=int(torch.randint(2**62, ())) if seed is None else seed,
        )  # type: ignore[arg-type]  # fmt: skip
        output = sample(
            CachedDenoiser(self, use_cache=use_cache),
            model.mixing_schedule(mask_token_id),
            prompts,
            model.config.max_position_embeddings,
            config,
            SpecialTokens(eos_token_id, pad_token_id),
            rows=rows,
            prior=self._sample_prior(len(prompts), mask_token_id),
            device=model.device,
            observer=observer,
            progress=_bar if show_progress else iter,
        )
        in_front = inputs.shape[1] - max(map(len, prompts))
        return nn.functional.pad(output, (in_front, 0), value=pad_token_id)

    def _sample_prior(self, batch_size: int, mask_token_id: int) -> Tensor | None:
        """Noise [b, context] to begin from; None draws it from the seed."""
        del batch_size, mask_token_id


def _bar(steps: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(steps, desc="denoise", unit="step")
