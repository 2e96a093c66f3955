"""Prompts to samples: batches, tokens and text around the sampler."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.hf.sampling_gidd import HOLE, SpecialTokens, sample
from megatron_ext.hf.steps_gidd import SamplingConfig
from megatron_ext.inference.load import LoadedModel
from megatron_ext.inference.trace import Trace

HOLE_TEXT = "<|mask|>"


class Sample(NamedTuple):
    """A prompt and what the model made of it."""

    prompt: str
    text: str
    """The whole text, prompt included, up to the end of document."""
    ids: list[int]
    """New tokens, those of a prompt behind its first hole among them."""


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def read_prompts(path: Path) -> list[str]:
    """The "prompt" of every JSON line; `ValueError` names the line that has none."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'--input {path}, line {number}: no "prompt" in it.') from error
    return prompts


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text, a hole for every `<|mask|>` in it."""
    ids: list[int] = []
    for number, piece in enumerate(text.split(HOLE_TEXT)):
        ids += [HOLE] * (number > 0) + (tokenizer.encode(piece) if piece else [])
    return ids


def generate(
    model: LoadedModel,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    batch_size: int = 8,
    trace: Path | None = None,
) -> Iterator[Sample]:
    """Samples in the order of the prompts; every rank yields the same.

    Prompt k draws under (seed, k): two equal prompts get different samples, and the batch size
    changes none.
    """
    pad = model.tokenizer.pad_id
    if pad is None:
        # The mask is no token of a text, whatever the vocabulary.
        pad = model.schedule.mask_token_id
    special = SpecialTokens(model.tokenizer.eos_id, pad)
    for first in range(0, len(prompts), batch_size):
        texts = prompts[first : first + batch_size]
        encoded = [encode_prompt(text, model.tokenizer) for text in texts]
        prefixes = [ids[: ids.index(HOLE)] if HOLE in ids else ids for ids in encoded]
        record = Trace(prefixes, model.context) if trace is not None and first == 0 else None

        def progress(steps: Iterable[Any]) -> Iterable[Any]:
            return tqdm(
                steps, desc="denoise", unit="step", disable=None if is_first_rank() else True
            )

        ids = sample(
            model.denoiser, model.schedule, encoded, model.context, config, special,
            rows=range(first, first + len(encoded)), device=model.device,
            observer=record.observe if record else None, progress=progress,
        ).tolist()  # fmt: skip
        if record is not None and is_first_rank():
            assert trace is not None
            record.write(trace, model.tokenizer, model.schedule, model.name)
        longest = max(len(prefix) for prefix in prefixes)
        for text, prefix, row in zip(texts, prefixes, ids, strict=True):
            new = [id for id in row[longest:] if id != pad]
            whole = model.tokenizer.decode([*prefix, *new])
            yield Sample(text, whole, new)


def write_samples(samples: Iterable[Sample], name: str, output: Path | None) -> None:
    """Print, or write JSON lines; on the first rank."""
    if output is None:
        for number, drawn in enumerate(samples):
            if is_first_rank():
                print(f"--- sample {number} of {name} ---\n{drawn.text}\n", flush=True)
        return
    lines = [json.dumps(drawn._asdict(), ensure_ascii=False) + "\n" for drawn in samples]
    if is_first_rank():
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(lines), encoding="utf-8")
