"""README.md of an exported model, from the run's configuration and what it reported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config import Config

_NOISE = {"masked": "masked", "uniform": "uniform"}


def last_metrics(path: Path, step: int) -> dict[str, tuple[int, float]]:
    """The latest (step, value) of every finite number reported up to `step`."""
    found: dict[str, tuple[int, float]] = {}
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            # A run that was killed may have left half a line.
            continue
        if record.get("step", math.inf) > step:
            continue
        for name, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                found[name] = (record["step"], value)
    return found


def _figures(config: Config, metrics: Mapping[str, tuple[int, float]]) -> list[str]:
    """Lines with the bounds that were measured."""
    lines = []
    if "valid/elbo" in metrics:
        at, bound = metrics["valid/elbo"]
        _, error = metrics.get("valid/elbo_standard_error", (at, math.nan))
        lines.append(
            f"| validation bound | {bound:.4f} ± {error:.4f} nats/token at step {at} "
            f"(perplexity ≤ {math.exp(bound):.2f}) |"
        )
    if "valid/bits_per_byte" in metrics:
        at, bits = metrics["valid/bits_per_byte"]
        lines.append(f"| validation bits per byte | ≤ {bits:.4f} at step {at} |")
    if "train/elbo" in metrics:
        at, bound = metrics["train/elbo"]
        lines.append(f"| training bound | {bound:.4f} nats/token at step {at} |")
    if lines and config.data.valid_data_path:
        lines.append(f"| validation data | {', '.join(config.data.valid_data_path)} |")
    return lines


def _noise(config: Config) -> str:
    diffusion = config.diffusion
    kind = _NOISE.get(diffusion.objective, f"hybrid, mixing shift {diffusion.shift:g}")
    return f"{kind}; log-SNR from {diffusion.min_log_snr:g} to {diffusion.max_log_snr:g}"


def model_card(
    name: str,
    config: Config,
    fields: Mapping[str, Any],
    metrics: Path,
    *,
    step: int,
    consumed_tokens: int,
    num_parameters: int,
    has_tokenizer: bool,
) -> str:
    """Markdown with what the model is, how it was trained, what it reached and how to use it."""
    model, optimizer = config.model, config.optimizer
    data = ", ".join(config.data.data_path) or "not recorded"
    training = [f"| step | {step:,} |"]
    if step:
        training = [
            f"| step | {step:,} of {config.training.train_iters:,} |",
            f"| tokens seen | {consumed_tokens:,} |",
            f"| data | {data} |",
            f"| optimizer | {optimizer.optimizer}, lr {optimizer.lr:g} "
            f"({optimizer.parameterization}), {optimizer.lr_decay_style}, "
            f"{config.training.global_batch_size} sequences per step |",
        ]
    figures = _figures(config, last_metrics(metrics, step))
    prompt = "tokenizer('The', return_tensors='pt', add_special_tokens=False).input_ids"
    tokenizer_lines = [
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        f"output = model.generate({prompt}, max_length=64, steps=64)",
        "print(tokenizer.decode(output[0]))",
    ]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [diffusion-language-model, gidd]",
        "---",
        f"# {name}",
        "",
        "A bidirectional transformer trained with the GIDD objective (arXiv 2512.10858): it "
        "generates text by denoising, not from left to right.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {num_parameters:,} |",
        f"| layers, width, heads | {model.num_layers}, {model.hidden_size}, "
        f"{model.num_attention_heads} of {model.head_width} |",
        f"| vocabulary | {fields['vocab_size']:,} |",
        f"| context | {model.seq_length} |",
        f"| noise | {_noise(config)} |",
        f"| weights | {fields['dtype']}, norm gains float32 |",
        *training,
        *figures,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer"
        if has_tokenizer
        else "from transformers import AutoModelForCausalLM",
        "",
        f'folder = "{name}"',
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        *(tokenizer_lines if has_tokenizer else ["output = model.generate(max_length=64)"]),
        "```",
    ]
    return "\n".join(lines) + "\n"
