"""What `tools/evaluate.py` reports: bounds of texts or packed tokens, and choices of completions.

Every rank computes the same report; dictionaries hold plain numbers and are written as JSON as they
stand. docs/evaluation.md says what the figures mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_ext.config import require
from megatron_ext.data.documents import cut_into_pieces, find_files, read_texts
from megatron_ext.data.indexed import open_indexed
from megatron_ext.data.packing import PackedDataset
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.inference.likelihood import (
    Item,
    LikelihoodConfig,
    completion,
    estimate_ratio,
    score,
)
from megatron_ext.inference.load import LoadedModel
from megatron_ext.inference.scorers import Scorer, TrainingScorer, scorer_of


class Corpus(NamedTuple):
    """Sequences to score, and the units over which an interval is taken."""

    items: list[Item]
    unit_of_item: np.ndarray
    """[n] int64, the document, or the sequence itself."""
    bytes_of_unit: np.ndarray | None
    """[units] UTF-8 bytes; None where they are unknown."""
    unit: str


def read_documents(files: Sequence[str], text_key: str = "text") -> Iterator[str]:
    """The texts of .jsonl, .txt or .parquet files, in order; `ValueError` at a bad record."""

    def refuse(what: str) -> None:
        raise ValueError(what)

    for piece in cut_into_pieces(find_files(files), 1 << 62):
        yield from read_texts(piece, text_key, refuse)


def corpus_of_texts(
    texts: Sequence[str], tokenizer: Tokenizer, context: int, *, append_eos: bool = True
) -> Corpus:
    """Each text with its end of document, cut into windows of at most `context` tokens.

    Windows are scored on their own; a text is the unit.
    """
    items: list[Item] = []
    unit_of_item: list[int] = []
    end = [tokenizer.eos_id] if append_eos and tokenizer.eos_id is not None else []
    for unit, ids in enumerate(tokenizer.encode_batch(texts)):
        whole = np.array([*ids, *end], dtype=np.int64)
        for start in range(0, len(whole), context):
            items.append(Item(whole[start : start + context], len(items)))
            unit_of_item.append(unit)
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    if not items or not sizes.any():
        raise ValueError("--input: there is no text in it.")
    return Corpus(items, np.array(unit_of_item), sizes, "documents")


def corpus_of_tokens(
    prefix: str, scorer: Scorer, tokenizer: Tokenizer, num_sequences: int | None
) -> Corpus:
    """Packed sequences of a `.bin/.idx` pair, as a run's validation packs them."""
    data = open_indexed(
        prefix,
        vocab_size=scorer.schedule.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    packed = PackedDataset(data, scorer.context, seed=0, shuffle=False)
    count = len(packed) if num_sequences is None else min(num_sequences, len(packed))
    if count == 0:
        raise ValueError(
            f"--data-path {prefix}: {packed.num_tokens} tokens do not fill one sequence of "
            f"{scorer.context}; score the text with --input."
        )
    resets = isinstance(scorer, TrainingScorer) and scorer.model.settings.data.reset_attention_mask
    samples = [packed.sample(i) for i in range(count)]
    items = [
        Item(sample.tokens, index, documents=sample.documents if resets else None)
        for index, sample in enumerate(samples)
    ]
    per_token = packed.bytes_per_token
    sizes = None if per_token is None else np.full(count, scorer.context * per_token)
    return Corpus(items, np.arange(count), sizes, "sequences")


def bound_report(model: LoadedModel, corpus: Corpus, config: LikelihoodConfig) -> dict[str, Any]:
    """Nats per token, bits per byte, perplexity, and the bound by log-SNR."""
    scorer = scorer_of(model)
    scores = score(scorer, corpus.items, config)
    num_units = int(corpus.unit_of_item[-1]) + 1 if corpus.bytes_of_unit is None else None
    num_units = num_units or len(corpus.bytes_of_unit)  # type: ignore[arg-type]

    def by_unit(values: np.ndarray) -> np.ndarray:
        return np.bincount(corpus.unit_of_item, weights=values, minlength=num_units)

    nats, tokens = by_unit(scores.nats), by_unit(scores.num_tokens)
    variance = by_unit(scores.variance)
    per_token = estimate_ratio(nats, tokens, variance)
    report = {
        "nats_per_token": per_token._asdict(),
        "perplexity": {
            name: None if value is None else math.exp(min(value, 700.0))
            for name, value in per_token._asdict().items()
            if name in ("mean", "low", "high")
        },
        "bits_per_byte": None,
        "num_tokens": int(tokens.sum()),
        "num_bytes": None,
        "num_sequences": len(corpus.items),
        "unit": corpus.unit,
        "elbo_by_log_snr": scores.by_log_snr(scorer.schedule),
        **conditions(model, config),
    }
    if corpus.bytes_of_unit is not None:
        per_byte = estimate_ratio(nats, corpus.bytes_of_unit, variance)
        report["bits_per_byte"] = per_byte.scaled(1 / math.log(2))._asdict()
        report["num_bytes"] = round(float(corpus.bytes_of_unit.sum()))
    return report


def conditions(model: LoadedModel, config: LikelihoodConfig) -> dict[str, Any]:
    """What a figure depends on besides the text."""
    settings = asdict(config)
    del settings["batch_size"]
    return {
        "model": model.name,
        "context": model.context,
        "precision": precision_of(model),
        "tokenizer_sha256": model.tokenizer.fingerprint,
        **settings,
    }


def precision_of(model: LoadedModel) -> str:
    """The dtype of the model's matrices."""
    network = model.denoiser.model  # type: ignore[attr-defined]
    widest = max(network.parameters(), key=lambda parameter: parameter.numel())
    return str(widest.dtype).removeprefix("torch.")


def encode_pair(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of what follows.

    Both are encoded as one text and parted where the prompt alone ends; white space at the end of
    the prompt goes with the completion, as vocabularies join it with the next word. Where the
    vocabulary joins the prompt's last token with what follows, there is no such place, and both are
    encoded on their own.
    """
    stripped = prompt.rstrip()
    text, prompt = prompt[len(stripped) :] + text, stripped
    front = tokenizer.encode(prompt) if prompt else []
    whole = tokenizer.encode(prompt + text)
    if whole[: len(front)] != front:
        return front, tokenizer.encode(text)
    return front, whole[len(front) :]


class Choice(NamedTuple):
    """A completion with the bound on its log-likelihood."""

    text: str
    log_likelihood: float
    """Lower bound in nats, over the noise."""
    standard_error: float | None
    """Over the noise; None for one draw."""
    num_tokens: int


class Edges(NamedTuple):
    """Special tokens around prompt and completion."""

    bos: bool = False
    """Begin prompts with BOS."""
    eos: bool = False
    """End completions with EOS, which is scored."""

    def around(
        self, tokenizer: Tokenizer, prompt: list[int], tokens: list[int]
    ) -> tuple[list[int], list[int]]:
        bos = [tokenizer.special_id("bos")] if self.bos else []
        return bos + prompt, tokens + ([tokenizer.special_id("eos")] if self.eos else [])


def score_pairs(
    model: LoadedModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    config: LikelihoodConfig,
    edges: Edges,
) -> list[tuple[float, float | None, int]]:
    """(log-likelihood, standard error, tokens) of completions given prompts, as tokens."""
    scorer = scorer_of(model)
    items = [
        completion(*edges.around(model.tokenizer, prompt, tokens), scorer.context)
        for prompt, tokens in pairs
    ]
    scores = score(scorer, items, config)
    return [
        (-float(nats), None if math.isnan(error) else float(error), int(count))
        for nats, error, count in zip(
            scores.nats, scores.standard_error, scores.num_tokens, strict=True
        )
    ]


def choices_report(
    model: LoadedModel, path: Path, config: LikelihoodConfig, edges: Edges
) -> dict[str, Any]:
    """Bounds of the completions of every line of a file, and which is likeliest."""
    questions = read_questions(path)
    texts = [(prompt, text) for prompt, completions in questions for text in completions]
    pairs = [encode_pair(model.tokenizer, *pair) for pair in texts]
    figures = iter(score_pairs(model, pairs, config, edges))
    answers = []
    for prompt, completions in questions:
        found = [Choice(text, *next(figures)) for text in completions]
        likely = [choice.log_likelihood for choice in found]
        per_token = [choice.log_likelihood / choice.num_tokens for choice in found]
        answers.append(
            {
                "prompt": prompt,
                "completions": [choice._asdict() for choice in found],
                "argmax": int(np.argmax(likely)),
                "argmax_per_token": int(np.argmax(per_token)),
            }
        )
    return {"answers": answers, **edges._asdict(), **conditions(model, config)}


def read_questions(path: Path) -> list[tuple[str, list[str]]]:
    """(prompt, completions) of every JSON line; `ValueError` names the line that has none."""
    require(path.is_file(), "completions", str(path), "there is no such file.")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, completions = record["prompt"], record["completions"]
            is_right = isinstance(prompt, str) and all(
                isinstance(x, str) and x for x in completions
            )
        except (ValueError, KeyError, TypeError):
            is_right, completions = False, []
        if not is_right or not completions:
            raise ValueError(
                f'--completions {path}, line {number}: give {{"prompt": "...", "completions": '
                '["...", ...]}.'
            )
        questions.append((prompt, completions))
    require(bool(questions), "completions", str(path), "there is no line in it.")
    return questions


def summary(report: dict[str, Any]) -> str:
    """A report for people."""
    if "answers" in report:
        return "\n".join(_answer(answer) for answer in report["answers"])
    lines = [
        _line("nats/token", report["nats_per_token"]),
        _line("perplexity", report["perplexity"]),
    ]
    if report["bits_per_byte"] is not None:
        lines.append(_line("bits/byte", report["bits_per_byte"]))
    noise = report["nats_per_token"]["noise_standard_error"]
    lines += [
        f"{report['num_tokens']:,} tokens in {report['nats_per_token']['num_units']} "
        f"{report['unit']}; {report['num_draws']} noise levels each, seed {report['seed']}"
        + ("" if noise is None else f", of whose noise comes a standard error of {noise:.4f}"),
        "log-SNR         nats/token  share",
    ]
    lines += [
        f"{row['from']:+6.1f} {row['to']:+6.1f} {row['elbo']:12.4f} {row['share']:6.1%}"
        for row in report["elbo_by_log_snr"]
    ]
    return "\n".join(lines)


def _line(name: str, figures: dict[str, float | None]) -> str:
    interval = ""
    if figures["low"] is not None:
        interval = f"  [{figures['low']:.4f}, {figures['high']:.4f}]"
    return f"{name:<12}{figures['mean']:.4f}{interval}"


def _answer(answer: dict[str, Any]) -> str:
    lines = [f"--- {answer['prompt']}"]
    for number, choice in enumerate(answer["completions"]):
        error = choice["standard_error"]
        lines.append(
            f"{'*' if number == answer['argmax'] else ' '} {choice['log_likelihood']:10.3f}"
            + ("" if error is None else f" +- {error:.3f}")
            + f"  {choice['text']}"
        )
    return "\n".join(lines)
