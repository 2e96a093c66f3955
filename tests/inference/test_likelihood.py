"""Likelihood bounds against quadrature, and what they must not depend on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from megatron_ext.diffusion.noising import NoisedSequence
from megatron_ext.diffusion.objective import dense_gidd_loss
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.inference.likelihood import (
    Item,
    LikelihoodConfig,
    Scores,
    completion,
    estimate_ratio,
    noise_item,
    noise_levels,
    score,
    student_quantile,
)
from megatron_ext.inference.scorers import HuggingFaceScorer
from megatron_ext.kernels.gidd_loss import gidd_loss
from tests.diffusion.bounds import STANDARD_ERRORS, assert_mean
from tests.distributed import run_ranks
from tests.hf.golden import recorded_model
from tests.inference.tables import MASK, VOCABULARY

SHIFTS = [-1000.0, 0.0, 1000.0]
LENGTH = 3
STATES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


class TableScorer:
    """Logits of three positions that depend on all three tokens; remembers what it saw."""

    context, device, replicas = LENGTH, torch.device("cpu"), None

    def __init__(self, schedule: MixingSchedule) -> None:
        numbers = np.random.default_rng(1).normal(size=(*[VOCABULARY] * LENGTH, LENGTH, VOCABULARY))
        self.table = torch.from_numpy(numbers * 1.5)
        self.schedule, self.seen = schedule, []

    def elbo(
        self, xt: Tensor, x0: Tensor, log_snr: Tensor, visibility: Tensor, scored: slice
    ) -> Tensor:
        self.seen.append((xt, x0, log_snr, visibility, scored))
        logits = self.table[tuple(xt.t())][:, scored]
        xt, x0, log_snr = (x[:, scored] for x in (xt, x0, log_snr.double()))
        return gidd_loss(logits, xt, x0, log_snr, self.schedule).elbo


def integral(scorer: TableScorer, tokens: list[int], num_prompt: int, num_scored: int) -> float:
    """Mean over times and noise of the scored positions' elbo, by enumeration and quadrature.

    Positions behind the scored ones are prior noise, noised again.
    """
    schedule, x0 = scorer.schedule, torch.tensor(tokens)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(200))
    half = (schedule.max_log_snr - schedule.min_log_snr) / 2
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        level = schedule.min_log_snr + half * (1 + node)
        clean = torch.nn.functional.one_hot(x0, VOCABULARY).double()
        clean[num_prompt + num_scored :] = schedule.pi(
            torch.tensor(schedule.min_log_snr, dtype=torch.float64)
        )
        law = schedule.marginal(level.expand(LENGTH), clean)
        law[:num_prompt] = clean[:num_prompt]
        q = torch.stack([law[i, STATES[:, i]] for i in range(LENGTH)]).prod(0)
        losses = dense_gidd_loss(
            scorer.table[tuple(STATES.t())], STATES, x0.expand_as(STATES),
            level.expand(STATES.shape), schedule,
        )  # fmt: skip
        elbo = losses.elbo[:, num_prompt : num_prompt + num_scored].sum(-1)
        elbo = torch.where(q > 0, elbo, 0.0)
        total += float(half * weight * schedule.log_snr_density(level) * (q * elbo).sum())
    low, high = schedule.time_bounds
    return total / (high - low)


def noised(item: Item, scorer: TableScorer, config: LikelihoodConfig) -> list[NoisedSequence]:
    """All draws of an item."""
    levels = noise_levels(scorer.schedule, config, item.index).log_snr
    return [noise_item(item, i, level, scorer, config) for i, level in enumerate(levels)]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(
    ("num_prompt", "num_scored", "times"),
    [(0, 3, "even"), (0, 3, "squared"), (1, 2, "squared"), (1, 1, "squared"), (1, 1, "even")],
)
def test_bounds_converge_to_the_integral(
    shift: float, num_prompt: int, num_scored: int, times: str
) -> None:
    """Unconditional, conditional, and conditional with noise behind; errors are honest ones."""
    schedule = MixingSchedule(VOCABULARY, MASK, shift, min_log_snr=-6.0, max_log_snr=2.0)
    scorer = TableScorer(schedule)
    tokens = [2, 0, 1]
    expected = integral(scorer, tokens, num_prompt, num_scored)
    item = np.array(tokens[: num_prompt + num_scored])
    items = [Item(item, index, num_prompt) for index in range(250)]
    config = LikelihoodConfig(num_draws=16, batch_size=512, canvas=True, times=times)  # type: ignore[arg-type]
    scores = score(scorer, items, config)
    error = scores.nats.std(ddof=1) / math.sqrt(len(items))
    assert error < 0.04 * expected
    assert abs(scores.nats.mean() - expected) < STANDARD_ERRORS * error
    # The estimate from neighbours is not below the spread that it stands for, nor far above it.
    assert 0.9 < math.sqrt(scores.variance.mean()) / scores.nats.std(ddof=1) < 1.5


@pytest.mark.parametrize("num_draws", [2, 3, 4, 7])
def test_the_variance_over_the_noise_is_that_of_draws_with_a_common_mean(num_draws: int) -> None:
    """Unbiased where neighbours differ in their noise alone, however unequal it is."""
    spread = np.linspace(0.5, 3, num_draws)
    elbo = np.random.default_rng(0).normal(5.0, spread, size=(40_000, num_draws))
    levels = np.broadcast_to(np.linspace(-9, 9, num_draws), elbo.shape)
    scores = Scores(elbo, levels, np.ones_like(elbo), np.ones(len(elbo), dtype=np.int64))
    assert_mean(scores.variance, np.square(spread).sum() / num_draws**2)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_more_draws_near_clean_text_make_the_same_bound_less_noisy(shift: float) -> None:
    """Over all of the range: a token noised at +9 counts 8000 times and is seldom met."""
    scorer = TableScorer(MixingSchedule(VOCABULARY, MASK, shift))
    items = [Item(np.array([2, 0, 1]), index) for index in range(600)]
    even, squared = (
        score(scorer, items, LikelihoodConfig(num_draws=8, batch_size=4800, times=times))
        for times in ("even", "squared")
    )
    assert squared.nats.std() < 0.8 * even.nats.std()
    assert squared.nats.max() < 0.5 * even.nats.max()
    gap = abs(squared.nats.mean() - even.nats.mean())
    assert gap < STANDARD_ERRORS * math.hypot(squared.nats.std(), even.nats.std()) / math.sqrt(600)


class LevelScorer(TableScorer):
    """The loss is the noise level's time."""

    def elbo(
        self, xt: Tensor, x0: Tensor, log_snr: Tensor, visibility: Tensor, scored: slice
    ) -> Tensor:
        return torch.sigmoid(-log_snr[:, scored].double())


