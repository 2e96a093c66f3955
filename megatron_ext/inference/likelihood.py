"""Monte Carlo bounds on -log p of given tokens, whole or as completions of a prompt.

A sequence is exposed to noise `num_draws` times, each time at one log-SNR for all of it, and the
objective's `elbo` is summed over its scored positions; the mean over draws is the bound (arXiv
2512.10858, section 3; docs/evaluation.md). Log-SNRs are stratified in time and all noise is that of
validation: a function of (seed, index, draw), whatever the batch size and the layout.

A prompt is clean, sees itself alone and is not scored. What stands behind the last token is either
nothing, or, as where the model samples, noise up to the end of its context, which is seen and not
scored.

Sequences are divided over the replicas of the model; the one collective between them is an
all-reduce of [sequences, draws] float64 at the end.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from megatron_ext.diffusion.noising import (
    CLEAN_LOG_SNR,
    NoisedSequence,
    log_snr_at,
    noise_at_level,
    rotation,
    validation_log_snr,
)
from megatron_ext.diffusion.random import Purpose, generator
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.hf.steps_gidd import noise_from_uniform, uniforms

if TYPE_CHECKING:
    from megatron_ext.inference.scorers import Scorer

_PADDING = -1
"""Document of the positions that fill up a batch; no token has it."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How to estimate."""

    num_draws: int = 16
    """Noise levels per sequence, one draw of noise at each."""
    seed: int = 1234
    """Keys the noise; a run's own seed meets the noise of its validation."""
    batch_size: int = 8
    """Noised sequences per forward pass; does not change the figures."""
    times: Literal["even", "squared", "grid"] = "squared"
    """Where noise levels lie. squared: most of them near clean text, weighted accordingly. even:
    as in validation; the same bound, noisier. grid: fixed, as in the published benchmarks."""
    canvas: bool = False
    """Fill the context behind the last token with noise, as the sampler does."""
    effective_log_snr: bool = False
    """Judge each draw by the log-SNR of the share of scored tokens that stayed clean. The
    published benchmarks did; the result ranks completions and bounds nothing."""

    def __post_init__(self) -> None:
        for name in ("num_draws", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more.")
        if self.times not in ("even", "squared", "grid"):
            raise ValueError(f"times is {self.times!r}: choose even, squared or grid.")

    def require_bound(self) -> None:
        """`ValueError` where the figures would not be bounds, but good for ranking alone."""
        if self.effective_log_snr or self.times == "grid":
            raise ValueError(
                "--effective-log-snr and --times grid rank completions; they make no bound."
            )


@dataclass(frozen=True)
class Item:
    """Tokens to score."""

    tokens: np.ndarray
    """[s] ids, the prompt in front."""
    index: int
    """Keys the noise, in [0, 2^64); equal ones meet equal noise."""
    num_prompt: int = 0
    """Clean tokens in front."""
    documents: np.ndarray | None = None
    """[s] document of each token where attention stays within documents."""


@dataclass(frozen=True)
class Scores:
    """Bounds of n items."""

    elbo: np.ndarray
    """[n, draws] float64, nats of the scored tokens at each draw."""
    log_snr: np.ndarray
    """[n, draws] float64."""
    weights: np.ndarray
    """[n, draws] float64, of mean 1: the law of training over the law of the draws."""
    num_tokens: np.ndarray
    """[n] int64, scored tokens."""

    @property
    def nats(self) -> np.ndarray:
        """[n] bound on -log p of each item."""
        return (self.elbo * self.weights).mean(axis=1)

    @property
    def variance(self) -> np.ndarray:
        """[n] of `nats` over the noise, NaN for one draw.

        Draws are stratified in time, so neighbours in log-SNR differ by their noise and little
        else. They are taken in pairs, of which the squared difference estimates the sum of both
        variances (an odd number ends with three). On average this is never too small; what it is
        too large by comes from the means of neighbours.
        """
        count = self.elbo.shape[1]
        if count < 2:
            return np.full(len(self.elbo), math.nan)
        order = np.argsort(self.log_snr, axis=1)
        ordered = np.take_along_axis(self.elbo * self.weights, order, axis=1)
        sums = np.square(ordered[:, 1::2] - ordered[:, : count - count % 2 : 2]).sum(axis=1)
        if count % 2:
            a, b, c = ordered[:, -3:].T
            sums += ((a - c) ** 2 + (b - c) ** 2 - (a - b) ** 2) / 2
        return sums / count**2

    @property
    def standard_error(self) -> np.ndarray:
        """[n] of `nats` over the noise, NaN for one draw."""
        return np.sqrt(self.variance)

    def by_log_snr(self, schedule: MixingSchedule, num_bins: int = 18) -> list[dict[str, float]]:
        """Nats per token in equal bins of log-SNR, and the bins' shares of the bound.

        Bins without a draw are left out.
        """
        edges = np.linspace(schedule.min_log_snr, schedule.max_log_snr, num_bins + 1)
        bins = np.clip(np.searchsorted(edges, self.log_snr, side="right") - 1, 0, num_bins - 1)
        tokens = np.broadcast_to(self.num_tokens[:, None], bins.shape)
        nats = self.elbo * self.weights
        table = []
        for i in range(num_bins):
            there = bins == i
            if not there.any():
                continue
            row = {
                "from": edges[i],
                "to": edges[i + 1],
                "elbo": nats[there].sum() / (tokens * self.weights)[there].sum(),
                "share": nats[there].sum() / nats.sum(),
                "tokens": tokens[there].sum(),
            }
            table.append({name: value.item() for name, value in row.items()})
        return table


class Estimate(NamedTuple):
    """A ratio of sums over units that were sampled, such as nats per token over documents."""

    mean: float
    standard_error: float | None
    """Over the units: how the mean would vary with other ones; None for a single one."""
    low: float | None
    """Ends of the 95 % confidence interval, by Student's distribution."""
    high: float | None
    noise_standard_error: float | None
    """Over the noise alone: how the mean would vary with another seed; None for one draw."""
    num_units: int

    def scaled(self, factor: float) -> Estimate:
        """In another unit."""
        values = (None if x is None else x * factor for x in self[:5])
        return Estimate(*values, self.num_units)  # type: ignore[arg-type]


def estimate_ratio(values: np.ndarray, sizes: np.ndarray, variance: np.ndarray) -> Estimate:
    """sum(values) / sum(sizes), each [n]; `variance` [n] of the values over the noise.

    The standard error is the ratio estimator's, sqrt(n / (n - 1) sum (values - mean sizes)^2) over
    sum(sizes); for equal sizes that of the mean.
    """
    count, total = len(values), float(np.sum(sizes))
    mean = float(np.sum(values)) / total
    noise = math.sqrt(float(np.sum(variance))) / total
    noise_error = None if math.isnan(noise) else noise
    if count < 2:
        return Estimate(mean, None, None, None, noise_error, count)
    residuals = np.asarray(values) - mean * np.asarray(sizes)
    error = math.sqrt(count / (count - 1) * float(np.square(residuals).sum())) / total
    half = student_quantile(count - 1) * error
    return Estimate(mean, error, mean - half, mean + half, noise_error, count)


def student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's distribution (beyond a table, by Cornish and Fisher)."""
    table = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    if freedom <= len(table):
        return table[freedom - 1]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def index_of(tokens: Sequence[int] | np.ndarray) -> int:
    """A noise index that is a function of tokens alone."""
    contents = np.ascontiguousarray(tokens, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(contents, digest_size=8).digest(), "little")


def completion(prompt: Sequence[int], tokens: Sequence[int], context: int) -> Item:
    """`tokens` given `prompt`, whose front is cut off where both do not fit the context.

    The noise depends on the prompt alone, so that the completions of one meet the same: the
    differences between them are less noisy than each.
    """
    if not 0 < len(tokens) <= context:
        raise ValueError(f"a completion has {len(tokens)} tokens; the context holds 1 to {context}")
    kept = list(prompt)[max(len(prompt) + len(tokens) - context, 0) :]
    return Item(np.array([*kept, *tokens], dtype=np.int64), index_of(prompt), len(kept))


@torch.no_grad()
def score(scorer: Scorer, items: Sequence[Item], config: LikelihoodConfig) -> Scores:
    """Bounds of all items, on every rank; all ranks call this with the same items."""
    for item in items:
        if not item.num_prompt < len(item.tokens) <= scorer.context:
            raise ValueError(
                f"a sequence has {len(item.tokens)} tokens, {item.num_prompt} of them its prompt: "
                f"there must be one to score, and the context has {scorer.context} positions."
            )
    group = scorer.replicas
    elbo = torch.zeros(len(items), config.num_draws, dtype=torch.float64, device=scorer.device)
    levels = [noise_levels(scorer.schedule, config, item.index) for item in items]
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    # None leaves it to whether a terminal looks on.
    silent = None if os.environ.get("RANK", "0") == "0" else True
    # By length, or a batch would be mostly padding; the longest, which may not fit, come first.
    mine = sorted(range(rank, len(items), size), key=lambda i: -len(items[i].tokens))
    rows = (
        _Row(number, draw, noise_item(items[number], draw, log_snr, scorer, config))
        for number in mine
        for draw, log_snr in enumerate(levels[number].log_snr)
    )
    with tqdm(total=len(mine) * config.num_draws, desc="score", unit="draw", disable=silent) as bar:
        for batch in _batches(rows, config.batch_size):
            _score_batch(scorer, batch, elbo)
            bar.update(len(batch))
    if size > 1:
        torch.distributed.all_reduce(elbo, group=group)
    return Scores(
        elbo.cpu().numpy(),
        np.array([x.log_snr for x in levels]).reshape(elbo.shape),
        np.array([x.weights for x in levels]).reshape(elbo.shape),
        np.array([len(item.tokens) - item.num_prompt for item in items], dtype=np.int64),
    )


class Levels(NamedTuple):
    """Noise levels of an item."""

    log_snr: np.ndarray
    """[draws] float64."""
    weights: np.ndarray
    """[draws] float64, of each draw in the mean."""


def noise_levels(schedule: MixingSchedule, config: LikelihoodConfig, index: int) -> Levels:
    """The noise levels that `config.times` says, a function of (seed, index)."""
    count = config.num_draws
    match config.times:
        case "even":
            levels = [
                validation_log_snr(
                    schedule, seed=config.seed, index=index, draw=draw, num_draws=count
                )
                for draw in range(count)
            ]
            return Levels(np.array(levels), np.ones(count))
        case "squared":
            offset = generator(config.seed, 0, Purpose.VALIDATION_LOG_SNR).random()
            offset = (offset + rotation(index)) % 1.0
            # Every second stratum is entered from its other end: what changes linearly over the
            # strata, as the weights do, adds up to the same for every offset.
            within = np.where(np.arange(count) % 2 == 0, offset, 1.0 - offset)
            root = (np.arange(count) + within) / count
            return Levels(np.array([log_snr_at(schedule, u**2) for u in root]), 2 * root)
        case "grid":
            clean = np.linspace(1e-4, 0.9999, count + 1)[:-1]
            level = np.log(clean / (1 - clean)).clip(schedule.min_log_snr, schedule.max_log_snr)
            return Levels(level, np.ones(count))


class _Row(NamedTuple):
    item: int
    draw: int
    noised: NoisedSequence


def noise_item(
    item: Item, draw: int, log_snr: float, scorer: Scorer, config: LikelihoodConfig
) -> NoisedSequence:
    """Draw `draw` of an item, at a noise level; `noise_mask` are the scored positions."""
    tokens, documents, end = item.tokens, item.documents, len(item.tokens)
    if config.canvas and end < scorer.context:
        # Another rest in every draw: one for all would correlate the draws.
        u = uniforms(config.seed, item.index, draw, (scorer.context - end,))
        rest = noise_from_uniform(scorer.schedule, scorer.schedule.min_log_snr, u).numpy()
        tokens = np.concatenate([tokens, rest])
        if documents is not None:
            documents = np.pad(documents, (0, len(rest)), mode="edge")
    row = noise_at_level(
        tokens, scorer.schedule, log_snr, seed=config.seed, index=item.index, draw=draw,
        documents=documents,
    )  # fmt: skip
    prompt = slice(0, item.num_prompt)
    row.xt[prompt] = row.x0[prompt]
    row.log_snr[prompt] = CLEAN_LOG_SNR
    row.visibility[0, prompt] = 0
    row.noise_mask[prompt] = False
    row.noise_mask[end:] = False
    if config.effective_log_snr:
        scored = row.noise_mask
        share = np.mean(row.xt[scored] == row.x0[scored], dtype=np.float64)
        schedule = scorer.schedule
        level = math.log(share / (1 - share)) if 0 < share < 1 else math.copysign(99, share - 0.5)
        row.log_snr[scored] = min(max(level, schedule.min_log_snr), schedule.max_log_snr)
    return row


def _batches(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _score_batch(scorer: Scorer, batch: list[_Row], elbo: torch.Tensor) -> None:
    """Fill in `elbo` [n, draws] at the rows of the batch."""
    length = max(len(row.noised.x0) for row in batch)

    def stacked(values: list[np.ndarray], fill: Any) -> torch.Tensor:
        wide = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])],
                       constant_values=fill) for x in values]  # fmt: skip
        return torch.from_numpy(np.stack(wide)).to(scorer.device)

    noised = [row.noised for row in batch]
    xt, x0 = (stacked([x[i] for x in noised], 0) for i in (1, 0))
    log_snr = stacked([x.log_snr for x in noised], CLEAN_LOG_SNR)
    is_scored = stacked([x.noise_mask for x in noised], False)
    visibility = stacked([x.visibility for x in noised], _PADDING)
    columns = torch.nonzero(is_scored.any(0)).flatten()
    scored = slice(int(columns[0]), int(columns[-1]) + 1)
    values = scorer.elbo(xt, x0, log_snr, visibility, scored)
    sums = torch.where(is_scored[:, scored], values.double(), 0.0).sum(-1)
    items = torch.tensor([row.item for row in batch], device=elbo.device)
    draws = torch.tensor([row.draw for row in batch], device=elbo.device)
    elbo[items, draws] = sums
