"""The published likelihood procedure, against a second writing of it from its description.

    sequence = prompt + completion, the front of the prompt cut off where both do not fit; behind it
    noise up to the context, which is noised and attended and never scored
    for i < n: alpha_i from linspace(1e-4, 0.9999, n + 1), lambda_i = its logit within +-9; noise at
    lambda_i everywhere but in the prompt; the logit of the share of the completion's tokens that
    show their label, within +-9, stands for lambda_i in the loss
    the bound's loss per token, averaged over i, summed over the completion

The second writing takes the noised tokens from the first, and computes everything else by itself,
in float64 and over the whole vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_ext.inference.likelihood import (
    Item,
    LikelihoodConfig,
    completion,
    noise_item,
    noise_levels,
    score,
)
from megatron_ext.inference.scorers import HuggingFaceScorer
from tests.diffusion.bounds import STANDARD_ERRORS
from tests.hf.golden import recorded_model

MASK, VOCABULARY, CONTEXT = 3, 97, 48
DRAWS = 9
CONFIG = LikelihoodConfig(num_draws=DRAWS, times="grid", canvas=True, effective_log_snr=True)


def bound_of_token(logits: np.ndarray, z: int, x: int, level: float, shift: float) -> float:
    """w_e (KL + IS) of one token, as the paper writes it."""
    logits[MASK] = -np.inf
    guess = np.exp(logits - logits.max())
    guess /= guess.sum()
    alpha, share = (1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in (level, level + shift))
    noise = np.full(VOCABULARY, share / (VOCABULARY - 1))
    noise[MASK] = 1 - share
    slope = np.full(VOCABULARY, share * (1 - share) / (VOCABULARY - 1))
    slope[MASK] = -share * (1 - share)
    truth = np.zeros(VOCABULARY)
    truth[x] = 1
    q, p = (alpha * y + (1 - alpha) * noise for y in (truth, guess))
    there = q > 0
    kl = (q[there] * np.log(q[there] / p[there])).sum()
    is_div = q[z] / p[z] - math.log(q[z] / p[z]) - 1
    weight = (noise[z] - slope[z]) / (noise[z] + math.exp(level) * (z == x))
    return weight / (alpha * (1 - alpha)) * (kl + is_div)


@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1000.0])
@pytest.mark.parametrize("num_tokens", [(11, 5), (60, 4), (2, 46)])
def test_scores_are_those_of_the_published_procedure(
    shift: float, num_tokens: tuple[int, int], single_rank: None
) -> None:
    model = recorded_model("A", noise_type=shift)
    scorer = HuggingFaceScorer(model, model.mixing_schedule(MASK))
    numbers = np.random.default_rng(4)
    prompt, tokens = (numbers.integers(4, VOCABULARY, size).tolist() for size in num_tokens)
    item = completion(prompt, tokens, CONTEXT)
    found = score(scorer, [item], CONFIG)

    whole = (prompt + tokens)[-CONTEXT:]
    start, end = len(whole) - len(tokens), len(whole)
    total = 0.0
    for i in range(DRAWS):
        alpha = 1e-4 + i * (0.9999 - 1e-4) / DRAWS
        level = min(max(math.log(alpha / (1 - alpha)), -9.0), 9.0)
        assert found.log_snr[0, i] == pytest.approx(level)
        row = noise_item(item, i, level, scorer, CONFIG)
        assert (row.xt[:start] == whole[:start]).all() and len(row.xt) == CONTEXT
        at_noise = torch.arange(CONTEXT) >= start
        attend = (at_noise[:, None] >= at_noise).expand(1, -1, -1)
        with torch.no_grad():
            logits = model(torch.from_numpy(row.xt)[None], attend).logits[0].double().numpy()
        kept = np.mean(row.xt[start:end] == np.array(tokens))
        with np.errstate(divide="ignore"):
            effective = float(np.clip(np.log(kept) - np.log1p(-kept), -9, 9))
        total += sum(
            bound_of_token(logits[j], row.xt[j], whole[j], effective, shift)
            for j in range(start, end)
        )
    assert found.nats[0] == pytest.approx(total / DRAWS, rel=2e-4)


def test_tokens_of_the_grid_are_kept_with_its_shares() -> None:
    model = recorded_model("A", noise_type=-1000.0)
    scorer = HuggingFaceScorer(model, model.mixing_schedule(MASK))
    kept = np.zeros(4)
    config = LikelihoodConfig(num_draws=4, times="grid")
    for index in range(400):
        item = Item(np.arange(4, 44), index)
        for draw, level in enumerate(noise_levels(scorer.schedule, config, index).log_snr):
            kept[draw] += (noise_item(item, draw, level, scorer, config).xt == item.tokens).sum()
    shares = np.array([1e-4, 0.25005, 0.5, 0.74995])
    # The first level is cut to -9.
    shares[0] = 1 / (1 + math.exp(9))
    errors = np.sqrt(shares * (1 - shares) / 16_000)
    assert (np.abs(kept / 16_000 - shares) < STANDARD_ERRORS * errors + 1e-4).all()
