"""Evaluation as a user asks for it: which model, on which text, by which figure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_ext.config import ParallelConfig, require
from megatron_ext.inference.likelihood import LikelihoodConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, and on what."""

    load: str | None = None
    """A run's --save folder, or a Hugging Face folder."""
    input: tuple[str, ...] = ()
    """Texts (.jsonl with "text", .txt, .parquet): the bound of each, in nats/token, bits/byte."""
    data_path: str | None = None
    """Prefix of .bin/.idx files, packed as in validation, instead of --input."""
    num_sequences: int | None = None
    """Take the first so many texts or packed sequences; all when absent."""
    completions: Path | None = None
    """JSON lines {"prompt": ..., "completions": [...]}: the log-likelihood of each completion."""
    prepend_bos: bool = False
    """Begin prompts with BOS."""
    score_eos: bool = False
    """End completions with EOS and score it."""
    generative_perplexity: bool = False
    """Judge --samples: perplexity, token entropy, distance from --reference."""
    judge: str | None = None
    """Folder of a causal language model in Hugging Face format, not one of diffusion."""
    samples: tuple[str, ...] = ()
    """Samples, as JSON lines with "text" (what tools/generate.py --output writes: a prompt is a
    part of it and judged with it)."""
    reference: tuple[str, ...] = ()
    """Real texts to compare samples with."""
    output: Path | None = None
    """Write the report as JSON."""
    ckpt_step: int | None = None
    """Checkpoint of a run to use; the latest when absent."""
    tokenizer_model: str | None = None
    """Where the tokenizer is, if not where it was in training."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; ranks beyond tp x pp share the sequences."""
    pipeline_model_parallel_size: int = 1
    """Ranks in a pipeline of layers."""


def evaluate(config: EvaluateConfig, settings: LikelihoodConfig) -> tuple[dict[str, Any], str]:
    """(report, report for people) of what the configuration asks for; the same on every rank."""
    _refuse_without_effect(config, settings)
    return _quality(config) if config.generative_perplexity else _likelihood(config, settings)


def _refuse_without_effect(config: EvaluateConfig, settings: LikelihoodConfig) -> None:
    """`ValueError` for options that what is asked for would leave unused, or that make no bound."""
    unchanged = {field.name: field.default for field in fields(EvaluateConfig)}

    def leave_out(names: tuple[str, ...], advice: str) -> None:
        for name in names:
            require(getattr(config, name) == unchanged[name], name, getattr(config, name), advice)

    if config.generative_perplexity:
        of_likelihoods = unchanged.keys() - {
            "generative_perplexity", "judge", "samples", "reference", "output",
        }  # fmt: skip
        leave_out(tuple(sorted(of_likelihoods)), "--generative-perplexity has no use for it.")
        return
    leave_out(("judge", "samples", "reference"), "it is for --generative-perplexity.")
    count = config.num_sequences
    require(count is None or count > 0, "num_sequences", count, "give 1 or more.")
    if config.completions is not None:
        leave_out(("num_sequences",), "--completions scores all of its lines.")
        return
    leave_out(("prepend_bos", "score_eos"), "it is for --completions.")
    settings.require_bound()


def _quality(config: EvaluateConfig) -> tuple[dict[str, Any], str]:
    from megatron_ext.inference import reports, sample_quality
    from megatron_ext.parallel.groups import initialize_distributed

    require(bool(config.samples), "samples", config.samples, "name a file of samples.")
    require(config.judge is not None, "judge", config.judge, "name a folder with a causal model.")
    initialize_distributed(ParallelConfig())
    samples, reference = (
        list(reports.read_documents(files)) if files else None
        for files in (config.samples, config.reference)
    )
    report = sample_quality.quality_report(
        sample_quality.Judge(config.judge), samples or [], reference
    )
    return report, sample_quality.quality_summary(report)


def _likelihood(config: EvaluateConfig, settings: LikelihoodConfig) -> tuple[dict[str, Any], str]:
    from megatron_ext.inference import reports
    from megatron_ext.inference.load import load_model
    from megatron_ext.inference.scorers import scorer_of

    ways = [bool(config.input), config.data_path is not None, config.completions is not None]
    if sum(ways) != 1:
        raise ValueError("give one of --input, --data-path, --completions, --generative-perplexity")
    require(config.load is not None, "load", config.load, "name a run or a Hugging Face folder.")
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
    )
    model = load_model(
        config.load, config.ckpt_step, config.tokenizer_model, parallel, replicas=True
    )
    if config.completions is not None:
        edges = reports.Edges(config.prepend_bos, config.score_eos)
        report = reports.choices_report(model, config.completions, settings, edges)
    elif config.data_path is not None:
        scorer = scorer_of(model)
        corpus = reports.corpus_of_tokens(
            config.data_path, scorer, model.tokenizer, config.num_sequences
        )
        report = reports.bound_report(model, corpus, settings)
    else:
        texts = list(reports.read_documents(config.input))[: config.num_sequences]
        corpus = reports.corpus_of_texts(texts, model.tokenizer, model.context)
        report = reports.bound_report(model, corpus, settings)
    return report, reports.summary(report)
