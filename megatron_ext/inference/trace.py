"""A record of how samples came about, step by step, as JSON that stands on its own.

    {"format": "gidd-trace 1", "noise": "masked" | "uniform" | "hybrid", "model": ...,
     "texts": {"17": " the", ...}, "mask_token_id": 3,
     "sequences": [{"prompt": [ids], "blocks": [{"first": 5, "steps": [
         {"log_snr": -8.1, "ids": [...], "confidence": [...]}, ...]}]}]}

`first` counts from the sequence's own first token; `confidence` is the model's probability of the
token that stands there after the step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ext.data.tokenizer import Tokenizer
    from megatron_ext.diffusion.schedule import MixingSchedule
    from megatron_ext.hf.sampling_gidd import Step

FORMAT = "gidd-trace 1"


class Trace:
    """Collects the steps of one call of `sample`; its `observe` is the observer."""

    def __init__(self, prompts: Sequence[Sequence[int]], context: int) -> None:
        self.sequences: list[dict[str, Any]] = [
            {"prompt": list(prompt), "blocks": []} for prompt in prompts
        ]
        self._longest = max(len(prompt) for prompt in prompts)
        self._context = context

    def observe(self, step: Step) -> None:
        for row, sequence in enumerate(self.sequences):
            first = step.first - self._longest + len(sequence["prompt"])
            # The context of a longer row ends later.
            room = self._context - first
            if room <= 0:
                continue
            if step.block == len(sequence["blocks"]):
                sequence["blocks"].append({"first": first, "steps": []})
            sequence["blocks"][step.block]["steps"].append(
                {
                    "log_snr": round(step.log_snr, 4),
                    "ids": step.ids[row, :room].tolist(),
                    "confidence": [round(x, 4) for x in step.confidence[row, :room].tolist()],
                }
            )

    def write(self, path: Path, tokenizer: Tokenizer, schedule: MixingSchedule, model: str) -> None:
        """Write the record with the text of every id in it."""
        used = {id for sequence in self.sequences for id in sequence["prompt"]}
        for sequence in self.sequences:
            for block in sequence["blocks"]:
                for step in block["steps"]:
                    used.update(step["ids"])
        noise = (
            "masked" if schedule.is_mask_only else "uniform" if schedule.shift > 100 else "hybrid"
        )
        contents = {
            "format": FORMAT,
            "model": model,
            "noise": noise,
            "mask_token_id": schedule.mask_token_id,
            "texts": {str(id): tokenizer.decode([id]) for id in sorted(used) if id >= 0},
            "sequences": self.sequences,
        }
        path.write_text(json.dumps(contents) + "\n", encoding="utf-8")