@pytest.mark.parametrize("times", ["even", "squared"])
def test_spread_over_noise_levels_costs_almost_nothing(times: str) -> None:
    scorer = LevelScorer(MixingSchedule(VOCABULARY, MASK, 0.0))
    items = [Item(np.array([2]), index) for index in range(200)]
    scores = score(scorer, items, LikelihoodConfig(num_draws=16, times=times))  # type: ignore[arg-type]
    assert scores.nats.mean() == pytest.approx(0.5, abs=1e-3)
    independent = (scores.elbo * scores.weights).std(ddof=1) / 4
    assert scores.nats.std(ddof=1) < independent / 3.5
    assert scores.standard_error.mean() < independent


@pytest.mark.parametrize(("canvas", "shift"), [(False, 0.0), (True, 1000.0)])
def test_prompts_are_clean_see_themselves_alone_and_are_not_scored(
    canvas: bool, shift: float
) -> None:
    scorer = TableScorer(MixingSchedule(VOCABULARY, MASK, shift))
    item = Item(np.array([2, 0]), index=7, num_prompt=1)
    config = LikelihoodConfig(num_draws=32, canvas=canvas, times="even")
    rows = noised(item, scorer, config)
    for row in rows:
        assert (row.xt[0], row.visibility[0, 0]) == (2, 0)
        assert row.visibility[0, 1:].tolist() == [1] * (len(row.xt) - 1)
        assert row.noise_mask.tolist() == [False, True, False][: len(row.xt)]
        assert len(row.xt) == (LENGTH if canvas else 2)
    assert {row.xt[1] for row in rows} == {0, 1, 2} | (set() if canvas else {MASK})
    if canvas:
        assert len({row.x0[2] for row in rows}) > 1, "draws do not share their rest"


