"""How good samples are: perplexity under a judge, and what exposes samples that please it cheaply.

A judge is a causal language model in Hugging Face format. Its perplexity on samples alone can be
gamed, since one common word repeated is very likely text. So it comes with the entropy of each
sample's own tokens, which repetition lowers, and with a distance between the samples and a
reference text as the judge's hidden states see them, which any lack of variety raises.

The distance is the squared maximum mean discrepancy with a Gaussian kernel (Gretton et al. 2012).
Its estimate is unbiased for any number of samples, where Frechet distances and divergences between
n-gram counts are too large by an amount that depends on that number; a permutation test says
whether it is above zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ext.inference.likelihood import Estimate, estimate_ratio
from megatron_ext.parallel.groups import device_of_rank

NUM_PERMUTATIONS = 999


class Judged(NamedTuple):
    """What the judge says of a text."""

    nll: float
    """Nats of the scored tokens."""
    num_scored: int
    num_tokens: int
    entropy: float
    """Of the distribution of the text's own tokens, nats."""
    state: np.ndarray
    """[h] float64, mean of the last hidden states."""


def token_entropy(ids: Sequence[int]) -> float:
    """Entropy of the frequencies of the ids, nats; 0 for none."""
    counts = np.array(list(Counter(ids).values()), dtype=np.float64)
    shares = counts / max(counts.sum(), 1.0)
    return float(-(shares * np.log(shares)).sum())


