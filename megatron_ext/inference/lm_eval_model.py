"""The model `gidd` of lm-evaluation-harness; importing this module registers it.

lm_eval finds models by its registry alone and loads no plug-ins, so `tools/evaluate_tasks.py`
imports this module and hands over to lm_eval's own command line. `--model_args` are `load` and the
fields of `LikelihoodConfig`, `SamplingConfig` and `HarnessConfig`; all of them are in the results.

Log-likelihoods are Monte Carlo bounds (`inference.likelihood`): they depend on the texts, the seed
and the number of draws. A sample depends on its prompt, the seed, and how often the prompt came
before. Neither depends on the order of different requests, the batch size or the ranks. All ranks
see all requests and divide them over the replicas of the model; lm_eval takes the results of the
first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from megatron_ext.config import ParallelConfig
from megatron_ext.hf.sampling_gidd import SpecialTokens, sample
from megatron_ext.hf.steps_gidd import SamplingConfig
from megatron_ext.inference.likelihood import LikelihoodConfig, index_of, score
from megatron_ext.inference.load import load_model
from megatron_ext.inference.reports import (
    Edges,
    conditions,
    corpus_of_texts,
    encode_pair,
    score_pairs,
)
from megatron_ext.inference.scorers import scorer_of


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """What neither the likelihood nor the sampler knows about."""

    ckpt_step: int | None = None
    """Checkpoint of a run to use; the latest when absent."""
    tokenizer_model: str | None = None
    """Where the tokenizer is, if not where it was in training."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks in a pipeline of layers."""
    prepend_bos: bool = False
    """Begin prompts with BOS."""
    score_eos: bool = False
    """End completions with EOS and score it."""
    check_greedy: bool = False
    """Tell whether a completion is what adaptive sampling at temperature 0 makes of its prompt, one
    token a step; it costs a generation each. Without, no completion counts as greedy."""


class Sampled(NamedTuple):
    """A prompt to continue."""

    config: SamplingConfig
    number: int
    """Of the request."""
    text: str
    occurrence: int
    """How often the prompt came before."""