def test_completions_of_a_prompt_meet_the_same_noise_and_long_prompts_lose_their_front() -> None:
    one, other = (completion([0, 1, 2, 1], tokens, LENGTH) for tokens in ([2, 0], [1, 1]))
    assert one.index == other.index != completion([0, 1, 2], [1, 1], LENGTH).index
    assert (one.tokens.tolist(), one.num_prompt) == ([1, 2, 0], 1)
    with pytest.raises(ValueError, match="4 tokens"):
        completion([], [1] * 4, LENGTH)
    scorer = TableScorer(MixingSchedule(VOCABULARY, MASK, -1000.0))
    config = LikelihoodConfig(num_draws=8)
    for a, b in zip(*(noised(item, scorer, config) for item in (one, other)), strict=True):
        assert np.array_equal(a.xt == MASK, b.xt == MASK)


def test_the_effective_level_is_that_of_the_tokens_that_stayed_clean() -> None:
    """Published benchmarks judge a draw by it; the noise itself is the same."""
    scorer = TableScorer(MixingSchedule(VOCABULARY, MASK, -1000.0))
    item = Item(np.array([2, 0, 1]), index=3, num_prompt=1)
    plain, effective = (
        LikelihoodConfig(num_draws=16, effective_log_snr=flag) for flag in (False, True)
    )
    found = set()
    for a, b in zip(*(noised(item, scorer, config) for config in (plain, effective)), strict=True):
        assert np.array_equal(a.xt, b.xt)
        kept = int((b.xt[1:] == b.x0[1:]).sum())
        assert b.log_snr[1:].tolist() == [{0: -9.0, 1: 0.0, 2: 9.0}[kept]] * 2
        found.add(kept)
    assert found == {0, 1, 2}


def test_intervals_are_students_and_cover_the_mean() -> None:
    for freedom in (1, 2, 3, 4, 7, 10, 11, 15, 30, 1000):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 1.0, size=8)
    estimate = estimate_ratio(values, np.full(8, 2.0), np.full(8, 0.25))
    low, high = stats.t.interval(0.95, 7, values.mean() / 2, stats.sem(values) / 2)
    assert estimate[:2] == pytest.approx((values.mean() / 2, stats.sem(values) / 2))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-4)
    assert estimate.noise_standard_error == pytest.approx(0.5 / math.sqrt(8) / 2)
    assert estimate.scaled(10).mean == pytest.approx(10 * estimate.mean)
    covered = 0
    for _ in range(2000):
        sizes = rng.integers(5, 50, size=12).astype(float)
        found = estimate_ratio(sizes * rng.normal(2, 0.5, 12), sizes, np.zeros(12))
        covered += found.low < 2 < found.high
    assert 0.92 < covered / 2000 < 0.97
    single = estimate_ratio(np.array([6.0]), np.array([2.0]), np.array([math.nan]))
    assert single == (3.0, None, None, None, None, 1)


MODEL_SHIFT = 0.0


def model_items() -> list[Item]:
    """Whole sequences, and completions with a prompt, of many lengths."""
    numbers = np.random.default_rng(2)
    items = [
        Item(numbers.integers(4, 97, size), index=100 + size, num_prompt=prompt)
        for size, prompt in ((48, 0), (20, 0), (9, 4), (33, 20), (48, 1), (7, 0))
    ]
    documents = np.repeat([0, 1, 2], [10, 5, 5])
    return [*items, Item(items[1].tokens, index=5, documents=documents)]