class Judge:
    """A causal language model with its tokenizer."""

    def __init__(self, folder: str | Path, max_tokens: int = 1024) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"--judge {folder} is no Hugging Face folder: it has no config.json.")
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(folder, **options)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--judge {folder}: give a causal language model with its tokenizer that needs no "
                f"code of its own. {error}"
            ) from error
        self.model = model.to(device_of_rank()).eval()
        self.bos = self.tokenizer.bos_token_id
        limit = getattr(config, "max_position_embeddings", None) or max_tokens
        self.max_tokens = min(max_tokens, limit) - (self.bos is not None)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)[: self.max_tokens]

    @torch.no_grad()
    def judge(self, ids: list[int]) -> Judged:
        """Score one text; its first token only where there is a BOS to predict it from."""
        front = [] if self.bos is None else [self.bos]
        whole = torch.tensor([front + ids], device=self.model.device)
        if not ids:
            return Judged(0.0, 0, 0, 0.0, np.zeros(self.model.config.hidden_size))
        output = self.model(whole, output_hidden_states=True)
        targets = whole[0, 1:]
        logits = output.logits[0, : len(targets)].float()
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        state = output.hidden_states[-1][0, len(front) :].double().mean(0)
        return Judged(float(nll), len(targets), len(ids), token_entropy(ids), state.cpu().numpy())

    def judge_all(self, texts: Sequence[list[int]]) -> list[Judged]:
        """Score all texts, divided over the ranks; every rank gets all results."""
        rank, size = 0, 1
        if torch.distributed.is_initialized():
            rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = [self.judge(ids) for ids in texts[rank::size]]
        if size == 1:
            return mine
        parts: list[list[Judged]] = [[] for _ in range(size)]
        torch.distributed.all_gather_object(parts, mine)
        return [parts[i % size][i // size] for i in range(len(texts))]


def maximum_mean_discrepancy(
    one: np.ndarray, other: np.ndarray, seed: int = 0, permutations: int = NUM_PERMUTATIONS
) -> tuple[float, float]:
    """(unbiased squared distance, permutation p-value) of samples [n, h] and [m, h].

    Columns are divided by their pooled deviation, since a few dimensions of hidden states are much
    larger than all others; the kernel's width is the median distance.
    """
    states = torch.from_numpy(np.concatenate([one, other]))
    states = states / states.std(dim=0, keepdim=True).clamp_min(1e-12)
    squared = torch.cdist(states, states).square()
    above = squared[tuple(torch.triu_indices(len(states), len(states), 1))]
    kernel = torch.exp(-squared / above.median().clamp_min(1e-12)).fill_diagonal_(0.0)
    # Column 0 is the split that was found, the others are random ones.
    is_one = torch.zeros(len(states), 1 + permutations, dtype=torch.float64)
    is_one[: len(one), 0] = 1
    numbers = np.random.default_rng(seed)
    for column in range(1, 1 + permutations):
        is_one[numbers.permutation(len(states))[: len(one)], column] = 1
    value, *others = _discrepancies(kernel, is_one).tolist()
    # Equal splits may differ in their last digits.
    reached = sum(other >= value - 1e-12 for other in others)
    return value, (1 + reached) / (1 + permutations)


def _discrepancies(kernel: Tensor, is_one: Tensor) -> Tensor:
    """[k] of k splits into the rows with a 1 in `is_one` [n, k] and the others.

    `kernel` [n, n] float64 has no diagonal. All splits cost one product of matrices.
    """
    size = is_one[:, 0].sum()
    rest = len(kernel) - size
    within = (is_one * (kernel @ is_one)).sum(0)
    from_one = kernel.sum(1) @ is_one
    among = kernel.sum() - 2 * from_one + within
    between = from_one - within
    return within / (size * (size - 1)) + among / (rest * (rest - 1)) - 2 * between / (size * rest)


def pieces(texts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Pieces of the given lengths, over and over, each from the beginning of a text on.

    Entropy and pooled states depend on length, so only pieces of equal lengths compare. What a
    text lacks is taken from those that follow it; what it has too much is left out.
    """
    found: list[list[int]] = []
    piece: list[int] = []
    for text in texts:
        piece = piece + text
        length = lengths[len(found) % len(lengths)]
        if len(piece) >= length:
            found.append(piece[:length])
            piece = []
    return found


def _figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Perplexity and entropy of texts, with intervals over them."""
    columns = [np.array(x, dtype=np.float64) for x in list(zip(*judged, strict=True))[:4]]
    nll, scored, tokens, entropy = columns
    unknown = np.full(len(judged), math.nan)
    per_token = estimate_ratio(nll, scored, unknown)
    return {
        "perplexity": _exponential(per_token),
        "token_entropy": _interval(estimate_ratio(entropy, np.ones(len(judged)), unknown)),
        "tokens_per_text": float(tokens.mean()),
        "num_texts": len(judged),
        "num_empty": int((tokens == 0).sum()),
    }


def _interval(estimate: Estimate) -> dict[str, float | None]:
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}


def _exponential(estimate: Estimate) -> dict[str, float | None]:
    return {k: None if x is None else math.exp(x) for k, x in _interval(estimate).items()}


def quality_report(
    judge: Judge, samples: Sequence[str], reference: Sequence[str] | None
) -> dict[str, Any]:
    """Figures of the samples, and of pieces of the reference that are as long."""
    encoded = [judge.encode(text) for text in samples]
    lengths = [len(ids) for ids in encoded if ids]
    if not lengths:
        raise ValueError("--samples: there is no text in them.")
    judged = judge.judge_all(encoded)
    if not any(text.num_scored for text in judged):
        raise ValueError("--samples: they have one token each, and the judge has no BOS before it.")
    report: dict[str, Any] = {
        "samples": _figures(judged),
        "reference": None,
        "distance": None,
        "judge": judge.model.config._name_or_path,
        "judge_tokens": judge.max_tokens,
        "scores_first_token": judge.bos is not None,
    }
    if reference is not None:
        known = judge.judge_all(pieces([judge.encode(text) for text in reference], lengths))
        if min(len(known), len(judged)) < 2:
            raise ValueError("--reference: a distance needs two samples and two texts at least.")
        value, p = maximum_mean_discrepancy(
            *(np.stack([text.state for text in texts]) for texts in (judged, known))
        )
        report["reference"] = _figures(known)
        report["distance"] = {
            "squared_mmd": value, "p_value": p, "num_permutations": NUM_PERMUTATIONS,
        }  # fmt: skip
    return report


def quality_summary(report: dict[str, Any]) -> str:
    """A report for people."""
    lines = [f"{'':<11}perplexity  token entropy  tokens/text  texts"]
    for name in ("samples", "reference"):
        figures = report[name]
        if figures is not None:
            lines.append(
                f"{name:<11}{figures['perplexity']['mean']:10.2f}"
                f"{figures['token_entropy']['mean']:15.3f}{figures['tokens_per_text']:13.1f}"
                f"{figures['num_texts']:7d}"
            )
    if report["distance"] is not None:
        distance = report["distance"]
        lines.append(
            f"squared MMD {distance['squared_mmd']:.4f}, p = {distance['p_value']:.3f} that it is 0"
        )
    return "\n".join(lines)