@register_model("gidd")
class GiddLM(LM):
    """A training run or a Hugging Face folder for lm_eval."""

    def __init__(
        self,
        load: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        # The harness names a device whether asked or not; here it follows from the rank.
        del max_batch_size, device
        if load is None:
            raise ValueError("--model_args: give load=FOLDER, a run or a Hugging Face folder.")
        if not str(batch_size).isdecimal():
            raise ValueError(f"--batch_size is {batch_size!r}: give a number.")
        sampling = _chosen(SamplingConfig, arguments)
        # Tasks say how warm they want their samples, unless the command does.
        self.temperature = sampling.get("temperature")
        self.sampling = SamplingConfig(**{"max_length": 256, **sampling})
        self.likelihood = LikelihoodConfig(
            batch_size=int(batch_size), **_chosen(LikelihoodConfig, arguments)
        )
        self.settings = HarnessConfig(**_chosen(HarnessConfig, arguments))
        known = {
            f.name for x in (SamplingConfig, LikelihoodConfig, HarnessConfig) for f in fields(x)
        }
        if unknown := arguments.keys() - known:
            raise ValueError(
                f"--model_args {', '.join(sorted(unknown))}: choose from {sorted(known)}"
            )
        parallel = ParallelConfig(
            tensor_model_parallel_size=self.settings.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.settings.pipeline_model_parallel_size,
        )
        self.model = load_model(
            load, self.settings.ckpt_step, self.settings.tokenizer_model, parallel, replicas=True
        )
        self.scorer = scorer_of(self.model)
        self._device = self.model.device
        self.edges = Edges(self.settings.prepend_bos, self.settings.score_eos)
        self.standard_errors: list[float] = []

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.path

    def get_model_info(self) -> dict[str, Any]:
        """Everything the figures depend on, for the "config" of the results."""
        sampling = {**asdict(self.sampling), "temperature": self.temperature}
        error = float(np.mean(self.standard_errors)) if self.standard_errors else None
        return {
            "likelihood": {
                **conditions(self.model, self.likelihood),
                **self.edges._asdict(),
                "mean_standard_error": error,
            },
            "sampling": sampling,
            "harness": asdict(self.settings),
        }

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Lower bounds in nats of completions given their prompts."""
        del disable_tqdm
        pairs = [encode_pair(self.model.tokenizer, *request.args) for request in requests]
        found = score_pairs(self.model, pairs, self.likelihood, self.edges)
        self.standard_errors += [error for _, error, _ in found if error is not None]
        greedy = [False] * len(pairs)
        if self.settings.check_greedy:
            greedy = self._divided([[pair] for pair in pairs], self._are_greedy)
        answers = [(value, is_greedy) for (value, *_), is_greedy in zip(found, greedy, strict=True)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Lower bounds in nats of whole texts, in windows that do not see each other."""
        del disable_tqdm
        self.likelihood.require_bound()
        texts = [request.args[0] for request in requests]
        corpus = corpus_of_texts(texts, self.model.tokenizer, self.scorer.context, append_eos=False)
        items = [replace(item, index=index_of(item.tokens)) for item in corpus.items]
        nats = score(self.scorer, items, self.likelihood).nats
        totals = np.bincount(corpus.unit_of_item, weights=nats, minlength=len(texts))
        return [-float(total) for total in totals]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Samples up to the first stop string, their end of document, or `max_gen_toks`."""
        del disable_tqdm
        groups: dict[SamplingConfig, list[Sampled]] = {}
        occurrences: Counter[tuple[SamplingConfig, str]] = Counter()
        stops = []
        for number, request in enumerate(requests):
            text = request.args[0]
            config, until = self._sampling_of(request.args[1])
            wanted = Sampled(config, number, text, occurrences[config, text])
            groups.setdefault(config, []).append(wanted)
            occurrences[config, text] += 1
            stops.append(until)
        size = self.likelihood.batch_size
        batches = [
            group[i : i + size] for group in groups.values() for i in range(0, len(group), size)
        ]
        texts = self._divided(batches, self._generate)
        order = [wanted.number for batch in batches for wanted in batch]
        answers = [""] * len(requests)
        for number, text in zip(order, texts, strict=True):
            answers[number] = postprocess_generated_text(text, stops[number], None)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _sampling_of(self, arguments: dict[str, Any]) -> tuple[SamplingConfig, list[str]]:
        """How a task wants its samples, and where they stop."""
        given = normalize_gen_kwargs(arguments, self.sampling.max_length)
        changes = {
            k: v for k, v in given.items() if k not in ("do_sample", "until", "max_gen_toks")
        }
        if unknown := changes.keys() - {field.name for field in fields(SamplingConfig)}:
            raise ValueError(f"--gen_kwargs {', '.join(sorted(unknown))}: the sampler has no such.")
        changes.setdefault("temperature", 1.0 if given["do_sample"] else 0.0)
        if self.temperature is not None:
            changes["temperature"] = self.temperature
        changes["max_length"] = min(given["max_gen_toks"], self.scorer.context - 1)
        return replace(self.sampling, **changes), given["until"]

    def _generate(self, batch: list[Sampled]) -> list[str]:
        """Texts of a batch, which has one configuration."""
        config, tokenizer = batch[0].config, self.model.tokenizer
        room = self.scorer.context - config.max_length
        encoded = [self._with_bos(tokenizer.encode(wanted.text)) for wanted in batch]
        rows = [
            index_of([wanted.occurrence, *ids]) for wanted, ids in zip(batch, encoded, strict=True)
        ]
        prompts = [ids[max(len(ids) - room, 0) :] for ids in encoded]
        new = self._sampled(prompts, config, rows)
        return [
            # Not the new tokens alone: some vocabularies drop the space before a first token.
            tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
            for prompt, ids in zip(prompts, new, strict=True)
        ]

    def _with_bos(self, ids: list[int]) -> list[int]:
        return self.edges.around(self.model.tokenizer, ids, [])[0]

    def _sampled(
        self, prompts: list[list[int]], config: SamplingConfig, rows: list[int] | None = None
    ) -> list[list[int]]:
        """New tokens of each prompt, up to the end of document."""
        # The mask stands for padding: it is no token of a text, whatever the vocabulary.
        pad = self.model.schedule.mask_token_id
        ids = sample(
            self.model.denoiser, self.model.schedule, prompts, self.scorer.context, config,
            SpecialTokens(self.model.tokenizer.eos_id, pad), rows=rows, device=self.model.device,
        )  # fmt: skip
        longest = max(map(len, prompts))
        return [[id for id in row[longest:] if id != pad] for row in ids.tolist()]

    def _are_greedy(self, batch: list[tuple[list[int], list[int]]]) -> list[bool]:
        ((prompt, tokens),) = batch
        prompt = self._with_bos(prompt)
        room = self.scorer.context - len(tokens)
        config = SamplingConfig(
            method="adaptive", temperature=0.0, max_length=len(tokens), block_length=len(tokens),
            steps=len(tokens), seed=self.sampling.seed,
        )  # fmt: skip
        return [self._sampled([prompt[max(len(prompt) - room, 0) :]], config) == [tokens]]

    def _divided(self, batches: Sequence[Any], function: Any) -> list[Any]:
        """Results of all batches in order, each computed by one replica of the model."""
        group = self.scorer.replicas
        if group is None or group.size() == 1:
            return [x for batch in batches for x in function(batch)]
        rank, size = group.rank(), group.size()
        mine = [function(batch) for batch in batches[rank::size]]
        parts: list[list[Any]] = [[] for _ in range(size)]
        torch.distributed.all_gather_object(parts, mine, group=group)
        return [x for i in range(len(batches)) for x in parts[i % size][i // size]]


def _chosen(section: type, arguments: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(section)} - {"batch_size"}
    return {name: value for name, value in arguments.items() if name in names}
