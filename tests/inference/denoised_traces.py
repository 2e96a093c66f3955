"""Traces of the sampler with a denoiser that is a fixed table, one row of logits per position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.hf.sampling_gidd import sample
from megatron_ext.hf.steps_gidd import SamplingConfig
from megatron_ext.inference.trace import Trace

MASK = 0
HOSTILE = "</script><img src=x onerror=document.title='pwned'>"
TEXTS = [
    "<|mask|>", " the", " quick", " brown", " fox", " jumps", " over", "\n", "\t", "  ", "", "\x07",
    "é", " naïve", "\u202eevil", "&amp;", HOSTILE, "<!--", ".", " lazy", " dog", " and", " 猫",
    "ing",
]  # fmt: skip
SHIFTS = {"masked": -1000.0, "hybrid": 0.0, "uniform": 1000.0}


class TableDenoiser:
    """Logits of a position depend on the position and, a little, on the token that stands there."""

    def __init__(self, length: int, vocab_size: int) -> None:
        numbers = np.random.default_rng(1).gumbel(size=(length, vocab_size)) * 2
        self.table = torch.from_numpy(numbers).float()

    def begin_block(self, ids: Tensor, positions: Tensor, is_token: Tensor | None) -> None:
        pass

    def logits(
        self, ids: Tensor, positions: Tensor, is_token: Tensor | None, num_active: int
    ) -> Tensor:
        own = torch.nn.functional.one_hot(ids[:, :num_active], self.table.shape[1])
        return self.table[positions[:, :num_active]] + own


class TextTable:
    """Decodes by looking up; ids beyond the given texts are words."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(TEXTS[id] if id < len(TEXTS) else f" w{id}" for id in ids)


def write_trace(
    path: Path,
    noise: str,
    *,
    prompts: Sequence[Sequence[int]] = ([1, 2], [3]),
    vocab_size: int = len(TEXTS),
    config: SamplingConfig = SamplingConfig(steps=6, block_length=12, max_length=24, seed=3),  # noqa: B008
) -> Path:
    """What tools/generate.py --trace writes."""
    length = max(map(len, prompts)) + config.max_length
    schedule = MixingSchedule(vocab_size, MASK, SHIFTS[noise])
    record = Trace(prompts, length)
    sample(
        TableDenoiser(length, vocab_size), schedule, prompts, length, config,
        observer=record.observe,
    )  # fmt: skip
    tokenizer: Any = TextTable()
    record.write(path, cast(Tokenizer, tokenizer), schedule, f"table, {noise}")
    return path