def hugging_face_scores(config: LikelihoodConfig, **changes: Any) -> Scores:
    model = recorded_model("A", noise_type=MODEL_SHIFT, **changes)
    return score(HuggingFaceScorer(model, model.mixing_schedule(3)), model_items(), config)


@pytest.mark.parametrize("canvas", [False, True])
def test_figures_do_not_depend_on_the_batch_size(canvas: bool, single_rank: None) -> None:
    small, large = (
        hugging_face_scores(LikelihoodConfig(num_draws=4, batch_size=size, canvas=canvas))
        for size in (1, 28)
    )
    np.testing.assert_allclose(small.elbo, large.elbo, rtol=2e-5, atol=1e-5)
    assert small.nats.min() > 1
    assert np.array_equal(small.log_snr, large.log_snr)


@pytest.mark.parametrize("times", ["even", "squared"])
def test_the_table_by_log_snr_adds_up_to_the_bound(times: str, single_rank: None) -> None:
    schedule = recorded_model("A", noise_type=MODEL_SHIFT).mixing_schedule(3)
    scores = hugging_face_scores(LikelihoodConfig(num_draws=8, times=times))  # type: ignore[arg-type]
    table = scores.by_log_snr(schedule, num_bins=6)
    assert sum(row["share"] for row in table) == pytest.approx(1)
    assert sum(row["tokens"] for row in table) == 8 * scores.num_tokens.sum()
    # The bound is the mean of the bins, each by the share of the training law that it stands for.
    stands_for = [row["share"] * scores.nats.sum() / row["elbo"] for row in table]
    assert sum(stands_for) == pytest.approx(scores.num_tokens.sum())
    assert [row["from"] for row in table] == sorted(row["from"] for row in table)


def rank_scores(rank: int, layouts: dict[str, dict[str, int]]) -> dict[str, Scores]:
    """The same weights as the training model at several layouts, and as the Hugging Face one."""
    from megatron_ext.checkpoint.hf_config import model_config
    from megatron_ext.checkpoint.hf_weights import load_published_weights
    from megatron_ext.config import Config
    from megatron_ext.inference.scorers import TrainingScorer
    from megatron_ext.model.diffusion_model import DiffusionModel
    from megatron_ext.parallel.groups import initialize_parallel

    torch.set_num_threads(1)
    source = recorded_model("A", noise_type=MODEL_SHIFT)
    config = LikelihoodConfig(num_draws=3, batch_size=5)
    found = {"hugging face": hugging_face_scores(config)}
    for name, sizes in layouts.items():
        settings = Config(model=model_config(source.config.to_dict())).with_sections(
            parallel=sizes,
            model={"make_vocab_size_divisible_by": 1},
            diffusion={"objective": "hybrid", "mixing_shift": MODEL_SHIFT},
        )
        groups = initialize_parallel(settings.parallel)
        model = DiffusionModel(
            settings, source.config.vocab_size, source.mixing_schedule(3), groups,
            pre_process=groups.pp.rank() == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1,
        ).eval()  # fmt: skip
        load_published_weights([model], source.state_dict(), source.config.vocab_size)
        found[name] = score(TrainingScorer(model), model_items(), config)
    return found


def test_figures_agree_between_models_layouts_and_ranks(
    single_rank: None,
) -> None:
    layouts = {
        "tp 2": {"tensor_model_parallel_size": 2},
        "pp 2": {"pipeline_model_parallel_size": 2},
        "dp 2": {},
    }
    expected = hugging_face_scores(LikelihoodConfig(num_draws=3, batch_size=4))
    for found in run_ranks(2, rank_scores, layouts):
        for name, scores in found.items():
            np.testing.assert_allclose(
                scores.elbo, expected.elbo, rtol=1e-4, atol=1e-4, err_msg=name
            )
